/** Batches of pixels from a dataset, prefetched. A batch is a function of dataset, options and step, so there is no state to save. */
import ndarray, { type NdArray } from 'ndarray';
import { checkInteger, checkOptions, describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import { prefetch } from '../prefetch.js';
import { decodeAhead } from '../images/decode-ahead.js';
import { decodeImage, type ImageSource, type RgbImage } from '../images/decode.js';
import { Lru } from '../lru.js';
import { checkSize } from '../images/input.js';
import { BOX_DRAWS, centerCrop, mirror, randomCrop, type Size } from '../images/crop.js';
import type { Dataset, Sample } from '../sources/dataset.js';
import { blockwisePermutation, permutation, uniforms } from './random.js';

/** Options of {@link batches}. */
export interface LoaderOptions {
  batchSize: number;
  /** Height and width of the pixels; a number means a square. */
  size: number | readonly [number, number];
  /** Seed of the order, the crops and the flips. Default 0. */
  seed?: number | undefined;
  /**
   * 'random', for training: torchvision's random resized crop. 'center', for evaluation: the crop of {@link UniFlow.encode}, byte for byte.
   * Default 'random'.
   */
  crop?: 'random' | 'center' | undefined;
  /** Range of the crop's share of the image's area. Default [0.08, 1]. */
  scale?: readonly [number, number] | undefined;
  /** Mirrors half of the samples, at random. Default: with random crops. */
  flip?: boolean | undefined;
  /** A new order in each epoch. Default: with random crops. */
  shuffle?: boolean | undefined;
  /** Drops an epoch's last batch if it is not full. A batch never mixes samples of two epochs. Default: with random crops. */
  dropLast?: boolean | undefined;
  /** Number of batches prepared while the caller uses one. Default 2. */
  prefetch?: number | undefined;
  /** First step. Default 0. */
  from?: number | undefined;
  /** Number of passes through the dataset, counted from step 0. Default: unlimited. */
  epochs?: number | undefined;
  signal?: AbortSignal | undefined;
  /**
   * Called for each sample that cannot be read or decoded, every time it occurs. With random crops, the next readable sample of the epoch's order takes its
   * place; with centre crops, it is left out. Default: the iteration rejects.
   */
  onDamaged?: ((damaged: Damaged) => void) | undefined;
}

/** A sample that cannot be read or decoded, and the error. */
export interface Damaged {
  index: number;
  id: string;
  error: UniFlowError;
}

/** Samples of one step. */
export interface Batch {
  /** [B,H,W,3]. */
  pixels: NdArray<Uint8Array>;
  /** [B]; undefined if the dataset has none. */
  labels: Int32Array | undefined;
  ids: string[];
  step: number;
  /** Starts at 0. */
  epoch: number;
}

const DEFAULTS = { seed: 0, crop: 'random', scale: [0.08, 1], prefetch: 2, from: 0, epochs: Infinity } as const;
const OPTIONS = [...Object.keys(DEFAULTS), 'batchSize', 'size', 'flip', 'shuffle', 'dropLast', 'signal', 'onDamaged'];
const MAX_BATCH = 65536;
const MAX_PREFETCH = 64;
/** Memory for decoded images: 340 of 512 x 512. */
const DECODED_BYTES = 2 ** 28;
/** After this many damaged samples in a row, the data is assumed to be missing rather than damaged. */
const MAX_DAMAGED = 100;

/**
 * Yields the batches of steps `from`, `from` + 1, ... Images are decoded on as many threads as there are cores (libuv has 4 unless UV_THREADPOOL_SIZE says
 * otherwise). Ends after the last epoch, or when the caller leaves the loop; no work is in progress after that.
 *
 * @throws {UniFlowError} `BAD_INPUT` at once for invalid options. The iteration rejects with `ABORTED` and, unless `onDamaged` is given, with the error of an
 * unreadable image, with its name, at the batch that contains it.
 */
export function batches(
  dataset: Pick<Dataset, 'length' | 'read' | 'blocks'>,
  options: LoaderOptions,
): AsyncGenerator<Batch, void, undefined> {
  return new Loader(dataset, options).run();
}

class Loader {
  private readonly options: CheckedOptions;
  private readonly size: Size;
  private readonly stepsPerEpoch: number;
  private readonly stop = new AbortController();
  private readonly signal: AbortSignal;
  private order: { epoch: number; indices: Uint32Array } | undefined;
  /** Decoded images by index, for later epochs, because decoding a PNG takes longer than a training step of a small model. */
  private readonly decoded = new Lru<RgbImage>(DECODED_BYTES, ({ data }) => data.length);

  constructor(
    private readonly dataset: Pick<Dataset, 'length' | 'read' | 'blocks'>,
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
      for await (const batch of prefetch(this.steps(), this.options.prefetch, (step) => this.load(step)))
        if (batch.ids.length > 0) yield batch;
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
    const order = this.orderOf(epoch);
    const count = Math.min(batchSize, order.length - begin);
    const pixels = new Uint8Array(count * bytes);
    const places = Array.from(
      { length: count },
      (_, i) => new Place(this.dataset, order, begin + i, pixels.subarray(i * bytes, (i + 1) * bytes)),
    );
    await this.fill(places, epoch);
    let end = 0;
    for (const [i, { sample }] of places.entries()) if (sample) pixels.copyWithin(bytes * end++, i * bytes, (i + 1) * bytes); // closes the gaps
    const samples = places.flatMap(({ sample }) => (sample ? [sample] : []));
    const labels = samples.every(({ label }) => label !== undefined) ? Int32Array.from(samples, ({ label }) => label as number) : undefined;
    return {
      pixels: ndarray(pixels.subarray(0, end * bytes), [end, height, width, 3]),
      labels,
      ids: samples.map(({ id }) => id),
      step,
      epoch,
    };
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

  /**
   * Fills the places. With random crops, a damaged sample is replaced by the next one of the order; the result is a function of order, epoch, position and
   * data. With centre crops, it is left out.
   */
  private async fill(places: readonly Place[], epoch: number): Promise<void> {
    const { onDamaged, crop, batchSize: count } = this.options;
    const prepare = (image: ImageSource | RgbImage, place: Place): Promise<Place> => this.place(image, epoch, place);
    for (let tried = 1; places.length > 0; tried++) {
      const damaged: Place[] = [];
      let at = 0;
      for await (const result of decodeAhead(places, { count, prepare, signal: this.signal })) {
        const place = places[at++] as Place;
        if (!('error' in result)) continue;
        const { error } = result;
        if (!onDamaged || !isDamage(error)) throw error;
        place.sample = undefined;
        onDamaged({ index: place.index, id: place.id, error });
        if (crop === 'center') continue;
        if (tried === Math.min(MAX_DAMAGED, this.dataset.length))
          throw new UniFlowError(error.code, `none of ${tried} samples in a row can be read; the last: ${error.message}`, { cause: error });
        place.advance();
        damaged.push(place);
      }
      places = damaged;
    }
  }

  /** Writes a sample's pixels. */
  private async place(image: ImageSource | RgbImage, epoch: number, place: Place): Promise<Place> {
    const { crop, flip, scale, seed } = this.options;
    const draws = uniforms(1 + BOX_DRAWS, seed, epoch, place.index);
    const mirrored = flip && (draws[0] as number) < 0.5;
    if (crop === 'random') {
      const decode = (source: ImageSource | RgbImage): Promise<RgbImage> =>
        this.decoded.get(place.index, () => decodeImage(source, { signal: this.signal }));
      const options = { size: this.size, scale, mirrored, draws: draws.subarray(1), decode, signal: this.signal };
      place.into.set(await randomCrop(this.decoded.has(place.index) ? await decode(image) : image, options));
    } else {
      await centerCrop(image, this.size, place.into, this.signal);
      if (mirrored) place.into.set(await mirror(place.into, this.size));
    }
    return place;
  }
}

/** Whether an error is the fault of a sample rather than of the work. */
function isDamage(error: UniFlowError): boolean {
  return ['BAD_INPUT', 'UNSUPPORTED', 'NOT_FOUND'].includes(error.code);
}

/** A place in a batch, and the sample that fills it. */
class Place {
  id = '';
  /** The sample that was read; undefined if left out. */
  sample: Sample | undefined;

  constructor(
    private readonly dataset: Pick<Dataset, 'read'>,
    private readonly order: Uint32Array,
    private position: number,
    readonly into: Uint8Array,
  ) {}

  get index(): number {
    return this.order[this.position % this.order.length] as number;
  }

  /** Moves on to the next sample of the order. */
  advance(): void {
    this.position++;
  }

  readonly image = async (): Promise<ImageSource | RgbImage> => {
    this.sample = undefined;
    this.id = `sample ${this.index}`;
    const sample = await this.dataset.read(this.index);
    this.id = sample.id;
    this.sample = sample;
    return sample.image;
  };
}

type CheckedOptions = Required<Omit<LoaderOptions, 'size' | 'signal' | 'onDamaged'>> & Pick<LoaderOptions, 'onDamaged'>;

function checkLoader(options: LoaderOptions): CheckedOptions {
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
