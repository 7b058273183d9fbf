/** Pictures one after the other, from wherever they are: nothing is listed as a whole, and the order is always the same. */
import { createReadStream } from 'node:fs';
import { readdir, stat } from 'node:fs/promises';
import { basename, dirname, extname, join, resolve } from 'node:path';
import { addAbortSignal, type Readable } from 'node:stream';
import picomatch from 'picomatch';
import { describe } from '../check.js';
import { refuseEndless, StreamBytes, unreadable } from './files.js';
import { isPicture, walk } from './folder.js';
import { isIdx, streamIdx } from './idx.js';
import { isList, lineOf } from './list.js';
import { entriesIn, tarEntries, type TarEntry } from './tar.js';
import { expandBraces, isKeysPicture, isTar, keyOf } from './webdataset.js';
import { reasonOf, throwIfAborted, UniFlowError } from '../errors.js';
import { IdTable } from './id-table.js';
import type { Item, Picture } from './item.js';

/** Pictures with unique ids, in an order that is always the same. */
export interface Source extends AsyncIterable<Item> {
  /** Whether it can be gone through again: standard input cannot. */
  readonly repeatable: boolean;
}

type Items = AsyncGenerator<Item, void, undefined>;

/** Names standard input, which has a tar. */
const STDIN = '-';
const REMOTE = /^https?:\/\//i;
const isParquet = (path: string): boolean => /\.parquet$/i.test(path);

/**
 * The pictures of `inputs`, in the order of the inputs:
 * - a folder: the pictures in it at any depth, in the order of their names; or the `.tar`s and `.parquet`s that it has in it. Links are
 *   followed, and a folder that several lead to is read once. Ids are paths below the folder.
 * - a `.txt`, `.csv` or `.tsv` list: a path or a URL a line, paths relative to the list's folder; what follows a tab or comma is left out.
 *   Ids are the paths as they stand there.
 * - `.jsonl`: a URL a line, as a string or as `{ "url": ..., "id": ... }`. Ids are the `id`s, or the URLs.
 * - WebDataset: a `.tar`, or `-` for one on standard input. Ids are `shard.tar/KEY`.
 * - `.parquet` with a column of bytes or of `{ bytes, path }`. Ids are `file.parquet/ROW`.
 * - an IDX file of pictures. Ids are `train-images-idx3-ubyte/NUMBER`.
 * - a glob, `photos/**\/*.jpg` or `shard-{000..009}.tar`: each of these in turn. A `.jpg`, or any other file, is a picture; its id is its path.
 *
 * Where several are named, by inputs or by a glob, ids begin with the folder or archive as it was named: `b/shard.tar/KEY`.
 *
 * What cannot be read is a picture that cannot be read: it has an id, and the pipeline says so. So is a picture with an id that was there
 * before, for ids have to be unique.
 *
 * @throws {UniFlowError} `BAD_INPUT` for no inputs.
 */
export function openSource(inputs: string | readonly string[], options: { signal?: AbortSignal | undefined } = {}): Source {
  const all = typeof inputs === 'string' ? [inputs] : inputs;
  if (!Array.isArray(all) || all.length === 0 || !all.every((input) => typeof input === 'string' && input !== ''))
    throw UniFlowError.expected('BAD_INPUT', 'inputs', 'paths of pictures', describe(all));
  return {
    repeatable: !all.includes(STDIN),
    [Symbol.asyncIterator]: () => unique(itemsOf(all, options.signal)),
  };
}

/** The items, where an id comes a second time as one that cannot be used. */
export async function* unique(items: Iterable<Item> | AsyncIterable<Item>): Items {
  const seen = new IdTable();
  let number = 0;
  for await (const item of items)
    yield seen.add(item.id, number++) ? item : { id: item.id, image: { error: 'another picture before it has the same id' } };
}

async function* itemsOf(inputs: readonly string[], signal: AbortSignal | undefined): Items {
  for (const input of inputs) {
    throwIfAborted(signal);
    yield* orFailure(input, signal, itemsOfInput(input, inputs.length > 1, signal));
  }
}

/** The items; where they cannot be read to their end, that is an item that failed. */
async function* orFailure(name: string, signal: AbortSignal | undefined, items: Items): Items {
  try {
    yield* items;
  } catch (error) {
    throwIfAborted(signal);
    yield { id: name, image: { error: reasonOf(error, name) } };
  }
}

async function* itemsOfInput(input: string, several: boolean, signal: AbortSignal | undefined): Items {
  if (input === STDIN) return yield* inStream('stdin', process.stdin, signal);
  if (REMOTE.test(input)) return yield { id: input, image: { url: input } };
  const info = await stat(input).catch(() => undefined);
  if (info?.isDirectory()) return yield* inFolder(input, several, signal);
  if (info) return yield* inFile(input, several, signal);
  const patterns = expandBraces(input);
  for (const pattern of patterns)
    if (picomatch.scan(pattern).isGlob) yield* matching(pattern, signal);
    else yield* orFailure(pattern, signal, inFile(pattern, several || patterns.length > 1, signal));
}

async function* inFolder(folder: string, several: boolean, signal: AbortSignal | undefined): Items {
  const entries = await readdir(folder, { withFileTypes: true });
  const files = entries.filter((entry) => !entry.isDirectory() && !entry.name.startsWith('.'));
  const names = files.map((entry) => entry.name).sort();
  const archives = names.filter((name) => isTar(name) || isParquet(name)).map((name) => join(folder, name));
  for (const path of archives) yield* orFailure(path, signal, inFile(path, several, signal));
  if (archives.length > 0) return refuseMixed(folder, archives[0] as string);
  let none = true;
  for await (const { id, error } of walk(folder)) {
    throwIfAborted(signal);
    const path = join(folder, id);
    yield { id: several || error ? path : id, image: error ? { error: reasonOf(error, path) } : path };
    none = false;
  }
  if (none) throw UniFlowError.expected('NOT_FOUND', folder, 'pictures (jpg, png, webp, avif, tiff, gif)', 'none');
}

/** Nobody can tell whether the pictures beside archives were meant: they are not read, and not passed over in silence. */
async function refuseMixed(folder: string, archive: string): Promise<void> {
  for await (const { id } of walk(folder)) {
    const both = `${basename(archive)} and ${id}; the pictures are left out (name what is meant: '${join(folder, '**', `*${extname(id)}`)}')`;
    throw UniFlowError.expected('BAD_INPUT', folder, 'archives or pictures', both);
  }
}

/** The files below the part of the pattern that is no pattern. */
async function* matching(pattern: string, signal: AbortSignal | undefined): Items {
  const { base, glob } = picomatch.scan(pattern);
  const root = base || '.';
  let none = true;
  for await (const { id, error } of walk(root, picomatch(glob))) {
    const path = join(root, id);
    if (error) yield { id: path, image: { error: reasonOf(error, path) } };
    else yield* orFailure(path, signal, inFile(path, true, signal));
    none = false;
  }
  if (none) throw UniFlowError.expected('NOT_FOUND', pattern, 'files that match it', 'none');
}

/** What a file holds, by its name. */
async function* inFile(path: string, several: boolean, signal: AbortSignal | undefined): Items {
  await refuseEndless(path);
  const folder = several ? dirname(path) : '.'; // two archives may have one name
  if (isTar(path)) yield* below(folder, inTar(path, signal));
  else if (isParquet(path)) yield* below(folder, (await import('./parquet.js')).parquetRows(path));
  else if (isIdx(path)) yield* below(folder, streamIdx(path));
  else if (isList(path)) yield* inList(path);
  else if (/\.(jsonl|ndjson)$/i.test(path)) yield* inJsonLines(path);
  else yield { id: path, image: path };
}

async function* below(folder: string, items: AsyncIterable<Item>): Items {
  for await (const item of items) yield folder === '.' ? item : { ...item, id: `${folder}/${item.id}` };
}

async function* inList(list: string): Items {
  for await (const { line } of linesOf(list)) {
    const { path } = REMOTE.test(line) ? { path: line.trim() } : lineOf(line);
    if (path !== '') yield { id: path, image: REMOTE.test(path) ? { url: path } : resolve(dirname(list), path) };
  }
}

async function* inJsonLines(path: string): Items {
  for await (const { line, number } of linesOf(path)) if (line.trim() !== '') yield itemOfJson(line, `${path}, line ${number}`);
}

function itemOfJson(line: string, where: string): Item {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch {
    // said below
  }
  const { url, id = url } = (typeof value === 'string' ? { url: value } : (value ?? {})) as { url?: unknown; id?: unknown };
  if (typeof url === 'string' && (typeof id === 'string' || typeof id === 'number')) return { id: String(id), image: { url } };
  return { id: where, image: { error: `expected a URL, or { "url": ..., "id": ... }, but got ${line.slice(0, 80)}` } };
}

/** Longer lines are of no list. */
const MAX_LINE = 2 ** 20;

async function* linesOf(path: string): AsyncGenerator<{ line: string; number: number }, void, undefined> {
  let number = 0;
  let rest = '';
  const chunks = createReadStream(path, 'utf8') as AsyncIterable<string>;
  try {
    for await (const chunk of chunks) {
      const lines = (number === 0 ? (rest + chunk).replace(/^\ufeff/, '') : rest + chunk).split(/\r?\n/);
      rest = lines.pop() as string;
      if (rest.length > MAX_LINE)
        throw UniFlowError.expected('BAD_INPUT', `${path}, line ${number + lines.length + 1}`, `at most ${MAX_LINE} characters`, 'more');
      for (const line of lines) yield { line, number: ++number };
    }
  } catch (cause) {
    throw cause instanceof UniFlowError ? cause : unreadable(path, cause);
  }
  yield { line: rest, number: ++number };
}

async function* inTar(path: string, signal: AbortSignal | undefined): Items {
  yield* picturesOf(basename(path), tarEntries(path, signal), ({ offset, size }) => ({ path, offset, size }));
}

async function* inStream(name: string, stream: Readable, signal: AbortSignal | undefined): Items {
  const archive = new StreamBytes(name, signal ? addAbortSignal(signal, stream) : stream);
  yield* picturesOf(name, entriesIn(archive, signal), ({ offset, size }) => archive.read(offset, size));
}

/**
 * The pictures among a tar's entries: of those with one key that follow each other, the first. Keys end at the first dot, and `a.mask.png` is
 * something about `a.jpg`; where there is no `a.jpg`, it was meant as a picture.
 */
async function* picturesOf(name: string, entries: AsyncIterable<TarEntry>, open: (entry: TarEntry) => Picture | Promise<Picture>): Items {
  let [last, found, others]: [string | undefined, boolean, string[]] = [undefined, false, []];
  const notFound = (): Item[] => (found ? [] : others.map((other) => ({ id: `${name}/${other}`, image: { error: TWO_DOTS } })));
  for await (const entry of entries) {
    const { key, extension } = keyOf(entry.name) ?? {};
    if (key === undefined || extension === undefined) continue;
    if (key !== last) {
      yield* notFound();
      [last, found, others] = [key, false, []];
    }
    if (!isKeysPicture(extension)) others.push(...(isPicture(entry.name) ? [entry.name] : []));
    else if (!found) {
      found = true;
      yield { id: `${name}/${key}`, image: entry.error === undefined ? await open(entry) : { error: entry.error } };
    }
  }
  yield* notFound();
}

const TWO_DOTS = 'expected KEY.jpg or the like, but got a name with more dots: a key of WebDataset ends at the first';
