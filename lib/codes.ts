/**
 * Discrete codes by finite scalar quantisation: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv 2309.15505. The Z latent
 * channels of a token are groups of as many channels as there are levels; each group is one code. docs/codes.md has the formulas.
 */
import type { NdArray } from 'ndarray';
import { describe } from './check.js';
import { UniFlowError } from './errors.js';

/** Number of values of each channel of a group. */
export type Levels = readonly number[];

/** bfloat16 keeps the latents of as many levels apart. */
const MOST_LEVELS = 256;
/** Codes are stored as uint16. */
const MOST_CODES = 65536;

/** Codes of images instead of latents: [B,N,G], one per group of channels. */
export interface Codes {
  /** Over a Uint16Array, Uint8Array or Int32Array. */
  codes: NdArray;
}

export function isCodes(value: unknown): value is Codes {
  return typeof value === 'object' && value !== null && 'codes' in value;
}

/** The fields of a model's configuration that determine its codes. */
export interface CodesConfig {
  codes: Levels | undefined;
  latentChannels: number;
}

/** @throws UniFlowError `UNSUPPORTED` if the model's latents are continuous. */
export function requireLevels({ codes }: CodesConfig): Levels {
  if (codes) return codes;
  throw UniFlowError.expected('UNSUPPORTED', 'codes', 'a model with codes (uniflow train --codes 8,8,8,5,5,5)', 'continuous latents');
}

/** Number of codes of a token, G. */
export function groupCount(config: CodesConfig): number {
  return config.latentChannels / requireLevels(config).length;
}

/** Number of codes of a group. */
export function codeCount(levels: Levels): number {
  return levels.reduce((product, level) => product * level, 1);
}

/**
 * The levels of a model's latents. @throws UniFlowError with this `code` if they are not levels, have too many codes, or do not divide the latent channels
 * into groups.
 */
export function checkLevels(levels: unknown, latentChannels: number, code: 'BAD_INPUT' | 'BAD_CHECKPOINT'): Levels {
  const isLevel = (level: unknown): boolean => Number.isInteger(level) && (level as number) >= 2 && (level as number) <= MOST_LEVELS;
  if (!Array.isArray(levels) || levels.length === 0 || !levels.every(isLevel)) {
    const actual = Array.isArray(levels) ? `[${levels.map(describe).join(', ')}]` : describe(levels);
    throw UniFlowError.expected(code, 'codes', `a list of levels from 2 to ${MOST_LEVELS}, such as [8, 8, 8, 5, 5, 5]`, actual);
  }
  const list = levels as number[];
  const count = codeCount(list);
  if (count > MOST_CODES)
    throw UniFlowError.expected(code, 'codes', `levels with a product of at most ${MOST_CODES}, as codes are uint16`, String(count));
  if (latentChannels % list.length !== 0)
    throw UniFlowError.expected(
      code,
      'latentChannels',
      `a multiple of ${list.length}, as a code takes as many channels as it has levels`,
      String(latentChannels),
    );
  return list;
}
