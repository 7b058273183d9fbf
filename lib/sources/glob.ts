/** Expands patterns to paths. */
import { expand } from 'brace-expansion';
import { join } from 'node:path';
import picomatch from 'picomatch';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { walk, type Found } from './walk.js';

const MOST_NAMES = 100_000;

/** Expands braces such as `shard-{000..009}.tar`. @throws {UniFlowError} `BAD_INPUT` if there are too many names. */
export function expandBraces(pattern: string): string[] {
  const names = expand(pattern, { max: MOST_NAMES + 1, maxLength: Infinity });
  if (names.length <= MOST_NAMES) return names;
  throw UniFlowError.expected(
    'BAD_INPUT',
    pattern,
    `at most ${MOST_NAMES} names (a glob with *, or a list in a file, has no bound)`,
    'more',
  );
}

export function isGlob(pattern: string): boolean {
  return picomatch.scan(pattern).isGlob;
}

/** The folder that contains all matches of a pattern. */
export function baseOf(pattern: string): string {
  return picomatch.scan(pattern).base || '.';
}

/** The files that match a pattern. @throws {UniFlowError} `NOT_FOUND` if there are none. */
export async function* matching(
  pattern: string,
  signal: AbortSignal | undefined,
): AsyncGenerator<Found & { path: string }, void, undefined> {
  const root = baseOf(pattern);
  const matches = picomatch(picomatch.scan(pattern).glob);
  let none = true;
  for await (const found of walk(root)) {
    throwIfAborted(signal);
    if (!found.error && !matches(found.id)) continue;
    yield { ...found, path: join(root, found.id) };
    none = false;
  }
  if (none) throw UniFlowError.expected('NOT_FOUND', pattern, 'files that match it', 'none');
}
