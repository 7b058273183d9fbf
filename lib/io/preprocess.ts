/** Preprocessing: converts images to the pixels that an encoder was trained on (resize, crop, statistics). */
import { throwIfAborted } from '../errors.js';
import type { Family } from '../encoder/config.js';
import type { NativeNormalisation, Resampling, ResampleFilter } from '../native.js';
import { decodeAhead } from '../images/decode-ahead.js';
import { openImage, type DecodeOptions, type ImageSource, type RgbImage } from '../images/decode.js';
import type { Item } from '../sources/item.js';

/** Conversion of images to [height, width, 3] bytes. */
export interface Preprocessing {
  /** cover: the published UniFlow centre crop. shortest_edge: resize, then centre crop. stretch: no crop. */
  mode: 'cover' | 'shortest_edge' | 'stretch';
  /** For 'shortest_edge': length of that edge as a multiple of the crop's. */
  edgeRatio: number;
  filter: ResampleFilter;
  /** Default size of the pixels. The patches may not fill it. */
  size: readonly [height: number, width: number];
  mean: readonly [number, number, number];
  std: readonly [number, number, number];
}

export type Triple = readonly [number, number, number];
export const IMAGENET = { mean: [0.485, 0.456, 0.406] as Triple, std: [0.229, 0.224, 0.225] as Triple };
export const CLIP = { mean: [0.48145466, 0.4578275, 0.40821073] as Triple, std: [0.26862954, 0.26130258, 0.27577711] as Triple };
export const HALF = { mean: [0.5, 0.5, 0.5] as Triple, std: [0.5, 0.5, 0.5] as Triple };

/** Preprocessing of a family's published processor; the model's own files may override it: processor.ts. */
export function defaultPreprocessing(family: Family, size: readonly [number, number]): Preprocessing {
  const common = { edgeRatio: 1, filter: 'bicubic' as const, size };
  switch (family) {
    case 'clip':
      return { ...common, ...CLIP, mode: 'shortest_edge' };
    case 'siglip':
      return { ...common, ...HALF, mode: 'stretch' };
    case 'dinov2':
      return { ...common, ...IMAGENET, mode: 'shortest_edge', edgeRatio: 256 / 224 };
    case 'dinov3':
      return { ...common, ...IMAGENET, mode: 'stretch', filter: 'bilinear' };
    case 'internvit':
    case 'internvl':
      return { ...common, ...IMAGENET, mode: 'cover' };
  }
}

/** Pillow's filter numbers. */
export const FILTERS: Record<number, ResampleFilter> = { 1: 'lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box' };

export function nativeNormalisation(p: { mean: Triple; std: Triple }): NativeNormalisation {
  return { mean: Float32Array.from(p.mean), std: Float32Array.from(p.std) };
}

/** The resizing and cropping of an image to [height, width]. */
export function resamplingTo([height, width]: Preprocessing['size'], { mode, filter, edgeRatio }: ResamplingRule): Resampling {
  return { width, height, mode, filter, edge: Math.round(Math.max(height, width) * edgeRatio) };
}

/** How images are resized and cropped, to any size. */
export type ResamplingRule = Pick<Preprocessing, 'mode' | 'filter' | 'edgeRatio'>;

/** Decodes images into one batch, uint8 [B,H,W,3] in C order. @throws {UniFlowError} if one cannot be read. */
export async function loadPixels(
  items: readonly Item[],
  preprocessing: Preprocessing,
  size: readonly [number, number],
  options: DecodeOptions = {},
): Promise<Uint8Array> {
  const bytes = 3 * size[0] * size[1];
  const batch = new Uint8Array(items.length * bytes);
  const places = items.map((item, i) => ({ ...item, into: batch.subarray(i * bytes, (i + 1) * bytes) }));
  const prepare = async (image: ImageSource | RgbImage, { into }: (typeof places)[number]): Promise<object> => {
    await loadInto(into, image, preprocessing, size, options);
    return {};
  };
  for await (const loaded of decodeAhead(places, { count: items.length, prepare, signal: options.signal }))
    if ('error' in loaded) throw loaded.error;
  return batch;
}

/** Decodes one image `into` uint8 [H,W,3]. */
export async function loadInto(
  into: Uint8Array,
  source: ImageSource | RgbImage,
  rule: ResamplingRule,
  size: Preprocessing['size'],
  options: DecodeOptions = {},
): Promise<void> {
  throwIfAborted(options.signal);
  const image = await openImage(source, options);
  await image.resample(into, resamplingTo(size, rule));
}
