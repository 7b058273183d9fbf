/** Batches of pixels from a dataset, read ahead of the caller. A batch is a function of dataset, options and step: there is no state to save. */
import ndarray, { type NdArray } from 'ndarray';
import { checkInteger, checkOptions, describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import { prefetch } from '../prefetch.js';
import { decodeAhead } from '../images/decode-ahead.js';
import type { ImageSource, RgbImage } from '../images/decode.js';
import { checkSize } from '../images/input.js';
import { BOX_DRAWS, centerCrop, mirror, randomCrop, type Size } from '../images/crop.js';
import type { Dataset, Sample } from '../sources/dataset.js';
import { blockwisePermutation, permutation, uniforms } from './random.js';

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
const OPTIONS = [...Object.keys(DEFAULTS), 'batchSize', 'size', 'flip', 'shuffle', 'dropLast', 'signal'];
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
    try {
      yield* prefetch(this.steps(), this.options.prefetch, (step) => this.load(step));
    } finally {
      this.stop.abort();
    }
  }

  private *steps(): Generator<number, void, undefined> {
    const { from, epochs } = this.options;
    for (let step = from; step < epochs * this.stepsPerEpoch; step++) yield step;
  }

  private async load(step: number): Promise<Batch> {
    const { batchSize } = this.options;
    const epoch = Math.floor(step / this.stepsPerEpoch);
    const begin = (step % this.stepsPerEpoch) * batchSize;
    const [height, width] = this.size;
    const bytes = height * width * 3;
    const indices = [...this.orderOf(epoch).subarray(begin, begin + batchSize)];
    const pixels = new Uint8Array(indices.length * bytes);
    const places = indices.map((index, i) => new Place(this.dataset, index, pixels.subarray(i * bytes, (i + 1) * bytes)));
    const prepare = (image: ImageSource | RgbImage, place: Place): Promise<Place> => this.place(image, epoch, place);
    for await (const place of decodeAhead(places, { count: batchSize, prepare, signal: this.signal }))
      if ('error' in place) throw place.error;
    const known = places.map(({ sample }) => sample?.label);
    const labels = known.every((label) => label !== undefined) ? Int32Array.from(known) : undefined;
    return { pixels: ndarray(pixels, [places.length, height, width, 3]), labels, ids: places.map(({ id }) => id), step, epoch };
  }

  private orderOf(epoch: number): Uint32Array {
    if (this.order?.epoch === epoch) return this.order.indices;
    const { length, blocks } = this.dataset;
    const { seed, shuffle } = this.options;
    const indices = !shuffle
      ? Uint32Array.from({ length }, (_, i) => i)
      : blocks
        ? blockwisePermutation(length, blocks, seed, epoch)
        : permutation(length, seed, epoch);
    this.order = { epoch, indices };
    return indices;
  }

  /** Writes a sample's pixels. */
  private async place(image: ImageSource | RgbImage, epoch: number, place: Place): Promise<Place> {
    const { crop, flip, scale, seed } = this.options;
    const draws = uniforms(1 + BOX_DRAWS, seed, epoch, place.index);
    const mirrored = flip && (draws[0] as number) < 0.5;
    if (crop === 'random')
      place.into.set(await randomCrop(image, { size: this.size, scale, mirrored, draws: draws.subarray(1), signal: this.signal }));
    else {
      await centerCrop(image, this.size, place.into, this.signal);
      if (mirrored) place.into.set(await mirror(place.into, this.size));
    }
    return place;
  }
}

/** A sample, and its part of a batch. */
class Place {
  /** The sample's, once it is read. */
  id: string;
  sample: Sample | undefined;

  constructor(
    private readonly dataset: Dataset,
    readonly index: number,
    readonly into: Uint8Array,
  ) {
    this.id = `sample ${index}`;
  }

  readonly image = async (): Promise<ImageSource | RgbImage> => {
    this.sample = await this.dataset.read(this.index);
    this.id = this.sample.id;
    return this.sample.image;
  };
}

function checkLoader(options: LoaderOptions): Required<Omit<LoaderOptions, 'size' | 'signal'>> {
  checkOptions(options, OPTIONS);
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
