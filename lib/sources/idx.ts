/** IDX, the format of MNIST: a big-endian header, and the pixels of all pictures, grey. */
import { createReadStream } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { createGunzip, gunzip } from 'node:zlib';
import sharp from 'sharp';
import { UniFlowError } from '../errors.js';
import type { RgbImage } from '../images/decode.js';
import type { Samples } from './dataset.js';
import { readBytes, StreamBytes, unreadable } from './files.js';

const NAME = /images([-.])idx3([-.])ubyte(\.gz)?$/;
/** Two zeros, the type of unsigned bytes, and how many dimensions. */
const magic = (dimensions: number): number => 0x0800 + dimensions;

/** Whether a file's name is that of IDX pictures. */
export function isIdx(path: string): boolean {
  return NAME.test(path);
}

/** Grey pictures, with the labels beside them. @throws {UniFlowError} `BAD_INPUT` where a file is damaged or the two do not fit. */
export async function openIdx(path: string): Promise<Samples> {
  const { shape, data } = await readIdx(path, 3);
  const [length, height, width] = shape as [number, number, number];
  const labels = await readLabels(path, length);
  const size = height * width;
  return {
    length,
    classes: undefined,
    read: async (i) => ({
      id: idOf(path, i),
      label: labels?.[i],
      image: await rgbOf(data.subarray(i * size, (i + 1) * size), width, height),
    }),
  };
}

/** The pictures one after the other, without holding them all; their ids are those of {@link openIdx}. */
export async function* streamIdx(path: string): AsyncGenerator<{ id: string; image: () => Promise<RgbImage> }, void, undefined> {
  const file = createReadStream(path);
  const unzipped = path.endsWith('.gz') ? createGunzip() : undefined;
  if (unzipped) file.on('error', (error) => unzipped.destroy(error)).pipe(unzipped);
  const stream = new StreamBytes(path, unzipped ?? file);
  try {
    const [length, height, width] = shapeOf(path, await stream.read(0, headerBytes(3)), 3) as [number, number, number];
    const size = height * width;
    if (size === 0) throw UniFlowError.expected('BAD_INPUT', path, 'pictures of at least one pixel', `${height} x ${width}`);
    for (let i = 0; i < length; i++) {
      const grey = await stream.read(headerBytes(3) + i * size, size);
      yield { id: idOf(path, i), image: () => rgbOf(grey, width, height) };
    }
  } finally {
    await stream.close();
    file.destroy();
  }
}

const idOf = (path: string, i: number): string => `${basename(path).replace(/\.gz$/, '')}/${i}`;

async function rgbOf(grey: Buffer, width: number, height: number): Promise<RgbImage> {
  const picture = sharp(grey, { raw: { width, height, channels: 1 } });
  return { data: await picture.toColourspace('srgb').raw().toBuffer(), width, height };
}

/** From the file beside it, compressed or not; undefined where there is none. */
async function readLabels(path: string, length: number): Promise<Buffer | undefined> {
  const stem = basename(path).replace(NAME, 'labels$1idx1$2ubyte');
  for (const name of [`${stem}.gz`, stem]) {
    const file = join(dirname(path), name);
    const labels = await readIdx(file, 1).catch((error: UniFlowError) => {
      if (error.code === 'NOT_FOUND') return undefined;
      throw error;
    });
    if (!labels) continue;
    if (labels.data.length === length) return labels.data;
    throw UniFlowError.expected('BAD_INPUT', file, `${length} labels, one for each picture`, `${labels.data.length}`);
  }
  return undefined;
}

async function readIdx(path: string, dimensions: number): Promise<{ shape: number[]; data: Buffer }> {
  const stored = await readBytes(path);
  const bytes = path.endsWith('.gz') ? await unzip(path, stored) : stored;
  const shape = shapeOf(path, bytes, dimensions);
  const size = shape.reduce((a, b) => a * b, 1);
  const data = bytes.subarray(headerBytes(dimensions));
  if (size === 0 || data.length !== size)
    throw UniFlowError.expected('BAD_INPUT', path, `${shape.join(' x ')} bytes and at least one`, `${data.length}`);
  return { shape, data };
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
