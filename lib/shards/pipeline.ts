/** Pictures to latents: decoded several at once, in buffers that go round, computed in batches of one shape. */
import ndarray from 'ndarray';
import { ignoreRejection } from '../prefetch.js';
import { checkBatchSize } from '../gather.js';
import { decodeAhead, type DecodeFailure } from '../images/decode-ahead.js';
import { DECODERS, openImage } from '../images/decode.js';
import { checkSize } from '../images/input.js';
import { gridOf } from '../tensor.js';
import type { EncodeOptions, Encoded, UniFlowModel } from '../model.js';
import { Buffers } from '../images/buffers.js';
import type { DownloadOptions } from '../sources/url.js';
import { checkFit, pixelSize, place, placementOf, type Fit, type Placement, type Target } from '../images/fit.js';
import { Meter } from './meter.js';
import type { ImageSource, Item, RgbImage } from '../sources/item.js';

/** How pictures are read and computed. */
export interface PipelineOptions extends EncodeOptions {
  /** What becomes of pictures that are not of the model's shape. Default: crop. */
  fit?: Fit | undefined;
  download?: Omit<DownloadOptions, 'signal'> | undefined;
}

/** What is known of a picture besides its latents. */
export interface PictureRecord extends Placement {
  id: string;
  /** In pixels, upright. */
  width: number;
  height: number;
}

/** A picture among those that could be read, in the order of the source. */
export interface EncodedPicture {
  record: PictureRecord;
  /** From 0. */
  row: number;
  /** Patches of all pictures before it. */
  offset: number;
}

/** Pictures computed together: all have one grid. */
export interface PictureBatch extends Encoded {
  pictures: EncodedPicture[];
}

interface Decoded {
  record: PictureRecord;
  pixels: Uint8Array;
}

type Placed = EncodedPicture & Decoded;

/** Batches queued behind the one that is computed. */
const QUEUED = 1;
/** At least so many pictures are read ahead: enough to hide the time that a download takes. */
const READ_AHEAD = 32;
/** Batches' worth of pictures that wait for others of their shape; then the fullest batch is computed as it is. */
const WAITING = 8;

/**
 * What several streams of pictures through one model share: threads that decode, memory, and the count of how busy all are. Latents depend on
 * the pictures alone, and batches on the order of the source alone.
 */
export class Pipeline {
  readonly target: Target;
  readonly batchSize: number;
  readonly meter: Meter;
  private readonly singles = new Buffers();
  private readonly batches = new Buffers();

  /** @throws {UniFlowError} `BAD_INPUT` for bad options. */
  constructor(
    readonly uniflow: UniFlowModel,
    private readonly options: PipelineOptions = {},
  ) {
    const { patch, mean, imageSize } = uniflow.config;
    const { fit = 'crop', size = imageSize, batchSize } = options;
    checkFit(fit);
    this.target = { fit, size: checkSize(size, patch), patch, mean };
    const grid = gridOf(this.target.size, patch);
    this.batchSize = checkBatchSize(batchSize, grid.rows * grid.cols);
    this.meter = new Meter(DECODERS);
  }

  /** Batches, and between them the pictures that could not be read, in an order that the source determines. */
  async *run(
    items: Iterable<Item> | AsyncIterable<Item>,
    signal: AbortSignal | undefined = this.options.signal,
  ): AsyncGenerator<PictureBatch | DecodeFailure, void, undefined> {
    const queued: Promise<PictureBatch | DecodeFailure>[] = [];
    const queue = (pictures: Placed[]): unknown => queued.push(ignoreRejection(this.encode(pictures, signal)));
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

  private encode(pictures: Placed[], signal: AbortSignal | undefined): Promise<PictureBatch> {
    const { pixels, record } = pictures[0] as Placed;
    const batch = this.batches.take(pictures.length * pixels.length);
    pictures.forEach((picture, i) => batch.set(picture.pixels, i * pixels.length));
    for (const picture of pictures) this.singles.give(picture.pixels);
    const shape = [pictures.length, ...pixelSize(record, this.target), 3];
    const { tokens, hiddenStates } = this.options;
    return this.meter.compute.during(async () => {
      const encoded = this.uniflow.encode({ pixels: ndarray(batch, shape) }, { tokens, hiddenStates, batchSize: pictures.length, signal });
      this.batches.give(batch); // encode has copied it when it returns
      return { pictures: pictures.map(({ record, row, offset }) => ({ record, row, offset })), ...(await encoded) };
    });
  }
}

/** Pictures that wait until there are enough of their shape for a batch. */
class Shapes {
  private readonly waiting = new Map<string, Placed[]>();
  private count = 0;
  private row = 0;
  private offset = 0;

  constructor(private readonly batchSize: number) {}

  /** @returns the batch that is full now, or the fullest where too many pictures wait. */
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

  /** All that still wait. */
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
