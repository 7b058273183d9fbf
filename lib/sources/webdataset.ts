/** WebDataset: tar archives in which files with the same name up to the first dot form a sample. */
import { createReadStream } from 'node:fs';
import { basename } from 'node:path';
import { addAbortSignal, type Readable } from 'node:stream';
import { createGunzip } from 'node:zlib';
import { UniFlowError } from '../errors.js';
import { StreamBytes } from './files.js';
import type { Items, ItemImage, Reading } from './item.js';
import { isImageName } from './names.js';
import { entriesIn, readEntry, tarEntries, type TarEntry } from './tar.js';

/** The key, which may include folders, and the extension. Some archives start all names with './'. */
const NAME = /^(?:\.\/)?((?:.*\/)?[^./]+)\.([^/]*)$/;

/** A file's key and its extension in lower case; undefined if it has no extension. */
function keyOf(name: string): { key: string; extension: string } | undefined {
  const [, key, extension] = NAME.exec(name) ?? [];
  return key === undefined || extension === undefined ? undefined : { key, extension: extension.toLowerCase() };
}

/** Whether an entry with this extension is the image of its key. `a.mask.png`, for example, is only a companion of `a.jpg`. */
function isKeysImage(extension: string): boolean {
  return isImageName(`.${extension}`) && !extension.includes('.');
}

/** An archive, with functions that read an entry's content. */
interface Archive {
  name: string;
  entries: AsyncIterable<TarEntry>;
  /** Opens the image of an entry. */
  open: (entry: TarEntry) => ItemImage | Promise<ItemImage>;
  text: (entry: TarEntry) => Promise<string>;
}

/** The images of a `.tar`, by their offsets. */
export async function* inTar(path: string, reading: Reading): Items {
  yield* imagesOf(
    {
      name: path,
      entries: tarEntries(path, reading.signal),
      open: ({ offset, size }) => ({ path, offset, size }),
      text: async (entry) => (await readEntry(path, entry)).toString(),
    },
    basename(path),
    reading,
  );
}

/** The images of a `.tar.gz`, with their bytes. */
export async function* inZippedTar(path: string, reading: Reading): Items {
  if (reading.strict)
    throw UniFlowError.expected('UNSUPPORTED', path, 'a .tar, which can be read in any order', 'a zipped one (gunzip it first)');
  const file = createReadStream(path);
  const unzipped = createGunzip();
  file.on('error', (error) => unzipped.destroy(error)).pipe(unzipped);
  try {
    yield* inTarStream(path, unzipped, reading);
  } finally {
    file.destroy();
    unzipped.destroy();
  }
}

/** The images of a tar stream, with their bytes. */
export async function* inTarStream(name: string, stream: Readable, reading: Reading): Items {
  const { signal } = reading;
  const archive = new StreamBytes(name, signal ? addAbortSignal(signal, stream) : stream);
  const read = ({ offset, size }: TarEntry): Promise<Buffer> => archive.read(offset, size);
  const text = async (entry: TarEntry): Promise<string> => (await read(entry)).toString();
  try {
    yield* imagesOf({ name, entries: entriesIn(archive, signal), open: read, text }, basename(name), reading);
  } finally {
    await archive.close();
  }
}

/** The entries of one key. */
interface Sample {
  key: string;
  image?: ItemImage;
  /** Names of further images with the same key. */
  others: string[];
  /** Entries that are not images. */
  parts: string[];
  label?: TarEntry;
}

/** Yields the first image of each key. Others are skipped and reported. */
async function* imagesOf(archive: Archive, name: string, reading: Reading): Items {
  let none = true;
  for await (const sample of samplesOf(archive, reading)) {
    const { key, image, others, parts, label } = sample;
    if (image !== undefined) {
      none = false;
      yield { id: `${name}/${key}`, image, label: label && (await labelOf(archive, label)) };
      continue;
    }
    for (const other of others) {
      none = false;
      yield { id: `${name}/${other}`, image: { error: TWO_DOTS } };
    }
    if (others.length === 0)
      for (const part of parts)
        reading.skip({ path: `${archive.name}/${part}`, reason: 'not an image, and no image has its key', lost: false });
  }
  if (none) throw UniFlowError.expected('NOT_FOUND', archive.name, 'images (KEY.jpg, KEY.png, ...)', 'none');
}

const TWO_DOTS = 'expected KEY.jpg or the like, but got a name with more dots: a key of WebDataset ends at the first';

/** Groups consecutive entries into samples; for a data set, entries of a key are combined even if they are not adjacent. */
async function* samplesOf(archive: Archive, reading: Reading): AsyncGenerator<Sample, void, undefined> {
  const samples = new Map<string, Sample>(); // all samples of a data set, else only the last
  try {
    for await (const entry of archive.entries) {
      const { key, extension } = keyOf(entry.name) ?? {};
      if (key === undefined || extension === undefined) {
        skipNameless(archive, entry, reading);
        continue;
      }
      if (!reading.strict && !samples.has(key)) {
        yield* samples.values();
        samples.clear();
      }
      const sample = samples.get(key) ?? { key, others: [], parts: [] };
      samples.set(key, sample);
      await add(sample, entry, extension, archive, reading);
    }
  } catch (error) {
    if (!reading.strict) yield* samples.values(); // what came before the damage
    throw error;
  }
  yield* samples.values();
}

function skipNameless({ name }: Archive, entry: TarEntry, { skip }: Reading): void {
  if (!basename(entry.name).startsWith('.')) skip({ path: `${name}/${entry.name}`, reason: 'a name without extension', lost: true });
}

async function add(sample: Sample, entry: TarEntry, extension: string, archive: Archive, reading: Reading): Promise<void> {
  if (isKeysImage(extension)) {
    const path = `${archive.name}/${entry.name}`;
    if (sample.image === undefined) sample.image = entry.error === undefined ? await archive.open(entry) : { error: entry.error };
    else reading.skip({ path, reason: `another image of the key ${sample.key}`, lost: true });
  } else if (isImageName(entry.name)) sample.others.push(entry.name);
  else {
    sample.parts.push(entry.name);
    if (reading.strict && (extension === 'cls' || (extension === 'json' && !sample.label))) sample.label = entry;
  }
}

async function labelOf(archive: Archive, entry: TarEntry): Promise<string | undefined> {
  const text = await archive.text(entry);
  if (entry.name.toLowerCase().endsWith('.cls')) return text.trim() || undefined;
  try {
    const { label } = JSON.parse(text) as { label?: unknown };
    return typeof label === 'number' || typeof label === 'string' ? String(label) : undefined;
  } catch (cause) {
    throw UniFlowError.expected('BAD_INPUT', `${archive.name}: ${entry.name}`, 'JSON', `'${text.slice(0, 40)}'`, cause);
  }
}
