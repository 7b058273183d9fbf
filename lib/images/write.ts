/** Image output: writes packed RGB to files, and splits batches of pixels into images. */
import { randomUUID } from 'node:crypto';
import { rename, rm, writeFile } from 'node:fs/promises';
import { extname } from 'node:path';
import type { NdArray } from 'ndarray';
import sharp, { type Sharp } from 'sharp';
import { UniFlowError } from '../errors.js';
import type { RgbImage } from '../sources/item.js';
import { checkLength } from './decode.js';

/**
 * Writes an image in the format of the extension: png, jpg, jpeg or webp. JPEG and WebP are written at quality 95, JPEG without chroma subsampling. The file
 * appears complete or not at all.
 *
 * @throws {UniFlowError} `UNSUPPORTED` for another extension, `BAD_INPUT` for data of the wrong length or a path that cannot be written.
 */
export async function writeImage(path: string, image: RgbImage): Promise<void> {
  const encoded = await encodeImage(path, image);
  const temporary = `${path}.${randomUUID()}.tmp`;
  try {
    await writeFile(temporary, encoded);
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true });
    throw new UniFlowError('BAD_INPUT', `${path}: cannot be written: ${(error as Error).message}`, {
      subject: path,
      cause: error,
    });
  }
}

/** The content of the file that {@link writeImage} would write under this name. */
export async function encodeImage(name: string, image: RgbImage): Promise<Buffer> {
  checkLength(image);
  return encoderFor(name)(toSharp(image)).toBuffer();
}

function encoderFor(path: string): (image: Sharp) => Sharp {
  switch (extname(path).toLowerCase()) {
    case '.png':
      return (image) => image.png();
    case '.jpg':
    case '.jpeg':
      return (image) => image.jpeg({ quality: 95, chromaSubsampling: '4:4:4' });
    case '.webp':
      return (image) => image.webp({ quality: 95 });
    default:
      throw UniFlowError.expected('UNSUPPORTED', path, 'a name ending in .png, .jpg, .jpeg or .webp', 'another name');
  }
}

function toSharp({ data, width, height }: RgbImage): Sharp {
  return sharp(data, { raw: { width, height, channels: 3 }, limitInputPixels: false });
}

/** Joins images in a row from left to right, tops aligned, with a white gap of `gap` pixels between neighbours. */
export function sideBySide(images: readonly RgbImage[], gap = 8): RgbImage {
  images.forEach(checkLength);
  const height = Math.max(0, ...images.map((image) => image.height));
  const width = images.reduce((sum, image) => sum + image.width + gap, -gap);
  if (images.length === 0) throw UniFlowError.expected('BAD_INPUT', 'images', 'at least one image', 'none');
  const data = new Uint8Array(width * height * 3).fill(255);
  let left = 0;
  for (const image of images) {
    for (let y = 0; y < image.height; ++y) {
      const row = image.data.subarray(y * image.width * 3, (y + 1) * image.width * 3);
      data.set(row, (y * width + left) * 3);
    }
    left += image.width + gap;
  }
  return { data, width, height };
}

/** Splits a batch [B,H,W,3] of bytes, as returned by `decode`, into images that share its memory. */
export function toImages(images: NdArray): RgbImage[] {
  const [count, height, width] = images.shape as [number, number, number, number];
  const bytes = height * width * 3;
  const data = images.data as unknown as Uint8Array;
  return Array.from({ length: count }, (_, i) => ({ data: data.subarray(i * bytes, (i + 1) * bytes), width, height }));
}
