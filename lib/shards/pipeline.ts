/** Runs a model on a stream of images: decodes several at once into recycled buffers, and computes batches of one shape. */
import ndarray from 'ndarray';
import { ignoreRejection } from '../prefetch.js';
import { checkBatchSize } from '../gather.js';
import { decodeAhead, type DecodeFailure } from '../images/decode-ahead.js';
import { DECODERS, openImage } from '../images/decode.js';
import { checkSize, type InputOptions, type PixelInput } from '../images/input.js';
import type { Preprocessing } from '../io/preprocess.js';
import { gridOf } from '../tensor.js';
import type { EncodeOptions, Encoded, UniFlowModel } from '../model.js';
import { Buffers } from '../images/buffers.js';
import type { DownloadOptions } from '../sources/url.js';
import { checkFit, pixelSize, place, placementOf, type Fit, type Placement, type Target } from '../images/fit.js';
import { Meter } from './meter.js';
import type { ImageSource, Item, RgbImage } from '../sources/item.js';

/** Options for reading images. */
export interface PipelineOptions extends InputOptions {
  /** Images computed together. Default: as many as make up about 4,096 tokens. */
  batchSize?: number | undefined;
  /** How images of another shape are fitted to the model's. Default: crop. */
  fit?: Fit | undefined;
  download?: Omit<DownloadOptions, 'signal'> | undefined;
}

/** Options for reading and encoding images. */
export interface EncodePipelineOptions extends EncodeOptions, Omit<PipelineOptions, keyof EncodeOptions> {}

/** A model as a pipeline runs it: its input, and its results for a batch of images. */
export interface BatchModel<R> {
  device: string;
  patch: number;
  preprocessing: Preprocessing;
  run(pixels: PixelInput, options: { batchSize: number; signal?: AbortSignal }): Promise<R>;
}

/** Metadata of an encoded image. */
export interface PictureRecord extends Placement {
  id: string;
  /** Size in pixels, after applying the EXIF orientation. */
  width: number;
  height: number;
}

/** A successfully decoded image, numbered in the order of the source. */
export interface EncodedPicture {
  record: PictureRecord;
  /** Number of the image, from 0. */
  row: number;
  /** Total number of patches of all previous images. */
  offset: number;
}

/** Results of images computed together; all have the same grid. */
export type PictureBatch<R = Encoded> = R & { pictures: EncodedPicture[] };

interface Decoded {
  record: PictureRecord;
  pixels: Uint8Array;
}

type Placed = EncodedPicture & Decoded;

/** Batches queued behind the one being computed. */
const QUEUED = 1;
/** Minimum number of images read ahead, enough to hide the latency of downloads. */
const READ_AHEAD = 32;
/** Number of batches' worth of images that may wait for others of their shape. Beyond it, the fullest partial batch is computed. */
const WAITING = 8;

/** A pipeline to latents. @throws {UniFlowError} `BAD_INPUT` for bad options. */
export function encodePipeline(
  uniflow: UniFlowModel,
  { tokens, codes, hiddenStates, ...options }: EncodePipelineOptions = {},
): Pipeline<Encoded> {
  const { device, preprocessing, config } = uniflow;
  const run: BatchModel<Encoded>['run'] = (pixels, of) =>
    uniflow.encode(pixels, {
      ...of,
      ...(tokens ? { tokens } : {}),
      ...(codes ? { codes } : {}),
      ...(hiddenStates ? { hiddenStates } : {}),
    });
  return new Pipeline({ device, patch: config.patch, preprocessing, run }, options);
}

/**
 * Resources shared by all image streams through one model: decoding threads, buffers and the utilisation meter. Results depend only on the
 * images, and batches only on the order of the source.
 */
export class Pipeline<R extends object> {
  readonly target: Target;
  readonly batchSize: number;
  readonly meter: Meter;
  private readonly singles = new Buffers();
  private readonly batches = new Buffers();

  /** @throws {UniFlowError} `BAD_INPUT` for bad options. */
  constructor(
    private readonly model: BatchModel<R>,
    private readonly options: PipelineOptions = {},
  ) {
    const { device, patch, preprocessing } = model;
    const { mode, filter, edgeRatio, mean } = preprocessing;
    const { fit = 'crop', size = preprocessing.size, batchSize } = options;
    checkFit(fit);
    this.target = { fit, size: checkSize(size, patch), rule: { mode, filter, edgeRatio }, patch, mean };
    const grid = gridOf(this.target.size, patch);
    this.batchSize = checkBatchSize(batchSize, grid.rows * grid.cols, device);
    this.meter = new Meter(DECODERS);
  }

  /** Yields batches, and between them the images that could not be read. The order depends only on the source. */
  async *run(
    items: Iterable<Item> | AsyncIterable<Item>,
    signal: AbortSignal | undefined = this.options.signal,
  ): AsyncGenerator<PictureBatch<R> | DecodeFailure, void, undefined> {
    const queued: Promise<PictureBatch<R> | DecodeFailure>[] = [];
    const queue = (pictures: Placed[]): unknown => queued.push(ignoreRejection(this.compute(pictures, signal)));
    const shapes = new Shapes(this.batchSize);
    try {
      const decoded = decodeAhead(items, {
        count: Math.max(READ_AHEAD, 2 * this.batchSize),
        prepare: (image, { id }) => this.meter.decode.during(() => this.place(id, image, signal)),
        ...{ download: this.options.download, signal },
      });
      for await (const picture of decoded) {
        if ('error' in picture) queued.push(Promise.resolve(picture));
        else shapes.add(picture).forEach(queue);
        while (queued.length > 1 + QUEUED) yield await (queued.shift() as (typeof queued)[number]);
      }
      shapes.rest().forEach(queue);
      for (let next = queued.shift(); next; next = queued.shift()) yield await next;
    } finally {
      await Promise.allSettled(queued);
    }
  }

  private async place(id: string, source: ImageSource | RgbImage, signal: AbortSignal | undefined): Promise<Decoded> {
    const picture = await openImage(source, signal ? { signal } : {});
    const { width, height } = picture;
    const placement = placementOf(picture, this.target);
    const [rows, columns] = pixelSize(placement, this.target);
    const pixels = this.singles.take(3 * rows * columns);
    try {
      await place(picture, placement, this.target, pixels);
    } catch (error) {
      this.singles.give(pixels);
      throw error;
    }
    return { record: { id, width, height, ...placement }, pixels };
  }

  private compute(pictures: Placed[], signal: AbortSignal | undefined): Promise<PictureBatch<R>> {
    const { pixels, record } = pictures[0] as Placed;
    const batch = this.batches.take(pictures.length * pixels.length);
    pictures.forEach((picture, i) => batch.set(picture.pixels, i * pixels.length));
    for (const picture of pictures) this.singles.give(picture.pixels);
    const shape = [pictures.length, ...pixelSize(record, this.target), 3];
    return this.meter.compute.during(async () => {
      const computed = this.model.run({ pixels: ndarray(batch, shape) }, { batchSize: pictures.length, ...(signal ? { signal } : {}) });
      this.batches.give(batch); // run has copied the batch once it returns
      return { pictures: pictures.map(({ record, row, offset }) => ({ record, row, offset })), ...(await computed) };
    });
  }
}

/** Groups images by shape until a batch is full. */
class Shapes {
  private readonly waiting = new Map<string, Placed[]>();
  private count = 0;
  private row = 0;
  private offset = 0;

  constructor(private readonly batchSize: number) {}

  /** @returns the batch that is now full, or the fullest one if too many images are waiting. */
  add(picture: Decoded): Placed[][] {
    const { rows, cols } = picture.record.grid;
    const shape = `${rows}x${cols}`;
    const alike = this.waiting.get(shape) ?? [];
    this.waiting.set(shape, alike);
    alike.push({ ...picture, row: this.row++, offset: this.offset });
    this.offset += rows * cols;
    this.count++;
    if (alike.length === this.batchSize) return [this.take(shape)];
    return this.count >= WAITING * this.batchSize ? [this.take(this.fullest())] : [];
  }

  /** All images still waiting. */
  rest(): Placed[][] {
    return [...this.waiting.keys()].map((shape) => this.take(shape));
  }

  private take(shape: string): Placed[] {
    const pictures = this.waiting.get(shape) as Placed[];
    this.waiting.delete(shape);
    this.count -= pictures.length;
    return pictures;
  }

  private fullest(): string {
    return [...this.waiting].reduce((a, b) => (b[1].length > a[1].length ? b : a))[0];
  }
}
