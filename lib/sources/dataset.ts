/** Labelled pictures on disk, whatever holds them: opened by what the path is, read one at a time, pinned by a hash. */
import { createHash } from 'node:crypto';
import { readdir, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { checkInteger, checkOptions, describe } from '../check.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import type { ImageSource, RgbImage } from '../images/decode.js';
import { readBytes, unreadable } from './files.js';
import { openFolder } from './folder.js';
import { isIdx, openIdx } from './idx.js';
import { isList, openList } from './list.js';
import { expandBraces, isTar, openTars } from './webdataset.js';

/** One picture of a dataset. */
export interface Sample {
  /** Where in the dataset it is; does not depend on where the dataset is. */
  id: string;
  /** From 0. All samples of a dataset have one, or none has. */
  label: number | undefined;
  /** An encoded picture (the path of its file, or its bytes), or pixels where the dataset holds them. */
  image: ImageSource | RgbImage;
}

/** What a kind of dataset has to say; indices are checked. */
export interface Samples {
  readonly length: number;
  /** label → name; undefined without labels, or where they are numbers only. */
  readonly classes: readonly string[] | undefined;
  read(index: number): Sample | Promise<Sample>;
}

/** Of {@link Dataset.hash}. */
export interface HashOptions {
  signal?: AbortSignal | undefined;
  onProgress?: ((done: number, total: number) => void) | undefined;
}

/** Labelled pictures in a fixed order; made by {@link openDataset} and {@link subset}. */
export interface Dataset extends Samples {
  read(index: number): Promise<Sample>;
  /** sha256 (hex) of the ids, labels and bytes of all samples in order: pins what was trained or evaluated on. */
  hash(options?: HashOptions): Promise<string>;
  /** Lets go of what it holds; reading then rejects with `DISPOSED`. */
  close(): Promise<void>;
}

/** Of {@link openDataset}. */
export interface OpenOptions {
  signal?: AbortSignal | undefined;
}

/**
 * Opens a dataset by what `path` is:
 * - a folder: the pictures in it, at any depth, sorted by name. If all are in sub-folders, the first-level one is the class.
 * - a `.txt`, `.csv` or `.tsv` list: a path a line, relative to the list's folder, and optionally, after a tab or comma, a label.
 * - an IDX file of pictures (MNIST: `train-images-idx3-ubyte`, also `.gz`), held in memory; labels from the `labels-idx1` file beside it.
 * - WebDataset: a `.tar`, a folder with `.tar`s, or several named by braces, `shard-{000..009}.tar`. Pictures `KEY.jpg` (or another format)
 *   with labels in `KEY.cls` or as `label` in `KEY.json`. They are indexed once, and then read at their offsets.
 *
 * Labels that are all numbers stay what they are; others are numbered in the order of the sorted names.
 *
 * @throws {UniFlowError} `NOT_FOUND` where there is nothing, or a list names what is not there; `UNSUPPORTED` for another kind of file;
 * `BAD_INPUT` for a damaged one, or a list or tar with labels for some of its pictures only; `ABORTED`.
 */
export async function openDataset(path: string, options: OpenOptions = {}): Promise<Dataset> {
  if (typeof path !== 'string' || path === '') throw UniFlowError.expected('BAD_INPUT', 'path', 'the path of a dataset', describe(path));
  checkOptions(options);
  throwIfAborted(options.signal);
  return datasetOf(await openSamples(path, options.signal));
}

async function openSamples(path: string, signal: AbortSignal | undefined): Promise<Samples> {
  if (isTar(path)) return openTars(expandBraces(path), signal);
  const info = await stat(path).catch((cause: unknown) => {
    throw unreadable(path, cause);
  });
  if (info.isDirectory()) {
    const tars = (await readdir(path)).filter(isTar).sort();
    return tars.length > 0
      ? openTars(
          tars.map((name) => join(path, name)),
          signal,
        )
      : openFolder(path, signal);
  }
  if (isIdx(path)) return openIdx(path);
  if (isList(path)) return openList(path, signal);
  const expected = 'a folder, a list (.txt, .csv, .tsv), an IDX file of pictures (...-idx3-ubyte, .gz) or a .tar';
  throw UniFlowError.expected('UNSUPPORTED', path, expected, `'${basename(path)}'`);
}

/**
 * The samples at `indices`, in that order: a held-out split, or the first so many. Reads from `dataset`, which has to stay open;
 * closing the subset does not close it.
 */
export function subset(dataset: Dataset, indices: readonly number[]): Dataset {
  if (!Array.isArray(indices)) throw UniFlowError.expected('BAD_INPUT', 'indices', 'an array', describe(indices));
  const kept = Uint32Array.from(indices, (index: number, i) => {
    checkInteger(`indices[${i}]`, index, 0, dataset.length - 1);
    return index;
  });
  return datasetOf({ length: kept.length, classes: dataset.classes, read: (i) => dataset.read(kept[i] as number) });
}

function datasetOf(source: Samples): Dataset {
  let samples: Samples | undefined = source;
  const { length, classes } = source;
  const read = async (index: number): Promise<Sample> => {
    checkInteger('index', index, 0, length - 1);
    if (!samples) throw new UniFlowError('DISPOSED', 'the dataset has been closed');
    return samples.read(index);
  };
  const close = (): Promise<void> => {
    samples = undefined;
    return Promise.resolve();
  };
  return { length, classes, read, close, hash: (options) => hashOf({ length, classes, read }, options) };
}

async function hashOf(samples: Samples, options: HashOptions = {}): Promise<string> {
  checkOptions(options);
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
  return typeof image === 'object' && 'data' in image ? image.data : readBytes(image instanceof URL ? fileURLToPath(image) : image);
}
