/** The small bundled model, as loaded by `UniFlow.load()`, and its quality on photographs that it was never trained on. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import ndarray from 'ndarray';
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

test('loses at least 0.1 dB without any one of its latent channels', async () => {
  const { latents, grid, originals } = await uniflow.reconstruct(photos.slice(0, 2));
  const values = latents.data as unknown as Float32Array;
  const decoded = async (z: Float32Array): Promise<number> => {
    const images = await uniflow.decode(ndarray(z, latents.shape), { grid });
    const squares = (images.data as unknown as Uint8Array).reduce((sum, v, i) => sum + (v - originals.data[i]!) ** 2, 0);
    return 10 * Math.log10((255 ** 2 * originals.size) / squares);
  };
  const whole = await decoded(values);
  for (let channel = 0; channel < 48; channel++) {
    const rest = Float32Array.from(values);
    const rows = values.length / 48;
    let mean = 0;
    for (let row = 0; row < rows; row++) mean += values[48 * row + channel]! / rows;
    for (let row = 0; row < rows; row++) rest[48 * row + channel] = mean;
    expect(whole - (await decoded(rest))).toBeGreaterThan(0.1);
  }
}, 60_000);

test('works at another size', async () => {
  const { psnr, grid } = await uniflow.reconstruct(photos, { size: [256, 320] });
  expect(grid).toEqual({ rows: 32, cols: 40 });
  expect(psnr).toBeGreaterThan(36);
});
