/** Reads latents or codes from anything that encode writes: a file, a shard, or a folder of shards. */
import ndarray, { type NdArray } from 'ndarray';
import { stat } from 'node:fs/promises';
import { basename, dirname, extname } from 'node:path';
import { UniFlowError } from '../errors.js';
import type { FilePicture, LatentsName } from './formats/format.js';
import { FORMATS, type FormatName } from './formats/index.js';
import { isS3, openOutput } from './open-output.js';
import { FolderOutput } from './output.js';
import { openShards, type Shards } from './reader.js';
import { fromStored } from './store.js';

/** Images as latents or codes, read on demand. */
export interface Latents {
  array: LatentsName;
  pictures: readonly FilePicture[];
  /** Latents of one image, float32 [N,Z], or codes, [N,G]. */
  at: (index: number) => Promise<NdArray<Float32Array | Uint16Array>>;
}

/** Format of a file by its extension. @throws {UniFlowError} `BAD_INPUT` for an unknown extension. */
export function formatOfFile(path: string, subject: string): FormatName {
  const format = extname(path).slice(1).toLowerCase();
  if (Object.hasOwn(FORMATS, format)) return format as FormatName;
  const endings = Object.keys(FORMATS).map((name) => `.${name}`);
  throw UniFlowError.expected(
    'BAD_INPUT',
    subject,
    `a folder (ending in / where its name has a dot), or a name ending in ${endings.join(', ')}`,
    `'${path}'`,
  );
}

/** @throws {UniFlowError} `BAD_INPUT` or `NOT_FOUND` if there are no latents. */
export async function openLatents(path: string): Promise<Latents> {
  if (isS3(path) || (await stat(path).catch(() => undefined))?.isDirectory()) return ofShards(await openShards(await openOutput(path)));
  const format = formatOfFile(path, 'latents');
  try {
    const { array, pictures, type, width, read } = await FORMATS[format].openFile(new FolderOutput(dirname(path)), basename(path));
    const at: Latents['at'] = async (index) =>
      ndarray(await fromStored(await read(index), type), [(pictures[index] as FilePicture).patches, width]);
    return { array, pictures, at };
  } catch (error) {
    if (error instanceof UniFlowError) throw error;
    throw UniFlowError.expected('BAD_INPUT', path, 'latents that encode has written', (error as Error).message, error);
  }
}

async function ofShards(shards: Shards): Promise<Latents> {
  const { arrays } = shards.manifest.header;
  const array = (['latents', 'codes'] as const).find((name) => arrays[name] !== undefined);
  if (!array) throw UniFlowError.expected('BAD_INPUT', shards.name, 'latents', 'tokens alone, which cannot be decoded');
  const pictures: FilePicture[] = [];
  for await (const { id, grid } of shards.pictures()) pictures.push({ id, grid, patches: grid.rows * grid.cols });
  return { array, pictures, at: async (index) => (await shards.at(index))[array] as NdArray<Float32Array | Uint16Array> };
}
