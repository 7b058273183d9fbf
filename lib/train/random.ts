/** Random numbers as a function of a key. There is no state, so work can resume anywhere. */
import { createHash } from 'node:crypto';
import type { Blocks } from '../sources/dataset.js';

/** The key of random numbers. */
export type Key = readonly (string | number)[];

/** Uniform on [0, 1), from SHAKE256 of the key. */
export function uniforms(count: number, ...key: Key): Float64Array {
  const bytes = createHash('shake256', { outputLength: 4 * count })
    .update(key.join('/'))
    .digest();
  return Float64Array.from({ length: count }, (_, i) => bytes.readUInt32LE(4 * i) / 2 ** 32);
}

/** 0 to `length` - 1 in random order (Fisher-Yates). */
export function permutation(length: number, ...key: Key): Uint32Array {
  const order = Uint32Array.from({ length }, (_, i) => i);
  const draws = uniforms(length, ...key);
  for (let i = length - 1; i > 0; i--) {
    const j = Math.floor((draws[i] as number) * (i + 1));
    [order[i], order[j]] = [order[j] as number, order[i] as number];
  }
  return order;
}

/**
 * 0 to `length` - 1 in random order, mixing the samples of at most `held` blocks at a time: the blocks are permuted, then the samples within each group of
 * `held` consecutive blocks. If all blocks are held, this is {@link permutation}.
 */
export function blockwisePermutation(length: number, { begins, held }: Blocks, ...key: Key): Uint32Array {
  if (held >= begins.length) return permutation(length, ...key);
  const blocks = permutation(begins.length, ...key, 'blocks');
  const order = new Uint32Array(length);
  let done = 0;
  for (let first = 0; first < blocks.length; first += held) {
    const samples = [...blocks.subarray(first, first + held)].flatMap((block) => {
      const [begin, end] = [begins[block] as number, begins[block + 1] ?? length];
      return Array.from({ length: end - begin }, (_, i) => begin + i);
    });
    for (const i of permutation(samples.length, ...key, first)) order[done++] = samples[i] as number;
  }
  return order;
}
