/** From what the user names to images, and from their ids to the names of the results. */
import { basename, extname } from 'node:path';
import { UniFlowError } from '../errors.js';
import { cutName, MAX_NAME, pathExists } from '../io/files.js';
import type { Item } from '../sources/item.js';
import { Skips } from '../sources/skips.js';
import { expandBraces, isGlob, matching } from '../sources/glob.js';
import { itemsOf, STDIN } from '../sources/source.js';
import { isRemote } from '../sources/url.js';

/** A file or folder that could not be read. */
export interface Failure {
  path: string;
  reason: string;
}

/**
 * Call before anything is written: where no input is there, a path is mistyped. One of several that is missing is a failure of its own.
 * @throws {UniFlowError} `NOT_FOUND` naming the first.
 */
export async function refuseMissing(inputs: readonly string[]): Promise<void> {
  for (const input of inputs) if (await isThere(input)) return;
  const [first = ''] = inputs;
  throw UniFlowError.expected('NOT_FOUND', first, 'a file, a folder, a glob that matches some, or a URL', 'nothing of that name');
}

async function isThere(input: string): Promise<boolean> {
  if (input === STDIN || isRemote(input) || (await pathExists(input))) return true;
  for (const pattern of expandBraces(input)) {
    if (await pathExists(pattern)) return true;
    if (
      isGlob(pattern) &&
      !(
        await matching(pattern, undefined)
          .next()
          .catch(() => ({ done: true }))
      ).done
    )
      return true;
  }
  return false;
}

/** All images of the inputs, by the paths as they were named; one that is named twice is there twice. */
export async function collectItems(inputs: readonly string[], signal: AbortSignal): Promise<{ items: Item[]; skips: Skips }> {
  const skips = new Skips();
  const items: Item[] = [];
  for await (const item of itemsOf(inputs, { signal, pipes: true, skip: skips.add }, true)) items.push(item);
  return { items, skips };
}

/** Bytes left of a file's name for the number of one that several share, and for the extension. */
const ENDING_BYTES = 16;

/** The item, with a path that was named opened whatever it is: a pipe, for one. */
export function asNamed<T extends Item>(item: T): T {
  const { image } = item;
  return typeof image === 'string' ? { ...item, image: () => Promise.resolve(image) } : item;
}

/** A file name for each id: its last part with another extension, numbered where several share it. Long ones are cut. */
export function fileNames(ids: readonly string[], format: string): string[] {
  const taken = new Set<string>(); // without case, as some file systems compare
  return ids.map((id) => {
    const path = isRemote(id) && URL.canParse(id) ? new URL(id).pathname : id; // a query is no part of the name
    const stem = cutName(basename(path, extname(path)), MAX_NAME - ENDING_BYTES) || 'image';
    let name = stem;
    for (let n = 2; taken.has(name.toLowerCase()); n++) name = `${stem}-${n}`;
    taken.add(name.toLowerCase());
    return `${name}.${format}`;
  });
}
