/**
 * Streams of images from any kind of input. All input paths are opened through this module. Nothing is listed as a whole, and the order
 * never changes.
 */
import { stat } from 'node:fs/promises';
import { dirname, join, relative } from 'node:path';
import { checkOptions, describe } from '../check.js';
import { reasonOf, throwIfAborted, UniFlowError } from '../errors.js';
import { MissingPackageError } from '../optional.js';
import { refuseEndless } from './files.js';
import { partsIn, type Failed, type Part } from './folder.js';
import { baseOf, expandBraces, isGlob, matching } from './glob.js';
import { IdTable } from './id-table.js';
import { inIdx } from './idx.js';
import type { Item, Items, Reading, Skipped } from './item.js';
import { inJsonLines } from './jsonl.js';
import { inList } from './list.js';
import { loadParquet } from './load-parquet.js';
import { formatOf, mayBeImages, type Format } from './names.js';
import { isRemote } from './url.js';
import { inTar, inTarStream, inZippedTar } from './webdataset.js';

/** Images with unique ids, in a reproducible order. */
export interface Source extends AsyncIterable<Item> {
  /** Whether it can be iterated more than once: standard input cannot. */
  readonly repeatable: boolean;
  /** The same images, reporting each skipped file to `onSkip`. */
  items: (onSkip: (skipped: Skipped) => void) => AsyncGenerator<Item, void, undefined>;
}

/** Options of {@link openSource}. */
export interface SourceOptions {
  signal?: AbortSignal | undefined;
}

/** Standard input, read as a tar. */
export const STDIN = '-';

/**
 * The images of `inputs`, in the order of the inputs:
 * - a folder: the images in it at any depth, sorted by name; or the archives (`.tar`, `.tar.gz`, `.parquet`) if its first level has some or
 *   if there are no images. Links are followed, and a folder reached by several links is read once. Ids are paths below the folder.
 * - a `.txt`, `.csv` or `.tsv` list: one path or URL per line, paths relative to the list's folder. CSV may have quotes, more columns and a
 *   header. Ids are the paths as written in the list.
 * - `.jsonl`: one URL per line, as a string or as `{ "url": ..., "id": ... }`, or a `path`. Ids are the `id`s, or the URLs.
 * - WebDataset: a `.tar`, a `.tar.gz`, or `-` for a tar on standard input. Ids are `shard.tar/KEY`.
 * - `.parquet` with a column of bytes or of `{ bytes, path }`, as in Hugging Face data sets. Ids are `file.parquet/ROW`.
 * - an IDX file of images. Ids are `train-images-idx3-ubyte/NUMBER`.
 * - a glob, `photos/**\/*.jpg` or `shard-{000..009}.tar`: each match in turn. A `.jpg`, or any other file, is an image; its id is its path.
 *
 * With several inputs or glob matches, ids start with the folder or archive as named: `b/shard.tar/KEY`.
 *
 * A file that cannot be read becomes an unreadable item: it has an id, and the pipeline reports the reason. So does an image with the id of
 * an earlier one, because ids must be unique. Files that are not images are skipped, and {@link Source.items} reports each.
 *
 * @throws {UniFlowError} `BAD_INPUT` for no inputs.
 */
export function openSource(inputs: string | readonly string[], options: SourceOptions = {}): Source {
  const all = typeof inputs === 'string' ? [inputs] : inputs;
  if (!Array.isArray(all) || all.length === 0 || !all.every((input) => typeof input === 'string' && input !== ''))
    throw UniFlowError.expected('BAD_INPUT', 'inputs', 'paths of images', describe(all));
  checkOptions(options, ['signal']);
  const items = (skip: Reading['skip']): Items => unique(itemsOf(all as string[], { signal: options.signal, skip }));
  return {
    repeatable: !all.includes(STDIN),
    items,
    [Symbol.asyncIterator]: () => items(() => undefined),
  };
}

/** The items of a source, or of any sequence of items, for one iteration. */
export function itemsOfSource(
  source: Source | Iterable<Item> | AsyncIterable<Item>,
  skip: Reading['skip'],
): AsyncIterable<Item> | Iterable<Item> {
  return 'repeatable' in source ? { [Symbol.asyncIterator]: () => source.items(skip) } : source;
}

/** Turns items with a repeated id into unreadable ones. */
export async function* unique(items: Iterable<Item> | AsyncIterable<Item>): Items {
  const seen = new IdTable();
  let number = 0;
  for await (const item of items)
    yield seen.add(item.id, number++) ? item : { id: item.id, image: { error: 'another image before it has the same id' } };
}

/** All items of all inputs. `whole`: ids are paths as named, even with a single input. */
export async function* itemsOf(inputs: readonly string[], reading: Reading, whole = inputs.length > 1): Items {
  for (const input of inputs)
    for await (const part of partsOf(input, reading, whole))
      yield* 'format' in part ? orFailure(part.path, reading, itemsIn(part, reading)) : one(part, reading);
}

function* one(part: Failed | Item, reading: Reading): Generator<Item> {
  yield 'id' in part ? part : failureOf(part, reading);
}

/** Turns a failure into an unreadable item; a data set rejects instead. */
function failureOf({ path, error }: Failed, { strict, signal }: Reading): Item {
  throwIfAborted(signal);
  if (strict || error instanceof MissingPackageError) throw error;
  return { id: path, image: { error: reasonOf(error, path) } };
}

/** The items. If reading fails, the error becomes a last, unreadable item. */
async function* orFailure(path: string, reading: Reading, items: Items): Items {
  try {
    yield* items;
  } catch (error) {
    yield failureOf({ path, error }, reading);
  }
}

/** The files, failures and URLs that an input expands to. */
export async function* partsOf(input: string, reading: Reading, whole: boolean): AsyncGenerator<Part | Failed | Item, void, undefined> {
  throwIfAborted(reading.signal);
  try {
    if (input === STDIN) yield partOf(input, whole, 'stdin');
    else if (isRemote(input)) yield { id: input, image: { url: input } };
    else yield* partsAt(input, reading, whole);
  } catch (error) {
    yield { path: input, error };
  }
}

async function* partsAt(input: string, reading: Reading, whole: boolean): AsyncGenerator<Part | Failed, void, undefined> {
  const info = await stat(input).catch(() => undefined);
  if (info?.isDirectory()) return yield* belowFolder(input, reading, whole);
  if (info) return yield await named(input, reading, whole);
  const patterns = expandBraces(input);
  const several = whole || patterns.length > 1;
  // ids of a data set do not depend on its location
  const below = reading.strict ? (part: Part): Part => relativeTo(baseOf(input), part) : (part: Part): Part => part;
  for (const pattern of patterns)
    if (isGlob(pattern)) for await (const part of partsMatching(pattern, reading)) yield 'format' in part ? below(part) : part;
    else yield await named(pattern, reading, several).then(below, (error: unknown) => ({ path: pattern, error }));
}

async function* belowFolder(folder: string, reading: Reading, whole: boolean): AsyncGenerator<Part | Failed, void, undefined> {
  for await (const part of partsIn(folder, reading))
    if (!whole || !('format' in part)) yield part;
    else yield { ...part, id: join(folder, part.id), prefix: join(folder, part.prefix) };
}

async function* partsMatching(pattern: string, { signal, skip }: Reading): AsyncGenerator<Part | Failed, void, undefined> {
  for await (const { path, error, unusable } of matching(pattern, signal))
    if (error) yield { path, error };
    else if (unusable !== undefined) skip({ path, reason: unusable, lost: mayBeImages(path) });
    else yield partOf(path, true);
}

function relativeTo(folder: string, part: Part): Part {
  return { ...part, id: relative(folder, part.path), prefix: relative(folder, dirname(part.path)) || '.' };
}

/** @throws {UniFlowError} `BAD_INPUT` for a pipe or device. */
async function named(path: string, { pipes }: Reading, whole: boolean): Promise<Part> {
  if (!pipes || formatOf(path) !== 'image') await refuseEndless(path);
  return partOf(path, whole);
}

/** A file as named. With several inputs, ids start with the folder, because two archives may have the same name. */
function partOf(path: string, whole: boolean, format: Format = formatOf(path)): Part {
  return { path, format, id: path, prefix: whole ? dirname(path) : '.' };
}

/** The images of a file. */
export async function* itemsIn(part: Part, reading: Reading): Items {
  const { path, format, id, prefix, label } = part;
  switch (format) {
    case 'image':
      return yield { id, image: path, label };
    case 'stdin':
      return yield* inTarStream('stdin', process.stdin, reading);
    case 'list':
      return yield* inList(path, reading);
    case 'jsonl':
      return yield* inJsonLines(path, reading);
    case 'tar':
      return yield* below(prefix, inTar(path, reading));
    case 'tar.gz':
      return yield* below(prefix, inZippedTar(path, reading));
    case 'parquet':
      return yield* below(prefix, (await loadParquet()).inParquet(path, reading));
    case 'idx':
      return yield* below(prefix, inIdx(path, reading));
  }
}

async function* below(prefix: string, items: Items): Items {
  for await (const item of items) yield prefix === '.' ? item : { ...item, id: `${prefix}/${item.id}` };
}
