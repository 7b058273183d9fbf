/** The small model that comes along: what `UniFlow.load()` gives, and how well it does on photographs that it was never trained on. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { embeddedModel, UniFlow } from '../lib/index.js';
import { root } from './support.js';

const LARGEST = 16e6; // bytes of the package that it may take

let uniflow: UniFlow;
let photos: string[];

beforeAll(async () => {
  uniflow = await UniFlow.load(undefined, { dtype: 'bfloat16' });
  const folder = join(root, 'examples', 'photos');
  photos = (await readdir(folder)).filter((name) => name.endsWith('.jpg')).map((name) => join(folder, name));
});
afterAll(() => uniflow.dispose());

test('it is small enough for a package', async () => {
  const files = await readdir(embeddedModel);
  const sizes = await Promise.all(files.map(async (name) => (await stat(join(embeddedModel, name))).size));
  expect(files).toEqual(expect.arrayContaining(['README.md', 'config.json', 'model.safetensors', 'train.json']));
  expect(sizes.reduce((a, b) => a + b)).toBeLessThan(LARGEST);
});

describe('photographs that it has not seen, at 224x224', () => {
  test('come back with at least 35 dB in one step', async () => {
    const { psnr, ssim, latents } = await uniflow.reconstruct(photos);
    expect(latents.shape).toEqual([6, 784, 48]);
    expect(psnr).toBeGreaterThan(35);
    expect(ssim).toBeGreaterThan(0.95);
  });

  test('come back the same for another noise', async () => {
    const one = await uniflow.reconstruct(photos, { seed: 1 });
    const two = await uniflow.reconstruct(photos, { seed: 2 });
    expect(Math.abs(one.psnr - two.psnr)).toBeLessThan(0.1);
  });
});

test('every latent channel carries something', async () => {
  const { latents } = await uniflow.encode(photos);
  const values = latents.data as unknown as Float32Array;
  const squares = new Float64Array(48);
  for (let i = 0; i < values.length; i++) squares[i % 48]! += values[i]! ** 2;
  for (const sum of squares) expect((48 * sum) / values.length).toBeGreaterThan(0.25);
});

test('another size works as well', async () => {
  const { psnr, grid } = await uniflow.reconstruct(photos, { size: [256, 320] });
  expect(grid).toEqual({ rows: 32, cols: 40 });
  expect(psnr).toBeGreaterThan(34);
});
