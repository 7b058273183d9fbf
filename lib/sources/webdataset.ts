/** WebDataset: tar archives in which files with the same name up to the first dot belong together. */
import { expand } from 'brace-expansion';
import { availableParallelism } from 'node:os';
import { basename } from 'node:path';
import pLimit from 'p-limit';
import { UniFlowError } from '../errors.js';
import type { Sample, Samples } from './dataset.js';
import { isPicture } from './folder.js';
import { numberLabels } from './labels.js';
import { indexTar, readEntry, type TarEntry } from './tar.js';

/** The key, which may have folders in front, and the extension. Some archives begin all names with './'. */
const NAME = /^(?:\.\/)?((?:.*\/)?[^./]+)\.([^/]*)$/;

/** A file's key and its extension in lower case; undefined where it has none. */
export function keyOf(name: string): { key: string; extension: string } | undefined {
  const [, key, extension] = NAME.exec(name) ?? [];
  return key === undefined || extension === undefined ? undefined : { key, extension: extension.toLowerCase() };
}

/** Whether what has this extension is a key's picture. */
export function isKeysPicture(extension: string): boolean {
  return isPicture(`.${extension}`) && !extension.includes('.');
}

/** Whether a file's name is that of a tar archive. */
export function isTar(path: string): boolean {
  return /\.tar$/i.test(path);
}

const MOST_NAMES = 100_000;

/** `shard-{000..009}.tar` and the like are several. @throws {UniFlowError} `BAD_INPUT` where they are too many. */
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

interface Found {
  path: string;
  id: string;
  image: TarEntry;
  label: string | undefined;
}

/** The pictures of all shards, in the order of the archives. @throws {UniFlowError} `NOT_FOUND` or `BAD_INPUT`. */
export async function openTars(paths: readonly string[], signal: AbortSignal | undefined): Promise<Samples> {
  const shards = await pLimit(availableParallelism()).map(paths, (path) => openTar(path, signal));
  const found = shards.flat();
  const subject = paths.length === 1 ? (paths[0] as string) : `${paths[0]} to ${paths.at(-1)}`;
  if (found.length === 0) throw UniFlowError.expected('NOT_FOUND', subject, 'pictures (KEY.jpg, KEY.png, ...)', 'none');
  const { labels, classes } = numberLabels(
    subject,
    found.map(({ id }) => id),
    found.map(({ label }) => label),
  );
  const read = async (i: number): Promise<Sample> => {
    const { path, id, image } = found[i] as Found;
    return { id, label: labels[i], image: await readEntry(path, image) };
  };
  return { length: found.length, classes, read };
}

async function openTar(path: string, signal: AbortSignal | undefined): Promise<Found[]> {
  const groups = new Map<string, Map<string, TarEntry>>();
  for (const entry of await indexTar(path, signal)) {
    const found = keyOf(entry.name);
    if (!found) continue;
    const group = groups.get(found.key) ?? new Map<string, TarEntry>();
    groups.set(found.key, group.set(found.extension, entry));
  }
  const found: Found[] = [];
  for (const [key, group] of groups) {
    const image = [...group].find(([extension]) => isKeysPicture(extension))?.[1];
    if (image) found.push({ path, id: `${basename(path)}/${key}`, image, label: await labelOf(path, group) });
  }
  return found;
}

async function labelOf(path: string, group: ReadonlyMap<string, TarEntry>): Promise<string | undefined> {
  const [cls, json] = [group.get('cls'), group.get('json')];
  if (cls) return (await readEntry(path, cls)).toString().trim() || undefined;
  if (!json) return undefined;
  const text = (await readEntry(path, json)).toString();
  try {
    const { label } = JSON.parse(text) as { label?: unknown };
    return typeof label === 'number' || typeof label === 'string' ? String(label) : undefined;
  } catch (cause) {
    throw UniFlowError.expected('BAD_INPUT', `${path}: ${json.name}`, 'JSON', `'${text.slice(0, 40)}'`, cause);
  }
}
