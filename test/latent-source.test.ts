/** Sources of latents: the encoder's last layer, the sum of several layers, or a separate pass with a second patch embedding. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Trainer, train, UniFlow, VisionEncoder, type TrainConfig } from '../lib/index.js';
import { openDataset, subset } from '../lib/sources/dataset.js';
import { linearStart } from '../lib/start/index.js';
import { readLog } from '../lib/train/log.js';
import { Tensor, tidy } from '../lib/tensor.js';
import { batches } from '../lib/train/loader.js';
import { awaken, failure, golden, photos, readTensors, relativeL2 } from './support.js';

const sizes = { latentChannels: 8, globalBlocks: 1, flowBlocks: 1, seed: 3 };
const FAMILIES = ['dinov2', 'clip', 'internvl'] as const; // with a final norm; without a bias in the patch embedding; with neither

let folder: string;
let pixels: NdArray<Uint8Array>;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'uniflow-latents-'));
  const data = await openDataset(photos);
  pixels = (await batches(data, { batchSize: 4, size: 112, crop: 'center', epochs: 1 }).next()).value!.pixels;
  await data.close();
});
afterAll(() => rm(folder, { recursive: true, force: true }));

async function tokenizer(family: string, source: { latentLayers?: number; latentEmbedding?: boolean } = {}): Promise<UniFlow> {
  await using encoder = await VisionEncoder.load(golden(family), { device: 'cpu' });
  return awaken(UniFlow.fromEncoder(encoder, { ...sizes, ...source }));
}

const bits = ({ data }: NdArray): Buffer => {
  const { buffer, byteOffset, byteLength } = data as unknown as Float32Array;
  return Buffer.from(buffer as ArrayBuffer, byteOffset, byteLength);
};

/** Gradients of one reconstruction-only training step, with the encoder frozen or not. */
async function stepped(uniflow: UniFlow, freezeEncoder: boolean): Promise<Map<string, NdArray>> {
  const trainer = new Trainer(uniflow, { lambdaDistillation: 0, freezeEncoder, optimizer: { lr: 1e-3 } });
  await trainer.step({ pixels });
  const gradients = await trainer.gradients();
  await trainer.finish();
  return gradients;
}

describe.each(FAMILIES)('%s', (family) => {
  test.each([{ latentLayers: 2 }, { latentEmbedding: true }, { latentLayers: 2, latentEmbedding: true }])(
    'a model with %j encodes the same when it is saved and loaded',
    async (source) => {
      await using uniflow = await tokenizer(family, source);
      await stepped(uniflow, true);
      const dir = join(folder, `${family}-${JSON.stringify(source).replace(/\W/g, '')}`);
      await uniflow.save(dir);
      await using loaded = await UniFlow.load(dir, { device: 'cpu' });
      const own = { latentLayers: 1, latentEmbedding: false, ...source };
      expect(loaded.config).toMatchObject(own);
      const [before, after] = [await uniflow.encode({ pixels }), await loaded.encode({ pixels }, { tokens: true })];
      expect(bits(after.latents).equals(bits(before.latents))).toBe(true);
    },
  );

  test('latents of two layers are projected from the sum of their outputs', async () => {
    await using uniflow = await tokenizer(family, { latentLayers: 2 });
    const { latents, hiddenStates } = await uniflow.encode({ pixels }, { hiddenStates: true });
    const [a, b] = hiddenStates!.slice(-2) as [NdArray, NdArray];
    const sum = ndarray(
      (a.data as unknown as Float32Array).map((v, i) => v + (b.data as unknown as Float32Array)[i]!),
      a.shape,
    );
    const expected = tidy(() => uniflow.toLatents(Tensor.from(sum)));
    expect(bits(await expected.read()).equals(bits(latents))).toBe(true);
    expected.dispose();
  });

  test("a latent embedding begins as the encoder's and learns, while the tokens stay what they are to the bit", async () => {
    await using plain = await tokenizer(family);
    await using own = await tokenizer(family, { latentEmbedding: true });
    const before = await plain.encode({ pixels }, { tokens: true });
    expect(bits((await own.encode({ pixels })).latents).equals(bits(before.latents))).toBe(true);

    const gradients = await stepped(own, true);
    expect([...gradients.keys()].filter((name) => name.startsWith('vision_model.'))).toEqual([]);
    const after = await own.encode({ pixels }, { tokens: true });
    expect(bits(after.tokens!).equals(bits(before.tokens!))).toBe(true);
    expect(bits(after.latents).equals(bits(before.latents))).toBe(false);
    expect(bits((await own.encode({ pixels })).latents).equals(bits(after.latents))).toBe(true); // with or without tokens requested
  });
});

test("the gradient of a latent embedding is that of the encoder's own", async () => {
  await using own = await tokenizer('dinov2', { latentEmbedding: true });
  await using plain = await tokenizer('dinov2');
  const expected = (await stepped(plain, false)).get('vision_model.embeddings.patch_embeddings.projection.weight')!;
  expect(Math.max(...(expected.data as unknown as Float32Array))).toBeGreaterThan(0);
  expect(relativeL2((await stepped(own, true)).get('latent_embedding.weight')!, expected)).toBeLessThan(1e-4);
});

test('the linear start regresses latents from the sum of layers', async () => {
  const data = await openDataset(photos);
  const images = subset(data, [0, 1]);
  /** Fraction of the principal coefficients, normalised to variance 1, that the latents explain. */
  const carried = async (latentLayers: number): Promise<number> => {
    await using uniflow = await tokenizer('dinov2', { latentLayers });
    await linearStart(uniflow, images, { encoder: 'pretrained', size: 112 });
    const { latents } = await uniflow.encode({ pixels });
    return (latents.data as unknown as Float32Array).reduce((sum, v) => sum + v * v, 0) / latents.size;
  };
  const [last, both] = [await carried(1), await carried(2)];
  await data.close();
  expect(last).toBeGreaterThan(0);
  expect(both).toBeGreaterThan(0);
  expect(both).not.toBe(last);
});

describe('training', () => {
  const settings = (changes: Partial<TrainConfig>): TrainConfig => ({
    ...{ encoder: golden('dinov2'), data: photos, size: 112, latentChannels: 8, globalBlocks: 1, flowBlocks: 1 },
    ...{ start: 'random', steps: 3, batch: 2, dtype: 'float32', lr: 1e-2, warmup: 0 }, // gradients reach the encoder from the third step on
    ...changes,
  });
  const trained = async (name: string, changes: Partial<TrainConfig>): Promise<string> => {
    const { model } = await train(join(folder, name), settings(changes), { device: 'cpu' });
    return model;
  };

  test('reparam trains the embedding of the latents, and nothing of the encoder', async () => {
    const model = await trained('reparam', { regime: 'reparam' });
    expect(JSON.parse(await readFile(join(model, 'config.json'), 'utf8'))).toMatchObject({ latent_embedding: true });
    const [source, now] = [
      await readTensors(join(golden('dinov2'), 'model.safetensors')),
      await readTensors(join(model, 'model.safetensors')),
    ];
    for (const [name, value] of Object.entries(now))
      if (name.startsWith('vision_model.')) expect(bits(value).equals(bits(source[name.slice('vision_model.'.length)]!))).toBe(true);
    expect(bits(now['latent_embedding.weight']!).equals(bits(source['embeddings.patch_embeddings.projection.weight']!))).toBe(false);
    const [start] = await readLog(join(folder, 'reparam', 'log.jsonl'));
    const sizeOf = ([, { data }]: [string, NdArray]): number => (data as unknown as Float32Array).length;
    const learnt = Object.entries(now).filter(([name]) => !name.startsWith('vision_model.'));
    expect(start).toMatchObject({ model: { trained: learnt.map(sizeOf).reduce((a, b) => a + b) } });
  });

  test('layers adds up the last four, or as many as there are, or as are asked for', async () => {
    for (const [name, latentLayers, expected] of [['layers', undefined, 2], ['one', 1, 1]] as const) {
      const model = await trained(name, { regime: 'layers', ...(latentLayers ? { latentLayers } : {}) });
      await using loaded = await UniFlow.load(model, { device: 'cpu' });
      expect(loaded.config.latentLayers).toBe(expected);
    } // prettier-ignore
  });

  test.each<[string, Partial<TrainConfig>, RegExp]>([
    ['more layers than the encoder has', { latentLayers: 3 }, /latentLayers: expected .*2.*got 3/],
    ['reparam of a model', { encoder: undefined, model: 'x', regime: 'reparam' }, /regime: expected 'frozen', as a model says where/],
  ])('refuses %s', async (_, changes, message) => {
    expect((await failure(train(join(folder, 'refused'), settings(changes), { device: 'cpu' }))).message).toMatch(message);
  });
});

test('a config with more summed layers than the encoder has is refused', () => {
  expect(() => UniFlow.random({ ...presetWith({ latent_layers: 3 }) })).toThrow(/latent_layers: expected at most num_hidden_layers 2/);
});

function presetWith(changes: Record<string, unknown>): Record<string, unknown> {
  return { model_type: 'uniflow', hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_hidden_layers: 2, image_size: 28, patch_size: 14, latent_ch: 8, ...changes }; // prettier-ignore
}
