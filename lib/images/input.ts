/** Converts images from the user to batches of pixels on the device. */
import type { NdArray } from 'ndarray';
import { checkOptions, DECODE_OPTIONS, ENCODE_OPTIONS } from '../check.js';
import { UniFlowError } from '../errors.js';
import { checkFinite } from '../ops.js';
import { contiguous, onDevice, Tensor } from '../tensor.js';
import { readerOf, type ImageLike } from './like.js';
import { loadPixels, type Preprocessing } from '../io/preprocess.js';

/** Pixels at their final size: normalised float32 [B,3,H,W], or uint8 [B,H,W,3]. */
export interface PixelInput {
  pixels: NdArray;
}

/** An image, several images, or prepared pixels. */
export type ImageInput = ImageLike | readonly ImageLike[] | PixelInput;

/** Images as a sequence of batches; the pixels of a batch are made on demand. */
export interface Batches {
  count: number;
  size: readonly [height: number, width: number];
  /** Pixels of images [begin, end), uint8 [b,H,W,3] or float32 [b,3,H,W]. The caller disposes of them. */
  load(begin: number, end: number): Tensor | Promise<Tensor>;
  dispose(): void;
}

export interface InputOptions {
  /** Height and width to which images are resized; a number means a square. */
  size?: number | readonly [number, number] | undefined;
  signal?: AbortSignal | undefined;
}

/** Prepared pixels are copied before this returns; images are read batch by batch. */
export function batchesOf(images: ImageInput, preprocessing: Preprocessing, patch: number, device: string, options: InputOptions): Batches {
  checkOptions(options, [...ENCODE_OPTIONS, ...DECODE_OPTIONS]);
  if (isPixels(images)) return onDevice(device, () => pixelBatches(images.pixels, options));
  if (Array.isArray(images) && images.length === 0) throw UniFlowError.expected('BAD_INPUT', 'images', 'at least one', 'an empty array');
  const all = Array.isArray(images) ? (images as readonly ImageLike[]) : [images as ImageLike];
  const items = all.map((image, i) => ({ id: `images[${i}]`, image: readerOf(image, `images[${i}]`) }));
  const size = checkSize(options.size ?? preprocessing.size, patch);
  return {
    count: items.length,
    size,
    load: async (begin, end) => {
      const data = await loadPixels(items.slice(begin, end), preprocessing, size, { signal: options.signal });
      return onDevice(device, () => Tensor.from({ data, shape: [end - begin, size[0], size[1], 3] }));
    },
    dispose: () => undefined,
  };
}

function isPixels(images: unknown): images is PixelInput {
  return typeof images === 'object' && images !== null && 'pixels' in images;
}

/** A float32 array on the current device. */
export function floats(array: NdArray, name: string): Tensor {
  const tensor = Tensor.from(array, name);
  const { dtype } = tensor;
  if (dtype === 'float32') return tensor;
  tensor.dispose();
  throw UniFlowError.expected('BAD_INPUT', name, 'float32', dtype);
}

/** An int32 array on the current device, of integers of any type. */
export function integers(array: NdArray, name: string): Tensor {
  if (Object.prototype.toString.call(array?.data) === '[object Float32Array]')
    throw UniFlowError.expected('BAD_INPUT', name, 'an ndarray over a Uint16Array, Uint8Array or Int32Array', 'Float32Array');
  const { data, shape } = contiguous(array, name);
  return Tensor.from({ data: new Int32Array(data), shape });
}

function pixelBatches(pixels: NdArray, options: InputOptions): Batches {
  const shape = pixels?.shape;
  const bytes = Object.prototype.toString.call(pixels?.data) === '[object Uint8Array]';
  if (!Array.isArray(shape) || shape.length !== 4 || shape[bytes ? 3 : 1] !== 3)
    throw UniFlowError.expected(
      'BAD_INPUT',
      'pixels',
      bytes ? 'an ndarray [B, H, W, 3]' : 'an ndarray [B, 3, H, W]',
      shape ? `[${shape.join(', ')}]` : typeof pixels,
    );
  if (options.size !== undefined)
    throw new UniFlowError('BAD_INPUT', 'size: pixels have a size already; pass images to have them resized', { subject: 'size' });
  if (shape[0] === 0) throw UniFlowError.expected('BAD_INPUT', 'pixels', 'at least one image', 'none');
  const all = bytes ? Tensor.from(pixels, 'pixels') : checkFinite(floats(pixels, 'pixels'), 'pixels');
  const [height, width] = (bytes ? shape.slice(1, 3) : shape.slice(2)) as [number, number];
  return {
    count: shape[0] as number,
    size: [height, width],
    load: (begin, end) => all.slice(begin, end),
    dispose: () => all.dispose(),
  };
}

const MAX_EDGE = 16384;

/** Checks a height and width; pixels beyond the last whole patch are dropped. */
export function checkSize(size: number | readonly [number, number], patch: number): readonly [number, number] {
  const both = typeof size === 'number' ? ([size, size] as const) : size;
  if (!Array.isArray(both) || both.length !== 2 || both.some((n) => !Number.isInteger(n) || n < patch || n > MAX_EDGE))
    throw UniFlowError.expected('BAD_INPUT', 'size', `whole numbers from the patch size ${patch} to ${MAX_EDGE}`, JSON.stringify(size));
  return both;
}
