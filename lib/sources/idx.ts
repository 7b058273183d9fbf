/** IDX, the format of MNIST: a big-endian header, followed by the greyscale pixels of all images. */
import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { createGunzip, gunzip } from 'node:zlib';
import sharp from 'sharp';
import { UniFlowError } from '../errors.js';
import { readBytes, StreamBytes, unreadable } from './files.js';
import type { Items, Reading, RgbImage } from './item.js';

const NAME = /images([-.])idx3([-.])ubyte(\.gz)?$/;
/** Two zero bytes, the type code of unsigned bytes, and the number of dimensions. */
const magic = (dimensions: number): number => 0x0800 + dimensions;

/**
 * The images in order; for a data set, with the labels of the file beside it.
 * @throws {UniFlowError} `BAD_INPUT` if a file is damaged or the two files do not match.
 */
export async function* inIdx(path: string, { strict }: Reading): Items {
  const file = createReadStream(path);
  const unzipped = path.endsWith('.gz') ? createGunzip() : undefined;
  if (unzipped) file.on('error', (error) => unzipped.destroy(error)).pipe(unzipped);
  const stream = new StreamBytes(path, unzipped ?? file);
  try {
    const [length, height, width] = shapeOf(path, await headOf(stream), 3) as [number, number, number];
    const size = height * width;
    if (size === 0) throw UniFlowError.expected('BAD_INPUT', path, 'images of at least one pixel', `${height} x ${width}`);
    if (strict && !unzipped) await checkSize(path, [length, height, width]);
    const labels = strict ? await readLabels(path, length) : undefined;
    for (let i = 0; i < length; i++) {
      const grey = await stream.read(headerBytes(3) + i * size, size);
      yield { id: idOf(path, i), image: () => rgbOf(grey, width, height), label: labels && String(labels[i]) };
    }
  } finally {
    await stream.close();
    file.destroy();
  }
}

const idOf = (path: string, i: number): string => `${basename(path).replace(/\.gz$/, '')}/${i}`;

/** The header, possibly incomplete. */
async function headOf(stream: StreamBytes): Promise<Buffer> {
  const bytes: Buffer[] = [];
  while (bytes.length < headerBytes(3) && !(await stream.endsAt(bytes.length))) bytes.push(await stream.read(bytes.length, 1));
  return Buffer.concat(bytes);
}

async function checkSize(path: string, shape: readonly number[]): Promise<void> {
  const { size } = await stat(path);
  checkLength(path, shape, size - headerBytes(shape.length));
}

function checkLength(path: string, shape: readonly number[], bytes: number): void {
  const size = shape.reduce((a, b) => a * b, 1);
  if (size === 0 || bytes !== size)
    throw UniFlowError.expected('BAD_INPUT', path, `${shape.join(' x ')} bytes and at least one`, `${bytes}`);
}

async function rgbOf(grey: Buffer, width: number, height: number): Promise<RgbImage> {
  const image = sharp(grey, { raw: { width, height, channels: 1 } });
  return { data: await image.toColourspace('srgb').raw().toBuffer(), width, height };
}

/** Reads labels from the file beside it, compressed or not; undefined if there is none. */
async function readLabels(path: string, length: number): Promise<Buffer | undefined> {
  const stem = basename(path).replace(NAME, 'labels$1idx1$2ubyte');
  for (const name of [`${stem}.gz`, stem]) {
    const file = join(dirname(path), name);
    const labels = await readLabelFile(file).catch((error: UniFlowError) => {
      if (error.code === 'NOT_FOUND') return undefined;
      throw error;
    });
    if (!labels) continue;
    if (labels.length === length) return labels;
    throw UniFlowError.expected('BAD_INPUT', file, `${length} labels, one for each image`, `${labels.length}`);
  }
  return undefined;
}

async function readLabelFile(path: string): Promise<Buffer> {
  const stored = await readBytes(path);
  const bytes = path.endsWith('.gz') ? await unzip(path, stored) : stored;
  const labels = bytes.subarray(headerBytes(1));
  checkLength(path, shapeOf(path, bytes, 1), labels.length);
  return labels;
}

const headerBytes = (dimensions: number): number => 4 * (1 + dimensions);

function shapeOf(path: string, bytes: Buffer, dimensions: number): number[] {
  if (bytes.length >= headerBytes(dimensions) && bytes.readUInt32BE(0) === magic(dimensions))
    return Array.from({ length: dimensions }, (_, i) => bytes.readUInt32BE(4 * (i + 1)));
  const start = bytes.subarray(0, 4).toString('hex');
  throw UniFlowError.expected(
    'BAD_INPUT',
    path,
    `an IDX file of ${dimensions} dimensions`,
    `${bytes.length} bytes starting with 0x${start}`,
  );
}

async function unzip(path: string, bytes: Buffer): Promise<Buffer> {
  try {
    return await promisify(gunzip)(bytes);
  } catch (cause) {
    throw unreadable(path, cause);
  }
}
