/** The PCA baseline and the use of latents, against their definitions in float64. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { EigenvalueDecomposition, Matrix } from 'ml-matrix';
import ndarray, { type NdArray } from 'ndarray';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { openDataset } from '../lib/sources/dataset.js';
import { evenlySpaced } from '../lib/sources/evenly-spaced.js';
import { batches } from '../lib/train/loader.js';
import { fitBaseline } from '../lib/eval/baseline.js';
import { effectiveRank, LatentMeter } from '../lib/eval/latent-use.js';
import type { UniFlow } from '../lib/uniflow.js';

let dir: string;
beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-baseline-'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

/** The parts of a tokenizer that a baseline needs. */
const tokenizer = (patch: number, latentChannels: number): UniFlow =>
  ({
    config: { patch, latentChannels },
    device: 'cpu',
  }) as unknown as UniFlow;

/** Images of waves and noise, named [i].png. */
async function makeImages(count: number, side: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    const data = Uint8Array.from({ length: side * side * 3 }, (_, at) => {
      const [c, x, y] = [at % 3, Math.floor(at / 3) % side, Math.floor(at / 3 / side)];
      return 128 + 90 * Math.sin(0.11 * (i + 2) * x + 0.07 * y * (c + 1)) + 25 * Math.sin(at * at * (i + 3));
    });
    await sharp(data, { raw: { width: side, height: side, channels: 3 } })
      .png()
      .toFile(join(dir, `${i}.png`));
  }
}

/** Patches of one image as rows, ordered by (channel, row, column). */
function patchesOf(pixels: NdArray<Uint8Array>, image: number, patch: number): number[][] {
  const side = pixels.shape[1] as number;
  const rows: number[][] = [];
  for (let y = 0; y < side; y += patch)
    for (let x = 0; x < side; x += patch)
      rows.push(Array.from({ length: 3 * patch ** 2 }, (_, v) => {
        const [c, dy, dx] = [Math.floor(v / patch ** 2), Math.floor(v / patch) % patch, v % patch];
        return pixels.get(image, y + dy, x + dx, c);
      })); // prettier-ignore
  return rows;
}

test('the baseline is the PSNR of the leading principal components of the patches, rounded and clamped', async () => {
  const [patch, channels, side] = [4, 6, 24];
  await makeImages(9, side);
  const data = await openDataset(dir);
  const { pixels } = (await batches(data, { batchSize: 9, size: side, crop: 'center', epochs: 1 }).next()).value!;

  const rows = new Matrix(Array.from({ length: 9 }, (_, i) => patchesOf(pixels, i, patch)).flat());
  const mean = rows.mean('column');
  const centred = rows.clone().subRowVector(mean);
  const { eigenvectorMatrix, realEigenvalues } = new EigenvalueDecomposition(centred.transpose().mmul(centred), { assumeSymmetric: true });
  const leading = realEigenvalues
    .map((value, i) => ({ value, i }))
    .sort((a, b) => b.value - a.value)
    .slice(0, channels)
    .map(({ i }) => i);
  const basis = eigenvectorMatrix.subMatrixColumn(leading);
  const coded = centred.mmul(basis).mmul(basis.transpose()).addRowVector(mean);
  const perImage = Array.from({ length: 9 }, (_, image) => {
    let squares = 0;
    const [count, width] = [rows.rows / 9, rows.columns];
    for (let r = image * count; r < (image + 1) * count; r++)
      for (let c = 0; c < width; c++) squares += (Math.min(255, Math.max(0, Math.round(coded.get(r, c)))) - rows.get(r, c)) ** 2;
    return 10 * Math.log10((255 ** 2 * count * width) / squares);
  });

  using codec = (await fitBaseline(tokenizer(patch, channels), data, { size: side }))!;
  const quality = await codec.quality(pixels);
  perImage.forEach((psnr, i) => expect(quality.get(i, 0)).toBeCloseTo(psnr, 2));
  expect((await codec.measure(pixels)).psnr).toBeCloseTo(perImage.reduce((a, b) => a + b) / 9, 2);
  expect({ channels: codec.channels, images: codec.images }).toEqual({ channels: 6, images: 9 });
});

test('gives no baseline when latents have as many values as pixels', async () => {
  expect(await fitBaseline(tokenizer(4, 48), await openDataset(dir), { size: 24 })).toBeUndefined();
});

test('spaces indices evenly, and takes all when there are few', () => {
  expect(evenlySpaced(10, 4)).toEqual([0, 2, 5, 7]);
  expect(evenlySpaced(3, 512)).toEqual([0, 1, 2]);
});

describe('effective rank', () => {
  test.each([
    ['equal variances count fully', [2, 2, 2, 2, 2], 5],
    ['a line is 1', [3, 0, 0], 1],
    ['shares of 1/2, 1/4, 1/8, 1/8 have 1.75 bits', [4, 2, 1, 1], 2 ** 1.75],
    ['latents that are all equal have none', [0, 0], 0],
  ])('%s', (_, variances, expected) => expect(effectiveRank(Float64Array.from(variances))).toBeCloseTo(expected, 12));
});

describe('latent use', () => {
  const [count, patches, channels, side] = [10, 16, 6, 12];
  /** Uncorrelated waves over all patches, one for each axis, of amplitude 1 / (axis + 1). */
  const axes = Float32Array.from({ length: count * patches * channels }, (_, i) => {
    const [row, axis] = [Math.floor(i / channels), i % channels];
    return Math.cos((Math.PI * (7 * axis + 3) * (row + 0.5)) / (count * patches)) / (axis + 1);
  });
  /** Latents are these axes in a rotated frame; the decoder shows the first `shown` axes. */
  function model(shown: number): { z: NdArray; decode: UniFlow['decode'] } {
    const angle = (a: number, b: number): Matrix => {
      const r = Matrix.eye(channels);
      r.set(a, a, 0.6);
      r.set(b, b, 0.6);
      r.set(a, b, -0.8);
      r.set(b, a, 0.8);
      return r;
    };
    const rotation = angle(0, 1).mmul(angle(1, 2)).mmul(angle(3, 0)).mmul(angle(4, 2)).mmul(angle(5, 1));
    const z = Matrix.from1DArray(count * patches, channels, axes).mmul(rotation);
    const decode = (latents: NdArray): Promise<NdArray> => {
      const images = latents.shape[0] as number;
      const back = Matrix.from1DArray(images * patches, channels, latents.data as unknown as Float32Array).mmul(rotation.transpose());
      const data = new Uint8Array(images * side * side * 3);
      for (let i = 0; i < data.length; i++) {
        const [image, at] = [Math.floor(i / (side * side * 3)), i % (side * side * 3)];
        data[i] = Math.round(128 + 100 * back.get(image * patches + (at % patches), Math.floor(at / patches) % shown));
      }
      return Promise.resolve(ndarray(data, [images, side, side, 3]));
    };
    return { z: ndarray(Float32Array.from(z.to1DArray()), [count, patches, channels]), decode };
  }
  async function measured(shown: number, batch: number): Promise<{ effectiveRank: number; channelsInUse: number }> {
    const { z, decode } = model(shown);
    const originals = (await decode(z)) as NdArray<Uint8Array>;
    originals.data.forEach((value, i) => (originals.data[i] = value + 8 * (i % 2))); // a pattern that no latents produce
    const meter = new LatentMeter({ device: 'cpu', decode }, count);
    const part = (array: NdArray, begin: number, end: number): NdArray => {
      const row = array.size / count;
      return ndarray((array.data as unknown as Float32Array).slice(begin * row, end * row), [end - begin, ...array.shape.slice(1)]);
    };
    for (let i = 0; i < count; i += batch)
      await meter.add(part(originals, i, Math.min(count, i + batch)) as NdArray<Uint8Array>, part(z, i, Math.min(count, i + batch)));
    return meter.measure({});
  }

  test.each([1, 3, 6])('counts as channels in use the %i directions that the decoder uses', async (shown) => {
    expect((await measured(shown, 10)).channelsInUse).toBe(shown / channels);
  });

  test('computes the effective rank from the latents alone, and neither number depends on the batch', async () => {
    const variances = Float64Array.from({ length: channels }, (_, i) => 1 / (1 + i) ** 2);
    const all = await measured(3, 10);
    expect(all.effectiveRank).toBeCloseTo(effectiveRank(variances), 4);
    expect(await measured(3, 1)).toEqual(all);
    expect(await measured(3, 4)).toEqual(all);
  });
});
