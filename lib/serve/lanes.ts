/** The model's operations as lanes of the batcher: which items can share a native call, and how batches are stacked and split. */
import ndarray, { type NdArray } from 'ndarray';
import { Buffers } from '../images/buffers.js';
import type { DecodeOptions } from '../decoder/options.js';
import type { UniFlow } from '../uniflow.js';
import { defaultBatchSize } from '../gather.js';
import { type RgbImage } from '../images/decode.js';
import { toImages } from '../images/write.js';
import type { PixelInput } from '../images/input.js';
import { gridOf, type Grid } from '../tensor.js';
import type { Lane } from './batcher.js';

export type Size = readonly [height: number, width: number];
export type Sampling = Pick<DecodeOptions, 'steps' | 'schedule' | 'guidance' | 'seed'>;

export type Work = 'encode' | 'decode' | 'reconstruct';

/** A lane of images [H,W,3] or latents [N,Z] of one shape. */
export interface ModelLane<Item, Result> extends Lane<Item, Result> {
  work: Work;
}

export interface EncodedImage {
  latents: Float32Array; // [N,Z]
  tokens: Float32Array | undefined; // [N,D]
}

export interface ReconstructedImage {
  image: RgbImage;
  /** The pixels that were encoded. */
  original: RgbImage | undefined;
  psnr: number;
  ssim: number;
}

export class Lanes {
  private readonly singles = new Buffers();
  private readonly batches = new Buffers();

  constructor(
    private readonly uniflow: UniFlow,
    private readonly maxBatch: number | undefined,
  ) {}

  encode(size: Size, tokens: boolean): ModelLane<Uint8Array, EncodedImage> {
    return this.lane('encode', this.patches(size), [size, tokens], async (images, signal) => {
      const encoded = await this.stacked(images, size, (pixels) =>
        this.uniflow.encode(pixels, { tokens, batchSize: images.length, signal }),
      );
      const [latents, all] = [rowsOf(encoded.latents), encoded.tokens && rowsOf(encoded.tokens)];
      return latents.map((row, i) => ({ latents: row, tokens: all?.[i] }));
    });
  }

  decode(
    shape: readonly [patches: number, channels: number],
    grid: Grid | undefined,
    sampling: Sampling,
  ): ModelLane<Float32Array, RgbImage> {
    return this.lane('decode', shape[0], [shape, grid, keyOf(sampling)], async (rows, signal) => {
      const latents = ndarray(stack(rows, new Float32Array(rows.length * shape[0] * shape[1])), [rows.length, ...shape]);
      return toImages(await this.uniflow.decode(latents, { ...sampling, grid, batchSize: rows.length, signal }));
    });
  }

  reconstruct(size: Size, sampling: Sampling, original: boolean): ModelLane<Uint8Array, ReconstructedImage> {
    return this.lane('reconstruct', this.patches(size), [size, keyOf(sampling), original], async (sent, signal) => {
      const options = { ...sampling, batchSize: sent.length, signal };
      const [height, width] = size;
      const originals = original ? sent.map((pixels) => ({ data: pixels.slice(), width, height })) : []; // copies, because stacked() recycles
      const { images, perImage } = await this.stacked(sent, size, (pixels) => this.uniflow.reconstruct(pixels, options));
      return toImages(images).map((image, i) => ({
        ...{ image, original: originals[i] },
        ...{ psnr: perImage.psnr[i] as number, ssim: perImage.ssim[i] as number },
      }));
    });
  }

  patches(size: Size): number {
    const { rows, cols } = gridOf(size, this.uniflow.config.patch);
    return rows * cols;
  }

  /** A buffer for an image's pixels; {@link encode} and {@link reconstruct} recycle it. */
  roomFor([height, width]: Size): Uint8Array {
    return this.singles.take(3 * height * width);
  }

  private async stacked<R>(images: readonly Uint8Array[], [height, width]: Size, work: (pixels: PixelInput) => Promise<R>): Promise<R> {
    const shape = [images.length, height, width, 3];
    const all = this.batches.take(3 * images.length * height * width);
    const result = await work({ pixels: ndarray(stack(images, all), shape) });
    for (const image of images) this.singles.give(image); // not after a failure, because the images are then retried
    this.batches.give(all);
    return result;
  }

  private lane<I, R>(work: Work, patches: number, key: unknown[], run: ModelLane<I, R>['run']): ModelLane<I, R> {
    return { work, key: JSON.stringify([work, ...key]), maxBatch: this.maxBatch ?? defaultBatchSize(patches, this.uniflow.device), run };
  }
}

function keyOf({ steps, schedule, guidance, seed }: Sampling): unknown[] {
  return [steps, schedule, guidance, seed];
}

/** Concatenates arrays of equal length. */
function stack<T extends Uint8Array | Float32Array>(rows: readonly T[], all: T): T {
  rows.forEach((row, i) => all.set(row, i * row.length));
  return all;
}

/** The rows of a float array [B, ...]. */
export function rowsOf({ data, shape }: NdArray): Float32Array[] {
  const row = shape.slice(1).reduce((a, b) => a * b, 1);
  return Array.from({ length: shape[0] as number }, (_, i) => (data as unknown as Float32Array).subarray(i * row, (i + 1) * row));
}
