/** Turns the user's inputs into images, and their ids into names of output files. */
import { basename, extname } from 'node:path';
import { UniFlowError } from '../errors.js';
import { cutName, MAX_NAME, pathExists } from '../io/files.js';
import type { Item } from '../sources/item.js';
import { Skips } from '../sources/skips.js';
import { expandBraces, isGlob, matching } from '../sources/glob.js';
import { itemsOf, openSource, STDIN } from '../sources/source.js';
import { isRemote } from '../sources/url.js';

/** A file or folder that could not be read. */
export interface Failure {
  path: string;
  reason: string;
}

/**
 * Call before writing anything: if none of the inputs exists, the path is probably mistyped. If only some are missing, they are reported as
 * failures.
 * @throws {UniFlowError} `NOT_FOUND` naming the first input.
 */
export async function refuseMissing(inputs: readonly string[]): Promise<void> {
  for (const input of inputs) if (await isThere(input)) return;
  const [first = ''] = inputs;
  throw UniFlowError.expected('NOT_FOUND', first, 'a file, a folder, a glob that matches some, or a URL', 'nothing of that name');
}

async function isThere(input: string): Promise<boolean> {
  if (input === STDIN || isRemote(input) || (await pathExists(input))) return true;
  for (const pattern of expandBraces(input))
    if ((await pathExists(pattern)) || (isGlob(pattern) && (await matchesAny(pattern)))) return true;
  return false;
}

async function matchesAny(pattern: string): Promise<boolean> {
  try {
    return !(await matching(pattern, undefined).next()).done;
  } catch {
    return false;
  }
}

/** All images of the inputs, with their paths as named; an image named twice appears twice. */
export async function collectItems(inputs: readonly string[], signal: AbortSignal): Promise<{ items: Item[]; skips: Skips }> {
  const skips = new Skips();
  const items: Item[] = [];
  for await (const item of itemsOf(inputs, { signal, pipes: true, skip: skips.add }, true)) items.push(item);
  return { items, skips };
}

/** Bytes reserved in a file name for the number that distinguishes duplicates, and for the extension. */
const ENDING_BYTES = 16;

/** The item, opening a named path of any kind, including pipes. */
export function asNamed<T extends Item>(item: T): T {
  const { image } = item;
  return typeof image === 'string' ? { ...item, image: () => Promise.resolve(image) } : item;
}

/** The images of the inputs as they are read, with their paths as named; an image named twice appears twice. */
export async function* namedItems(inputs: readonly string[], skips: Skips, signal: AbortSignal): AsyncGenerator<Item, void, undefined> {
  for await (const item of itemsOf(inputs, { signal, pipes: true, skip: skips.add }, true)) yield asNamed(item);
}

/** Counts the images of the inputs in a separate pass, for a time estimate; undefined if they can be read only once. */
export async function countImages(inputs: readonly string[], signal: AbortSignal): Promise<number | undefined> {
  if (inputs.includes(STDIN)) return undefined;
  let total = 0;
  const items = openSource(inputs, { signal })[Symbol.asyncIterator]();
  while (!(await items.next()).done) total++;
  return total;
}

/** A file name for each id: its base name with another extension, numbered if several ids share it. Long names are truncated. */
export function fileNames(ids: readonly string[], format: string): string[] {
  const taken = new Set<string>(); // in lower case, because some file systems ignore case
  return ids.map((id) => {
    const path = isRemote(id) && URL.canParse(id) ? new URL(id).pathname : id; // drops the query
    const stem = cutName(basename(path, extname(path)), MAX_NAME - ENDING_BYTES) || 'image';
    let name = stem;
    for (let n = 2; taken.has(name.toLowerCase()); n++) name = `${stem}-${n}`;
    taken.add(name.toLowerCase());
    return `${name}.${format}`;
  });
}
