/** IDX, the format of MNIST: a big-endian header, and the pixels of all pictures, grey. */
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { gunzip } from 'node:zlib';
import sharp from 'sharp';
import { UniFlowError } from '../errors.js';
import type { Samples } from './dataset.js';
import { readBytes, unreadable } from './files.js';

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
  const raw = { width, height, channels: 1 as const };
  const size = height * width;
  const stem = basename(path).replace(/\.gz$/, '');
  return {
    length,
    classes: undefined,
    read: async (i) => {
      const grey = sharp(data.subarray(i * size, (i + 1) * size), { raw });
      return { id: `${stem}/${i}`, label: labels?.[i], image: { data: await grey.toColourspace('srgb').raw().toBuffer(), width, height } };
    },
  };
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
  const header = 4 * (1 + dimensions);
  const start = bytes.subarray(0, 4).toString('hex');
  if (bytes.length < header || bytes.readUInt32BE(0) !== magic(dimensions))
    throw UniFlowError.expected(
      'BAD_INPUT',
      path,
      `an IDX file of ${dimensions} dimensions`,
      `${bytes.length} bytes starting with 0x${start}`,
    );
  const shape = Array.from({ length: dimensions }, (_, i) => bytes.readUInt32BE(4 * (i + 1)));
  const size = shape.reduce((a, b) => a * b, 1);
  const data = bytes.subarray(header);
  if (size === 0 || data.length !== size)
    throw UniFlowError.expected('BAD_INPUT', path, `${shape.join(' x ')} bytes and at least one`, `${data.length}`);
  return { shape, data };
}

async function unzip(path: string, bytes: Buffer): Promise<Buffer> {
  try {
    return await promisify(gunzip)(bytes);
  } catch (cause) {
    throw unreadable(path, cause);
  }
}
