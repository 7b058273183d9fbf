/** Labelled images on disk: the items of a source with random access, identified by a hash. */
import { createHash } from 'node:crypto';
import { stat } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { basename } from 'node:path';
import { fileURLToPath } from 'node:url';
import { lastNotAbove } from '../bisect.js';
import { checkInteger, checkOptions, describe } from '../check.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { Lru } from '../lru.js';
import { prefetch } from '../prefetch.js';
import { readBytes, unreadable } from './files.js';
import type { Failed, Part } from './folder.js';
import { expandBraces, isGlob } from './glob.js';
import { isPixels, type ImageSource, type Item, type Reading, type RgbImage, type Skipped } from './item.js';
import { numberLabels, numberNames, type Labels } from './labels.js';
import { loadParquet } from './load-parquet.js';
import { formatOf } from './names.js';
import type { ImageGroups, ParquetImages } from './parquet.js';
import { readItemImage } from './read.js';
import { itemsIn, partsOf } from './source.js';

/** One image of a data set. */
export interface Sample {
  /** Position in the data set; independent of the data set's location. */
  id: string;
  /** Class, from 0. Either all samples of a data set have one, or none has. */
  label: number | undefined;
  /** An encoded image (the path of its file, or its bytes), or pixels if the data set stores them. */
  image: ImageSource | RgbImage;
}

/** Samples that are stored together: reading one reads its whole block. */
export interface Blocks {
  /** First sample of each block, from 0. */
  begins: Uint32Array;
  /** Number of blocks held in memory at once. */
  held: number;
}

/** The contents of a data set, with checked indices. */
export interface Samples {
  readonly length: number;
  /** label → name; undefined without labels, or if the labels are only numbers. */
  readonly classes: readonly string[] | undefined;
  /** Set if samples can only be read efficiently block by block; the training order then respects the blocks. */
  readonly blocks?: Blocks | undefined;
  /** Skipped files. */
  readonly skipped?: readonly Skipped[] | undefined;
  read(index: number): Sample | Promise<Sample>;
}

/** Options of {@link Dataset.hash}. */
export interface HashOptions {
  signal?: AbortSignal | undefined;
  onProgress?: ((done: number, total: number) => void) | undefined;
}

/** Labelled images in a fixed order; created by {@link openDataset} and {@link subset}. */
export interface Dataset extends Samples {
  read(index: number): Promise<Sample>;
  /** sha256 (hex) of the ids, labels and bytes of all samples in order: identifies the data of a training or evaluation. */
  hash(options?: HashOptions): Promise<string>;
  /** Releases its resources; later reads reject with `DISPOSED`. */
  close(): Promise<void>;
}

/** Options of {@link openDataset}. */
export interface OpenOptions {
  signal?: AbortSignal | undefined;
}

/**
 * Opens a data set from one path: anything that {@link openSource} reads and that allows random access.
 * - a folder of images. If all are in sub-folders, the first-level folder is the class.
 * - a `.txt`, `.csv` or `.tsv` list, with labels in the second column, or in the column named `label` by a header.
 * - an IDX file of images (MNIST: `train-images-idx3-ubyte`, also `.gz`), held in memory; labels from the `labels-idx1` file beside it.
 * - WebDataset: a `.tar`, a folder with `.tar`s, or several named by braces, `shard-{000..009}.tar`. Images `KEY.jpg` (or another format)
 *   with labels in `KEY.cls` or as `label` in `KEY.json`. Archives are indexed once and then read at their offsets.
 * - Parquet in the layout of Hugging Face data sets, one file or several: `image` or `img`, and `label`. Row groups are read as a whole.
 *
 * Labels that are all numbers are kept; others are numbered in the sorted order of their names.
 *
 * @throws {UniFlowError} `NOT_FOUND` if there are no images, or if a list names missing files; `UNSUPPORTED` for another kind of file;
 * `BAD_INPUT` for a damaged file, or if only some images of a list or tar have labels; `ABORTED`.
 */
export async function openDataset(path: string, options: OpenOptions = {}): Promise<Dataset> {
  if (typeof path !== 'string' || path === '') throw UniFlowError.expected('BAD_INPUT', 'path', 'the path of a dataset', describe(path));
  checkOptions(options, ['signal']);
  throwIfAborted(options.signal);
  return datasetOf(await samplesOf(path, options.signal));
}

async function samplesOf(path: string, signal: AbortSignal | undefined): Promise<Samples> {
  const skipped: Skipped[] = [];
  const reading: Reading = { signal, strict: true, skip: (file) => void skipped.push(file) };
  const isFolder = await checkKind(path);
  const collected = new Collected();
  // archives are indexed several at a time
  for await (const part of prefetch(partsOf(path, reading, false), availableParallelism(), (part) =>
    collect(part, reading, collected.groups),
  ))
    collected.add(part);
  if (collected.length === 0) throw UniFlowError.expected('NOT_FOUND', path, 'images', 'none');
  const { length } = collected;
  const stated = { subject: path, length, label: collected.label.bind(collected), id: collected.id.bind(collected) };
  // If some images are outside the sub-folders, the sub-folders are not classes, and no image has a label.
  const { labels, classes = collected.classes }: Labels = isFolder && collected.inFolders ? numberNames(stated) : numberLabels(stated);
  const read = async (i: number): Promise<Sample> => ({ id: collected.id(i), label: labels?.[i], image: await collected.image(i) });
  return { length, classes: labels && classes, blocks: collected.blocks(), skipped, read };
}

const KINDS = 'a folder, a list (.txt, .csv, .tsv, .jsonl), an IDX file of images (...-idx3-ubyte, .gz), a .tar or a .parquet';

/** @returns whether the path is a folder. @throws {UniFlowError} if it cannot hold several images. */
async function checkKind(path: string): Promise<boolean> {
  const info = await stat(path).catch((cause: unknown) => {
    if (isGlob(path) || expandBraces(path).length > 1) return undefined;
    throw unreadable(path, cause);
  });
  if (!info?.isDirectory() && formatOf(path) === 'image') throw UniFlowError.expected('UNSUPPORTED', path, KINDS, `'${basename(path)}'`);
  return info?.isDirectory() ?? false;
}

// ----- collecting -----------------------------------------------------------------------------------------------

/** The samples of one file. */
type Segment =
  { items: readonly Item[]; inFolders: boolean } | { table: ParquetImages; prefix: string; labels: (row: number) => string | undefined };

async function collect(part: Part | Failed | Item, reading: Reading, groups: ImageGroups): Promise<Segment> {
  if ('error' in part) throw part.error;
  if (!('format' in part)) return { items: [part], inFolders: false };
  if (part.format === 'parquet') {
    const table = await (await loadParquet()).ParquetImages.open(part.path, { groups });
    return { table, prefix: part.prefix, labels: await table.labels(reading.signal) };
  }
  const items: Item[] = [];
  for await (const item of itemsIn(part, reading))
    if (typeof item.image === 'object' && 'error' in item.image) reading.skip({ path: item.id, reason: item.image.error, lost: true });
    else items.push(item);
  return { items, inFolders: part.format === 'image' };
}

/** Memory for image blocks that a training order interleaves. The read-ahead uses the same amount again. */
const HELD_BYTES = 128 * 2 ** 20;

/** Concatenated segments. */
class Collected {
  private readonly segments: Segment[] = [];
  private readonly begins: number[] = [];
  readonly groups: ImageGroups = new Lru(2);
  length = 0;
  /** Whether all images are separate files in class folders. */
  inFolders = true;

  add(segment: Segment): void {
    const count = 'table' in segment ? segment.table.length : segment.items.length;
    if (count === 0) return;
    this.inFolders &&= 'items' in segment && segment.inFolders;
    const last = this.segments.at(-1);
    if (last && 'items' in last && 'items' in segment) (last.items as Item[]).push(...segment.items);
    else {
      this.segments.push(segment);
      this.begins.push(this.length);
    }
    this.length += count;
  }

  id(i: number): string {
    const [segment, row] = this.at(i);
    if ('items' in segment) return (segment.items[row] as Item).id;
    const id = segment.table.idOf(row);
    return segment.prefix === '.' ? id : `${segment.prefix}/${id}`;
  }

  label(i: number): string | undefined {
    const [segment, row] = this.at(i);
    return 'items' in segment ? segment.items[row]?.label : segment.labels(row);
  }

  async image(i: number): Promise<ImageSource | RgbImage> {
    const [segment, row] = this.at(i);
    return 'items' in segment ? readItemImage((segment.items[row] as Item).image, {}) : segment.table.read(row);
  }

  /** Classes of the tables; undefined if they differ. */
  get classes(): readonly string[] | undefined {
    const all = this.segments.map((segment) => ('table' in segment ? segment.table.classes : undefined));
    return all.every((classes) => classes?.join('\n') === all[0]?.join('\n')) ? all[0] : undefined;
  }

  /** Row groups as blocks; undefined unless all samples are in Parquet files. */
  blocks(): Blocks | undefined {
    const tables = this.segments.flatMap((segment) => ('table' in segment ? [segment.table] : []));
    if (tables.length < this.segments.length) return undefined;
    const begins = tables.flatMap(({ begins }, i) => begins.map((begin) => begin + (this.begins[i] as number)));
    const bytes = tables.reduce((sum, table) => sum + table.bytes, 0);
    const held = Math.min(begins.length, Math.max(1, Math.floor((HELD_BYTES * begins.length) / Math.max(1, bytes))));
    this.groups.capacity = 2 * held;
    return { begins: Uint32Array.from(begins), held };
  }

  private at(i: number): [segment: Segment, row: number] {
    const segment = lastNotAbove(this.begins, i);
    return [this.segments[segment] as Segment, i - (this.begins[segment] as number)];
  }
}

/**
 * The samples at `indices`, in that order: a held-out split, or the first samples of a large set. It reads from `dataset`, which must stay
 * open; closing the subset does not close it.
 */
export function subset(dataset: Dataset, indices: readonly number[]): Dataset {
  if (!Array.isArray(indices)) throw UniFlowError.expected('BAD_INPUT', 'indices', 'an array', describe(indices));
  const kept = Uint32Array.from(indices, (index: number, i) => {
    checkInteger(`indices[${i}]`, index, 0, dataset.length - 1);
    return index;
  });
  return datasetOf({
    length: kept.length,
    classes: dataset.classes,
    skipped: dataset.skipped,
    read: (i) => dataset.read(kept[i] as number),
  });
}

function datasetOf(source: Samples): Dataset {
  let samples: Samples | undefined = source;
  const { length, classes, blocks, skipped } = source;
  const read = async (index: number): Promise<Sample> => {
    checkInteger('index', index, 0, length - 1);
    if (!samples) throw new UniFlowError('DISPOSED', 'the dataset has been closed');
    return samples.read(index);
  };
  const close = (): Promise<void> => {
    samples = undefined;
    return Promise.resolve();
  };
  return { length, classes, blocks, skipped, read, close, hash: (options) => hashOf({ length, classes, read }, options) };
}

async function hashOf(samples: Samples, options: HashOptions = {}): Promise<string> {
  checkOptions(options, ['signal', 'onProgress']);
  const { signal, onProgress } = options;
  const hash = createHash('sha256');
  for (let i = 0; i < samples.length; i++) {
    throwIfAborted(signal);
    const { id, label, image } = await samples.read(i);
    const bytes = await bytesOf(image);
    hash.update(`${JSON.stringify([id, label ?? null, bytes.length])}\n`).update(bytes);
    onProgress?.(i + 1, samples.length);
  }
  return hash.digest('hex');
}

function bytesOf(image: Sample['image']): Uint8Array | Promise<Uint8Array> {
  if (image instanceof Uint8Array) return image;
  return isPixels(image) ? image.data : readBytes(image instanceof URL ? fileURLToPath(image) : image);
}
