/** Initialisation of new models: random weights by fan-in, or the linear codec of images. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { Matrix } from 'ml-matrix';
import ndarray, { type NdArray } from 'ndarray';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { presets } from '../lib/config.js';
import { openDataset, type Dataset } from '../lib/sources/dataset.js';
import { batches } from '../lib/train/loader.js';
import { VisionEncoder } from '../lib/encoder/vision-encoder.js';
import { patchStatistics, principalComponents } from '../lib/eval/pca.js';
import { native } from '../lib/native.js';
import { cast, imageQuality, linear, unfold } from '../lib/ops.js';
import { linearStart, shortfalls } from '../lib/start/index.js';
import { Weights } from '../lib/start/weights.js';
import { Tensor, tensorOf, tidy } from '../lib/tensor.js';
import type { TrainConfig } from '../lib/train/config.js';
import { resume, train } from '../lib/train/train.js';
import { readLog } from '../lib/train/log.js';
import { Trainer } from '../lib/train/trainer.js';
import { UniFlow } from '../lib/uniflow.js';
import { golden, photos } from './support.js';

let data: Dataset;
let folder: string;
beforeAll(async () => {
  data = await openDataset(photos);
  folder = mkdtempSync(join(tmpdir(), 'uniflow-start-'));
});
afterAll(async () => {
  await data.close();
  rmSync(folder, { recursive: true });
});

const meanSquare = (x: NdArray): number => (x.data as unknown as Float32Array).reduce((sum, v) => sum + v * v, 0) / x.size;

/** Standard normal pixels [1,3,H,W]. */
async function noisePixels(rows: number, cols = rows): Promise<NdArray> {
  const tensor = new Tensor(native.noise(1, Uint32Array.of(0), 1, 3 * rows * cols));
  const { data: values } = await tensor.read();
  tensor.dispose();
  return ndarray(values, [1, 3, rows, cols]);
}

describe('random weights', () => {
  test.each(['nano', 'tiny', 'official'] as const)(
    'of size %s keep the variance of activations within a factor of two',
    async (preset) => {
      await using uniflow = UniFlow.random(preset, { dtype: 'bfloat16', device: 'cpu' });
      const pixels = await noisePixels(56);
      const { hiddenStates, latents, grid } = await uniflow.encode({ pixels }, { hiddenStates: true });
      const condition = tidy(() => uniflow.decoder.condition(cast(Tensor.from(latents), 'bfloat16'), grid));
      const states = [...hiddenStates!, latents, await condition.read()].map(meanSquare);
      condition.dispose();
      for (const [before, after] of [
        [0, -3],
        [-3, -2],
        [-2, -1],
      ] as const) {
        // prettier-ignore
        const ratio = states.at(after)! / states.at(before)!;
        expect(ratio).toBeGreaterThan(0.5);
        expect(ratio).toBeLessThan(2);
      }
      expect(states[0]).toBeGreaterThan(0.5);
      expect(states[0]).toBeLessThan(2);
    },
    240_000,
  );

  test('give a velocity of zero: one step leaves the noise', async () => {
    await using uniflow = UniFlow.random('nano', { device: 'cpu' });
    const latents = ndarray(new Float32Array(16 * 16).fill(1), [1, 16, 16]);
    const noise = ndarray(Float32Array.from({ length: 16 * 588 }, (_, i) => Math.sin(i)), [1, 16, 588]); // prettier-ignore
    const image = await uniflow.decode(latents, { grid: { rows: 4, cols: 4 }, noise, output: 'float32' });
    const patches = tidy(() => unfold(Tensor.from(image), 14, uniflow.normalisation, 'float32'));
    expect((await patches.read()).data).toEqual(noise.data);
    patches.dispose();
  });
});

interface Shape {
  patch: number;
  channels: number;
  width: number;
  blocks?: number;
}

const config = ({ patch, channels, width, blocks = 2 }: Shape): Record<string, unknown> => ({
  ...presets.nano,
  ...{ hidden_size: width, vit_hidden_size: width, intermediate_size: 2 * width },
  ...{ patch_size: patch, image_size: 8 * patch, latent_ch: channels, num_decoder_layers: blocks },
});

async function centres(size: number): Promise<NdArray<Uint8Array>> {
  const first = await batches(data, { batchSize: data.length, size, crop: 'center', epochs: 1 }).next();
  return first.value!.pixels;
}

/** Mean PSNR over the images of a PCA of their own patches with the given number of coefficients. */
async function pcaQuality(uniflow: UniFlow, pixels: NdArray<Uint8Array>, channels: number): Promise<number> {
  const { patch } = uniflow.config;
  const { normalisation } = uniflow;
  const { directions, mean } = principalComponents(await patchStatistics([pixels], { patch, normalisation }), channels);
  const projection = directions.mmul(directions.transpose());
  const centre = Matrix.columnVector(mean);
  const bias = Matrix.sub(centre, projection.mmul(centre));
  const quality = tidy(() => {
    const original = Tensor.from(pixels);
    const layer = {
      weight: Tensor.from({ data: Float32Array.from(projection.to1DArray()), shape: [mean.length, mean.length] }),
      bias: Tensor.from({ data: Float32Array.from(bias.to1DArray()), shape: [mean.length] }),
    };
    const kept = linear(unfold(original, patch, normalisation, 'float32'), layer);
    return imageQuality(original, tensorOf(native.fold(kept.handle, 8, 8, patch, normalisation, 'uint8')));
  });
  const read = await quality.read();
  quality.dispose();
  const images = pixels.shape[0] as number;
  return Array.from({ length: images }, (_, i) => read.get(i, 0)).reduce((a, b) => a + b) / images;
}

describe('the linear start', () => {
  test.each([
    { patch: 8, channels: 48, width: 256 },
    { patch: 8, channels: 16, width: 208 },
    { patch: 4, channels: 8, width: 64 },
    { patch: 4, channels: 40, width: 64 }, // two units per channel are too many for the width
    { patch: 4, channels: 24, width: 128, blocks: 0 },
    { patch: 14, channels: 64, width: 768 },
  ])(
    'is the PCA of its patches before the first step: %j',
    async (shape) => {
      for (const [dtype, loss] of [
        ['float32', 0.3],
        ['bfloat16', 0.3 + (shape.channels === 40 ? 1.2 : 0)],
      ] as const) {
        // prettier-ignore
        await using uniflow = await UniFlow.random(config(shape), { photos, dtype, device: 'cpu' });
        const pixels = await centres(8 * shape.patch);
        const best = await pcaQuality(uniflow, pixels, shape.channels);
        for (const steps of shape.blocks === 0 ? [1] : [1, 2, 4, 10]) {
          const { psnr } = await uniflow.reconstruct({ pixels }, { steps });
          expect(Math.abs(psnr - best)).toBeLessThan(loss);
        }
      }
    },
    240_000,
  );

  test.each([
    [4, 6],
    [9, 8],
  ])('looks at the eight neighbours, in images of any size: %i x %i patches', async (rows, cols) => {
    const width = 128;
    const heads = 16;
    const rotary = { ...config({ patch: 4, channels: 8, width }), position_embedding_type: 'rope', num_attention_heads: heads };
    await using uniflow = await UniFlow.random(rotary, { photos, dtype: 'float32', device: 'cpu' });
    const neighbours = [[0, -1], [0, 1], [-1, 0], [1, 0], [-1, -1], [-1, 1], [1, -1], [1, 1]] as const; // prettier-ignore
    const weights = new Weights(uniflow);
    await weights.edit('encoder.layers.0.attn.proj', ({ weight }) => {
      for (let head = 0; head < heads / 2; head++) weight.set(head, (head * width) / heads, 1); // copies each head's first channel to a separate channel
    });
    uniflow.encoder.invalidate();

    const { hiddenStates } = await uniflow.encode({ pixels: await noisePixels(4 * rows, 4 * cols) }, { hiddenStates: true });
    const [before, after] = hiddenStates as [NdArray, NdArray];
    const row = (r: number, c: number): number => 1 + r * cols + c; // after the class token
    const normed = (n: number): number => {
      const h = Array.from({ length: width }, (_, d) => before.get(0, n, d));
      const mean = h.reduce((a, b) => a + b) / width;
      const variance = h.reduce((sum, v) => sum + (v - mean) ** 2, 0) / width;
      return (h[0]! - mean) / Math.sqrt(variance + 1e-6);
    };
    // except near the first corner: the class token is not rotated, so it is as close as the corner patch
    for (let r = 2; r < rows - 1; r++) {
      for (let c = 2; c < cols - 1; c++) {
        neighbours.forEach(([dr, dc], head) => {
          const added = after.get(0, row(r, c), head) - before.get(0, row(r, c), head);
          expect(Math.abs(added - normed(row(r + dr, c + dc)))).toBeLessThan(0.25);
        });
      }
    }
  });

  test('says what a flow head loses that is narrower than a patch', async () => {
    await using uniflow = UniFlow.random(config({ patch: 8, channels: 70, width: 64 }), { device: 'cpu' });
    const kept = await linearStart(uniflow, data, { encoder: 'random' });
    expect(kept).toEqual({ channels: 61, of: 70, noise: 61, values: 192 });
    expect(shortfalls(kept)).toEqual([
      expect.stringMatching(/131 of the 192 .* hidden_size of at least 195/),
      expect.stringMatching(/^9 of the 70/),
    ]);
    expect(shortfalls({ channels: 8, of: 8, noise: 48, values: 48 })).toEqual([]);
  });

  test('leaves no parameter without a gradient once two steps were made', async () => {
    await using uniflow = await UniFlow.random(config({ patch: 4, channels: 8, width: 64, blocks: 2 }), { photos, device: 'cpu' });
    const trainer = new Trainer(uniflow, { lambdaDistillation: 0, optimizer: { lr: 1e-3 } });
    const pixels = await centres(32);
    for (let step = 0; step < 3; step++) await trainer.step({ pixels });
    const gradients = await trainer.gradients();
    const dead = [...gradients].filter(([, g]) => meanSquare(g) === 0).map(([name]) => name);
    await trainer.finish();
    expect(dead).toEqual([]);
    expect(gradients.size).toBe(uniflow.parameters.length);
  });

  test('is regressed from the tokens of a pretrained encoder, which it leaves as it is', async () => {
    await using encoder = await VisionEncoder.load(golden('dinov2'), { device: 'cpu' });
    await using uniflow = UniFlow.fromEncoder(encoder, { latentChannels: 8, globalBlocks: 1, flowBlocks: 2 });
    const size = uniflow.config.imageSize[0];
    const pixels = await centres(size);
    const before = await uniflow.encode({ pixels }, { tokens: true });
    await linearStart(uniflow, data, { encoder: 'pretrained' });
    const after = await uniflow.encode({ pixels }, { tokens: true });
    expect(after.tokens!.data).toEqual(before.tokens!.data);
    // each latent is the best linear estimate of a coefficient of variance 1, so its variance is the fraction explained by the tokens
    const variances = Array.from({ length: 8 }, (_, k) => meanSquare(ndarray(Float32Array.from({ length: after.latents.size / 8 }, (_, i) => (after.latents.data as unknown as Float32Array)[8 * i + k]!)))); // prettier-ignore
    expect(variances[0]).toBeGreaterThan(0.5);
    for (const variance of variances) expect(variance).toBeLessThan(1.1);
  }, 240_000);

  test('is how training begins where there are data and no model, unless it is told otherwise', async () => {
    const settings: TrainConfig = {
      ...{ init: config({ patch: 4, channels: 8, width: 64 }), regime: 'finetune', data: photos, validation: photos },
      ...{ steps: 1, batch: 2, lr: 0, dtype: 'float32' },
    };
    const linearly = await train(join(folder, 'linear'), settings, { device: 'cpu' });
    const random = await train(join(folder, 'random'), { ...settings, start: 'random' }, { device: 'cpu' });
    expect(linearly.validation!.psnr).toBeGreaterThan(random.validation!.psnr + 10);
    const [entry] = await readLog(join(folder, 'linear', 'log.jsonl'));
    expect(entry).toMatchObject({ event: 'start', start: { channels: 8, of: 8, noise: 48, values: 48 } });
    expect((await resume(join(folder, 'linear'), { device: 'cpu' })).validation).toBeUndefined();
    const refused = train(join(folder, 'other'), { model: 'x', data: photos, steps: 1, start: 'linear' });
    await expect(refused).rejects.toMatchObject({ code: 'BAD_INPUT', subject: 'start' });
  }, 240_000);
});

describe('times', () => {
  const draw = async (zero: number, seed = 1, ids = Uint32Array.from({ length: 64 }, (_, i) => i)): Promise<Float32Array> => {
    const tensor = new Tensor(native.logitNormal(seed, ids, 256, 0, 1, zero));
    const read = await tensor.read();
    tensor.dispose();
    return read.data as Float32Array;
  };

  test('are exactly 0 for the share that was asked for, and otherwise what they are without it', async () => {
    const [none, half, all] = [await draw(0), await draw(0.5), await draw(1)];
    expect(none.every((t) => t > 0)).toBe(true);
    expect(all.every((t) => t === 0)).toBe(true);
    const share = half.filter((t) => t === 0).length / half.length;
    expect(Math.abs(share - 0.5)).toBeLessThan(4 * (0.5 / Math.sqrt(half.length)));
    expect(half.every((t, i) => t === 0 || t === none[i])).toBe(true);
  });

  test('are a function of seed, image and patch', async () => {
    const [one, again, other] = [await draw(0.5), await draw(0.5, 1, Uint32Array.of(63, 5)), await draw(0.5, 2)];
    expect(again.subarray(256)).toEqual(one.subarray(5 * 256, 6 * 256));
    expect(other).not.toEqual(one);
  });

  test('refuse a share that is none', () => {
    for (const zero of [-0.1, 1.1, NaN])
      expect(() => native.logitNormal(1, Uint32Array.of(0), 4, 0, 1, zero)).toThrow(expect.objectContaining({ subject: 'zero' }));
  });
});
