/** The small bundled model, as loaded by `UniFlow.load()`, and its quality on photographs that it was never trained on. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { embeddedModel, UniFlow } from '../lib/index.js';
import { root } from './support.js';

const LARGEST = 16e6; // maximum size of the package in bytes

let uniflow: UniFlow;
let photos: string[];

beforeAll(async () => {
  uniflow = await UniFlow.load(undefined, { dtype: 'bfloat16' });
  const folder = join(root, 'examples', 'photos');
  photos = (await readdir(folder)).filter((name) => name.endsWith('.jpg')).map((name) => join(folder, name));
});
afterAll(() => uniflow.dispose());

test('is small enough for a package', async () => {
  const files = await readdir(embeddedModel);
  const sizes = await Promise.all(files.map(async (name) => (await stat(join(embeddedModel, name))).size));
  expect(files).toEqual(expect.arrayContaining(['README.md', 'config.json', 'model.safetensors', 'train.json']));
  expect(sizes.reduce((a, b) => a + b)).toBeLessThan(LARGEST);
});

describe('unseen photographs at 224x224', () => {
  test('are reconstructed with at least 36.9 dB in one step', async () => {
    const { psnr, ssim, latents } = await uniflow.reconstruct(photos);
    expect(latents.shape).toEqual([6, 784, 48]);
    expect(psnr).toBeGreaterThan(36.9);
    expect(ssim).toBeGreaterThan(0.965);
  });

  test('are reconstructed alike from different noise', async () => {
    const one = await uniflow.reconstruct(photos, { seed: 1 });
    const two = await uniflow.reconstruct(photos, { seed: 2 });
    expect(Math.abs(one.psnr - two.psnr)).toBeLessThan(0.1);
  });
});

test('uses every latent channel', async () => {
  const { latents } = await uniflow.encode(photos);
  const values = latents.data as unknown as Float32Array;
  const squares = new Float64Array(48);
  for (let i = 0; i < values.length; i++) squares[i % 48]! += values[i]! ** 2;
  for (const sum of squares) expect((48 * sum) / values.length).toBeGreaterThan(0.25);
});

test('works at another size', async () => {
  const { psnr, grid } = await uniflow.reconstruct(photos, { size: [256, 320] });
  expect(grid).toEqual({ rows: 32, cols: 40 });
  expect(psnr).toBeGreaterThan(36);
});
