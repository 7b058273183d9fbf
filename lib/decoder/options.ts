/** The options of decoding, checked once, before anything is computed. */
import type { NdArray } from 'ndarray';
import { checkOptions, DECODE_OPTIONS, describe, ENCODE_OPTIONS } from '../check.js';
import { groupCount, isCodes, type Codes } from '../codes.js';
import type { UniFlowConfig } from '../config.js';
import { UniFlowError } from '../errors.js';
import type { Grid } from '../tensor.js';
import { timeGrid, type Schedule } from './schedule.js';

export interface DecodeOptions {
  /** Patch rows and columns. Default: the model's grid, or a square. */
  grid?: Grid;
  /** Euler steps. Default: the checkpoint's num_sampling_steps. */
  steps?: number;
  /** Spacing of the steps. Default 'linear'. */
  schedule?: Schedule;
  /** v = v0 + guidance * (v - v0), v0 under a zero condition. Default 1: off, which halves the cost. */
  guidance?: number;
  /** Seed of the noise. Default 0. An image depends only on its latent and the seed, not on its place in a batch. */
  seed?: number;
  /** Draws the noise of image b from (seed, imageIds[b]). By default, all images share the noise of id 0. */
  imageIds?: readonly number[];
  /** The noise itself, float32 [B,N,P], P = 3 * patch² as (channel, row, column). */
  noise?: NdArray;
  /** uint8 [B,H,W,3] (default), or float32 [B,3,H,W] normalised. */
  output?: 'uint8' | 'float32';
  /** Images computed together. Default: as many as make up about 4,096 tokens, on a GPU 32,000. */
  batchSize?: number;
  signal?: AbortSignal;
}

/** A validated decoding request. */
export interface Decoding {
  /** B */
  count: number;
  /** N */
  patches: number;
  grid: Grid;
  /** One id per image. */
  ids: Uint32Array;
  sampling: { schedule: ReturnType<typeof timeGrid>; guidance: number; seed: number; output: 'uint8' | 'float32' };
}

/**
 * @throws {UniFlowError} `BAD_INPUT` for latents that are not [B,N,Z], codes that are not [B,N,G], and invalid options; `UNSUPPORTED` for codes if the model has
 * none.
 */
export function checkDecoding(latents: NdArray | Codes, options: DecodeOptions, config: UniFlowConfig): Decoding {
  checkOptions(options, [...DECODE_OPTIONS, ...ENCODE_OPTIONS]); // reconstruct passes both
  const [name, array, width] = isCodes(latents)
    ? ['codes', latents.codes, groupCount(config)]
    : (['latents', latents, config.latentChannels] as const);
  const [count = 0, patches = 0, last] = array?.shape ?? [];
  if (array?.shape?.length !== 3 || last !== width || count === 0)
    throw UniFlowError.expected('BAD_INPUT', name, `an ndarray [B, N, ${width}]`, shapeText(array));
  const grid = gridOf(options.grid, patches, config.decoder.grid);
  const schedule = timeGrid(options.steps ?? config.steps, options.schedule);
  const { guidance = 1, output = 'uint8', seed = 0, noise } = options;
  if (!Number.isFinite(guidance)) throw UniFlowError.expected('BAD_INPUT', 'guidance', 'a finite number', String(guidance));
  if (output !== 'uint8' && output !== 'float32')
    throw UniFlowError.expected('BAD_INPUT', 'output', "'uint8' or 'float32'", `'${String(output)}'`);
  const ids = imageIds(options.imageIds, count);
  if (noise !== undefined) checkNoise(noise, [count, patches, 3 * config.patch ** 2]);
  return { count, patches, grid, ids, sampling: { schedule, guidance, seed, output } };
}

function gridOf(grid: Grid | undefined, patches: number, own: Grid): Grid {
  const side = Math.sqrt(patches);
  const { rows, cols } = grid ?? (own.rows * own.cols === patches ? own : { rows: side, cols: side });
  if ([rows, cols].every((n) => Number.isInteger(n) && n > 0) && rows * cols === patches) return { rows, cols };
  const expected = `rows and columns of ${patches} patches (encode() returns them)`;
  throw UniFlowError.expected('BAD_INPUT', 'grid', expected, JSON.stringify(grid ?? 'none'));
}

function imageIds(ids: readonly number[] | undefined, count: number): Uint32Array {
  if (!ids) return new Uint32Array(count);
  if (Array.isArray(ids) && ids.length === count && ids.every((n) => Number.isInteger(n) && n >= 0 && n < 2 ** 32))
    return Uint32Array.from(ids);
  const actual = JSON.stringify(ids)?.slice(0, 80) ?? 'nothing';
  throw UniFlowError.expected('BAD_INPUT', 'imageIds', `${count} integers from 0 to 2^32 - 1`, actual);
}

function checkNoise(noise: NdArray, shape: readonly number[]): void {
  if (Array.isArray(noise?.shape) && noise.shape.join() === shape.join()) return;
  throw UniFlowError.expected('BAD_INPUT', 'noise', `an ndarray [${shape.join(', ')}]`, shapeText(noise));
}

function shapeText(array: NdArray): string {
  return Array.isArray(array?.shape) ? `[${array.shape.join(', ')}]` : describe(array);
}
