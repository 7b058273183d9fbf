/** Batches of pixels from a dataset, read ahead of the caller. A batch is a function of dataset, options and step: there is no state to save. */
import ndarray, { type NdArray } from 'ndarray';
import pLimit, { type LimitFunction } from 'p-limit';
import { handled } from '../ahead.js';
import { checkInteger, checkOptions, describe } from '../check.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { DECODERS } from '../images/decode.js';
import { checkSize } from '../images/input.js';
import { BOX_DRAWS, centerCrop, mirror, randomCrop, type Size } from '../images/crop.js';
import type { Dataset, Sample } from '../sources/dataset.js';
import { permutation, uniforms } from './random.js';

/** Of {@link batches}. */
export interface LoaderOptions {
  batchSize: number;
  /** Height and width of the pixels; a number means a square. */
  size: number | readonly [number, number];
  /** Of the order, the crops and the flips. Default 0. */
  seed?: number | undefined;
  /**
   * 'random', for training: torchvision's random resized crop. 'center', for evaluation: the crop of {@link UniFlow.encode}, byte for byte.
   * Default 'random'.
   */
  crop?: 'random' | 'center' | undefined;
  /** Range of a random crop's share of the picture's area. Default [0.08, 1]. */
  scale?: readonly [number, number] | undefined;
  /** Mirrors every other sample, at random. Default: with random crops. */
  flip?: boolean | undefined;
  /** A new order in each epoch. Default: with random crops. */
  shuffle?: boolean | undefined;
  /** Leaves out an epoch's last batch where it is not full. A batch never has samples of two epochs. Default: with random crops. */
  dropLast?: boolean | undefined;
  /** Batches that are made while the caller works on one. Default 2. */
  prefetch?: number | undefined;
  /** The step to begin with. Default 0. */
  from?: number | undefined;
  /** How often to go through the dataset, counted from step 0. Default: for ever. */
  epochs?: number | undefined;
  signal?: AbortSignal | undefined;
}

/** Samples side by side. */
export interface Batch {
  /** [B,H,W,3]. */
  pixels: NdArray<Uint8Array>;
  /** [B]; undefined where the dataset has none. */
  labels: Int32Array | undefined;
  ids: string[];
  step: number;
  /** From 0. */
  epoch: number;
}

const DEFAULTS = { seed: 0, crop: 'random', scale: [0.08, 1], prefetch: 2, from: 0, epochs: Infinity } as const;
const MAX_BATCH = 65536;
const MAX_PREFETCH = 64;

/**
 * The batches of steps `from`, `from` + 1, ... Pictures are decoded on as many threads as there are cores (libuv has 4 unless
 * UV_THREADPOOL_SIZE says otherwise). Ends when the epochs do, or when the caller leaves the loop; nothing of it is under way then.
 *
 * @throws {UniFlowError} `BAD_INPUT` at once for bad options. The iteration rejects with `ABORTED`, and, at the batch it belongs to, with
 * what is wrong with a picture, by name.
 */
export function batches(dataset: Dataset, options: LoaderOptions): AsyncGenerator<Batch, void, undefined> {
  return new Loader(dataset, options).run();
}

class Loader {
  private readonly options: Required<Omit<LoaderOptions, 'size' | 'signal'>>;
  private readonly size: Size;
  private readonly stepsPerEpoch: number;
  private readonly stop = new AbortController();
  private readonly signal: AbortSignal;
  private readonly limit: LimitFunction = pLimit(DECODERS);
  private order: { epoch: number; indices: Uint32Array } | undefined;

  constructor(
    private readonly dataset: Dataset,
    options: LoaderOptions,
  ) {
    this.options = checkLoader(options);
    this.size = checkSize(options.size, 1);
    this.signal = options.signal ? AbortSignal.any([options.signal, this.stop.signal]) : this.stop.signal;
    const { batchSize, dropLast } = this.options;
    this.stepsPerEpoch = dropLast ? Math.floor(dataset.length / batchSize) : Math.ceil(dataset.length / batchSize);
    if (this.stepsPerEpoch === 0)
      throw UniFlowError.expected('BAD_INPUT', 'dataset', `at least ${dropLast ? batchSize : 1} samples (a batch)`, `${dataset.length}`);
  }

  async *run(): AsyncGenerator<Batch, void, undefined> {
    const { from, epochs, prefetch } = this.options;
    const end = epochs * this.stepsPerEpoch;
    const ahead: Promise<Batch>[] = [];
    try {
      for (let next = from; ;) {
        for (; ahead.length <= prefetch && next < end; next++) ahead.push(handled(this.load(next)));
        const batch = ahead.shift();
        if (!batch) return;
        yield await batch;
      }
    } finally {
      this.stop.abort();
      await Promise.allSettled(ahead);
    }
  }

  private async load(step: number): Promise<Batch> {
    const { batchSize } = this.options;
    const epoch = Math.floor(step / this.stepsPerEpoch);
    const begin = (step % this.stepsPerEpoch) * batchSize;
    const indices = [...this.orderOf(epoch).subarray(begin, begin + batchSize)];
    const [height, width] = this.size;
    const bytes = height * width * 3;
    const pixels = new Uint8Array(indices.length * bytes);
    const made = indices.map((index, i) => this.limit(() => this.place(index, epoch, pixels.subarray(i * bytes, (i + 1) * bytes))));
    await Promise.allSettled(made); // one that fails leaves none of the others at work
    const samples = await Promise.all(made);
    const labels = samples.every(({ label }) => label !== undefined) ? Int32Array.from(samples, ({ label }) => label as number) : undefined;
    return { pixels: ndarray(pixels, [indices.length, height, width, 3]), labels, ids: samples.map(({ id }) => id), step, epoch };
  }

  private orderOf(epoch: number): Uint32Array {
    if (this.order?.epoch === epoch) return this.order.indices;
    const { length } = this.dataset;
    const { seed, shuffle } = this.options;
    const indices = shuffle ? permutation(length, seed, epoch) : Uint32Array.from({ length }, (_, i) => i);
    this.order = { epoch, indices };
    return indices;
  }

  /** Writes a sample's pixels. */
  private async place(index: number, epoch: number, into: Uint8Array): Promise<Sample> {
    throwIfAborted(this.signal);
    const { crop, flip, scale, seed } = this.options;
    const sample = await this.dataset.read(index);
    const draws = uniforms(1 + BOX_DRAWS, seed, epoch, index);
    const mirrored = flip && (draws[0] as number) < 0.5;
    try {
      if (crop === 'random')
        into.set(await randomCrop(sample.image, { size: this.size, scale, mirrored, draws: draws.subarray(1), signal: this.signal }));
      else {
        await centerCrop(sample.image, this.size, into, this.signal);
        if (mirrored) into.set(await mirror(into, this.size));
      }
    } catch (error) {
      throw named(error, sample.id);
    }
    return sample;
  }
}

/** Pictures that are no files of their own are named by their id. */
function named(error: unknown, id: string): unknown {
  if (!(error instanceof UniFlowError) || error.subject !== '<buffer>') return error;
  return new UniFlowError(error.code, error.message.replace('<buffer>', id), { ...error, subject: id, cause: error.cause });
}

function checkLoader(options: LoaderOptions): Required<Omit<LoaderOptions, 'size' | 'signal'>> {
  checkOptions(options);
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as unknown as LoaderOptions;
  const training = (given.crop ?? DEFAULTS.crop) === 'random';
  const all = { ...DEFAULTS, shuffle: training, flip: training, dropLast: training, ...given };
  if (all.crop !== 'random' && all.crop !== 'center')
    throw UniFlowError.expected('BAD_INPUT', 'crop', "'random' or 'center'", describe(all.crop));
  checkInteger('batchSize', all.batchSize, 1, MAX_BATCH);
  checkInteger('seed', all.seed, 0, Number.MAX_SAFE_INTEGER);
  checkInteger('prefetch', all.prefetch, 0, MAX_PREFETCH);
  checkInteger('from', all.from, 0, Number.MAX_SAFE_INTEGER);
  if (all.epochs !== Infinity) checkInteger('epochs', all.epochs, 1, Number.MAX_SAFE_INTEGER);
  const [low, high] = Array.isArray(all.scale) ? (all.scale as readonly number[]) : [];
  if (!(Number(low) > 0 && Number(low) <= Number(high) && Number(high) <= 1))
    throw UniFlowError.expected('BAD_INPUT', 'scale', 'a range within (0, 1]', JSON.stringify(all.scale));
  return all;
}
