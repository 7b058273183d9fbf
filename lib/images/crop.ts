/** Crops a training sample from an image: a random resized crop, or the tokenizer's centre crop. */
import { readFile } from 'node:fs/promises';
import sharp, { type Sharp } from 'sharp';
import { isPixels } from '../sources/item.js';
import { decodeImage, openImage, type ImageSource, type RgbImage } from './decode.js';

/** Size of a sample in pixels. */
export type Size = readonly [height: number, width: number];

/** A part of an image, in pixels. */
export interface Box {
  left: number;
  top: number;
  width: number;
  height: number;
}

/** As in torchvision's RandomResizedCrop. */
const RATIO = [3 / 4, 4 / 3] as const;
const ATTEMPTS = 10;
/** Upper bound of the random numbers used by {@link randomBox}. */
export const BOX_DRAWS = 2 * ATTEMPTS + 2;

/**
 * A box with `scale` times the image's area and an aspect ratio from 3/4 to 4/3 (log-uniform), anywhere in the image. If none fits in ten attempts, the
 * centre of the image with the nearest aspect ratio, as in torchvision's RandomResizedCrop.
 */
export function randomBox(width: number, height: number, scale: readonly [number, number], draws: Float64Array): Box {
  const between = (low: number, high: number, i: number): number => low + (high - low) * (draws[i] as number);
  for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
    const area = width * height * between(...scale, 2 * attempt);
    const ratio = Math.exp(between(Math.log(RATIO[0]), Math.log(RATIO[1]), 2 * attempt + 1));
    const [w, h] = [Math.round(Math.sqrt(area * ratio)), Math.round(Math.sqrt(area / ratio))];
    if (w < 1 || h < 1 || w > width || h > height) continue;
    const [left, top] = [Math.floor(between(0, width - w + 1, 2 * ATTEMPTS)), Math.floor(between(0, height - h + 1, 2 * ATTEMPTS + 1))];
    return { left, top, width: w, height: h };
  }
  const w = Math.max(1, Math.min(width, Math.round(height * RATIO[1])));
  const h = Math.max(1, Math.min(height, Math.round(width / RATIO[0])));
  return { left: (width - w) >> 1, top: (height - h) >> 1, width: w, height: h };
}

/** Options of {@link randomCrop}. */
export interface RandomCrop {
  size: Size;
  /** Range of the box's share of the image's area. */
  scale: readonly [number, number];
  mirrored: boolean;
  /** {@link BOX_DRAWS} numbers on [0, 1). */
  draws: Float64Array;
  /** Decodes images that cannot be shrunk on load. Default {@link decodeImage}. */
  decode?: ((source: ImageSource) => Promise<RgbImage>) | undefined;
  signal?: AbortSignal | undefined;
}

/** Crops a {@link randomBox} of the image at `size`, packed RGB [H,W,3]. Errors are those of {@link decodeImage}. */
export async function randomCrop(image: ImageSource | RgbImage, crop: RandomCrop): Promise<Uint8Array> {
  if (isPixels(image)) return cropped(sharp(image.data, { raw: { ...sizeOf(image), channels: 3 } }), image, crop);
  // If the fast path fails, the exact one reports why.
  const quick = await shrinkOnLoad(image, crop).catch(() => undefined);
  if (quick) return quick;
  const decode = crop.decode ?? ((source: ImageSource) => decodeImage(source, crop.signal ? { signal: crop.signal } : {}));
  return randomCrop(await decode(image), crop);
}

/** JPEG and WebP can be shrunk during decoding, which saves most of the work on large photographs. */
async function shrinkOnLoad(source: ImageSource, crop: RandomCrop): Promise<Uint8Array | undefined> {
  const bytes = source instanceof Uint8Array ? source : await readFile(source, { signal: crop.signal });
  const { format, space, autoOrient } = await sharp(bytes).metadata();
  if (format !== 'jpeg' && format !== 'webp') return undefined;
  // as in decodeImage, whose pixel limit equals sharp's own
  return cropped(sharp(bytes, { failOn: 'error', ignoreIcc: space !== 'cmyk' }).autoOrient(), autoOrient, crop);
}

/** Resizes the whole image and cuts out the box. In this order sharp shrinks on load and computes only the pixels of the box. */
function cropped(image: Sharp, { width, height }: Extent, { size: [rows, columns], scale, mirrored, draws }: RandomCrop): Promise<Buffer> {
  const box = randomBox(width, height, scale, draws);
  const [allColumns, allRows] = [Math.round((width * columns) / box.width), Math.round((height * rows) / box.height)];
  const left = Math.min(allColumns - columns, Math.round((box.left * columns) / box.width));
  const top = Math.min(allRows - rows, Math.round((box.top * rows) / box.height));
  return image
    .flatten({ background: '#ffffff' })
    .resize(allColumns, allRows, { fit: 'fill', kernel: 'cubic' })
    .flop(mirrored)
    .extract({ left: mirrored ? allColumns - columns - left : left, top, width: columns, height: rows }) // sharp mirrors first
    .toColourspace('srgb')
    .raw({ depth: 'uchar' })
    .toBuffer();
}

/** Writes the centre crop that {@link UniFlow.encode} uses `into` packed RGB [H,W,3]. */
export async function centerCrop(
  source: ImageSource | RgbImage,
  [height, width]: Size,
  into: Uint8Array,
  signal?: AbortSignal,
): Promise<void> {
  const image = await openImage(source, signal ? { signal } : {});
  const options = { width, height, mode: 'cover', edge: Math.max(height, width), filter: 'bicubic' } as const;
  await image.resample(into, options);
}

/** Mirrors packed RGB [H,W,3] horizontally. */
export function mirror(pixels: Uint8Array, [height, width]: Size): Promise<Uint8Array> {
  return sharp(pixels, { raw: { width, height, channels: 3 } })
    .flop()
    .raw()
    .toBuffer();
}

type Extent = Pick<RgbImage, 'width' | 'height'>;
const sizeOf = ({ width, height }: Extent): Extent => ({ width, height });
