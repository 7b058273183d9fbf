/** The distillation loss against the reference implementation. */
import { describe, expect, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { losses } from '../lib/index.js';
import { golden, readTensors, relativeL2 } from './support.js';

const tensors = await readTensors(join(golden('distillation'), 'distillation.safetensors'));
const expected = JSON.parse(await readFile(join(golden('distillation'), 'distillation.json'), 'utf8')) as Record<
  string,
  { loss: number; alpha: number[]; weight: number[] }
>;
const stack = (name: string): NdArray[] => Array.from({ length: 6 }, (_, i) => tensors[`${name}.${i}`]!);

describe.each(Object.keys(expected))('beta %s', (beta) => {
  test('loss, alpha, weights and gradients, a zero token among them', async () => {
    const out = await losses.distillation(stack('student'), stack('teacher'), { beta: Number(beta), grads: true });
    const want = expected[beta]!;
    expect(Math.abs(out.loss - want.loss)).toBeLessThan(1e-5);
    out.alpha.forEach((a, l) => expect(Math.abs(a - want.alpha[l]!)).toBeLessThan(1e-5));
    out.weight.forEach((w, l) => expect(Math.abs(w - want.weight[l]!)).toBeLessThan(1e-5));
    out.grads!.forEach((g, l) => expect(relativeL2(g, tensors[`beta${beta}.grad.${l}`]!)).toBeLessThan(1e-3));
  });
});

test('gives no loss and no gradient when the student equals its teacher', async () => {
  const out = await losses.distillation(stack('teacher').slice(1), stack('teacher').slice(1), { grads: true });
  expect(out.loss).toBeLessThan(1e-6);
  for (const g of out.grads!) for (const v of g.data as unknown as Float32Array) expect(Math.abs(v)).toBeLessThan(1e-6);
});

test('weights sum to one; uniform and last ignore alpha', async () => {
  const weights = async (kind: 'adaptive' | 'uniform' | 'last'): Promise<number[]> =>
    (await losses.distillation(stack('student'), stack('teacher'), { weights: kind })).weight;
  expect((await weights('adaptive')).reduce((a, b) => a + b)).toBeCloseTo(1, 6);
  for (const w of await weights('uniform')) expect(w).toBeCloseTo(1 / 6, 6);
  expect(await weights('last')).toEqual([0, 0, 0, 0, 0, 1]);
});

test('ignores the skipped leading tokens', async () => {
  const cut = (a: NdArray): NdArray => {
    const [b, s, d] = a.shape as [number, number, number];
    const data = new Float32Array(b * (s - 1) * d);
    for (let i = 0; i < b; i++) data.set((a.data as unknown as Float32Array).subarray((i * s + 1) * d, (i + 1) * s * d), i * (s - 1) * d);
    return ndarray(data, [b, s - 1, d]);
  };
  const skipped = await losses.distillation(stack('student'), stack('teacher'), { skip: 1 });
  const shorter = await losses.distillation(stack('student').map(cut), stack('teacher').map(cut));
  expect(skipped.loss).toBeCloseTo(shorter.loss, 6);
});

test('rejects stacks that do not match', async () => {
  await expect(losses.distillation(stack('student'), stack('teacher').slice(1))).rejects.toMatchObject({ code: 'BAD_INPUT' });
  await expect(losses.distillation([], [])).rejects.toMatchObject({ code: 'BAD_INPUT' });
});
