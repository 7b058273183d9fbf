/** Round trips: saved models load unchanged, other programs can read them, and a failed save keeps the old files. */
import { afterAll, beforeAll, describe, expect, jest, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { createHash } from 'node:crypto';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setThreads, UniFlow, UniFlowError, VisionEncoder } from '../lib/index.js';
import { golden, readTensors } from './support.js';

jest.setTimeout(120_000); // for busy machines

let dir: string;
beforeAll(async () => {
  setThreads(1);
  dir = await mkdtemp(join(tmpdir(), 'uniflow-save-'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

const families = ['clip', 'dinov2', 'dinov2-registers', 'dinov2-swiglu', 'dinov3', 'internvl', 'siglip'];
const dtypes = ['float32', 'bfloat16'] as const;
const photo = join(golden('preprocess'), 'center_crop_224.png');

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

async function header(folder: string): Promise<Record<string, Entry>> {
  const file = await readFile(join(folder, 'model.safetensors'));
  const tensors = JSON.parse(file.toString('utf8', 8, 8 + Number(file.readBigUInt64LE()))) as Record<string, Entry>;
  delete tensors['__metadata__'];
  return tensors;
}

async function shapes(folder: string): Promise<Record<string, number[]>> {
  return Object.fromEntries(Object.entries(await header(folder)).map(([name, { shape }]) => [name, shape]));
}

const json = async (folder: string, name = 'config.json'): Promise<Record<string, unknown>> =>
  JSON.parse(await readFile(join(folder, name), 'utf8')) as Record<string, unknown>;

const floats = (...shape: number[]): NdArray<Float32Array> =>
  ndarray(
    Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => Math.sin(i * i)),
    shape,
  );

const digest = (data: NodeJS.ArrayBufferView): string => createHash('sha256').update(data).digest('hex');
const bits = ({ data, shape }: NdArray): string => `${shape.join('x')} ${digest(data as unknown as Float32Array)}`;

/** All results of a tokenizer, for bit-exact comparison. */
async function results(uniflow: UniFlow): Promise<Record<string, string[]>> {
  const { patch, encoder, imageSize } = uniflow.config;
  const { latents, tokens, hiddenStates } = await uniflow.encode(
    { pixels: floats(2, 3, ...imageSize) },
    { tokens: true, hiddenStates: true },
  );
  expect(hiddenStates).toHaveLength(encoder.layers + 1);
  const rectangle = await uniflow.encode({ pixels: floats(1, 3, 3 * patch, 2 * patch) });
  const images = await uniflow.decode(latents, { steps: 2, guidance: 1.5, output: 'float32' });
  return {
    hiddenStates: hiddenStates!.map(bits),
    latents: [bits(tokens!), bits(latents), bits(rectangle.latents), bits((await uniflow.encode(photo)).latents)],
    images: [bits(images)],
  };
}

async function encoderResults(encoder: VisionEncoder): Promise<Record<string, string[]>> {
  const { hiddenStates, lastHiddenState } = await encoder.encode(
    { pixels: floats(2, 3, ...encoder.config.imageSize) },
    { hiddenStates: true },
  );
  return { hiddenStates: hiddenStates!.map(bits), last: [bits(lastHiddenState), bits((await encoder.encode(photo)).lastHiddenState)] };
}

/** The files of a folder with their contents. */
async function contents(folder: string): Promise<Record<string, string>> {
  const names = (await readdir(folder)).sort();
  return Object.fromEntries(await Promise.all(names.map(async (name) => [name, digest(await readFile(join(folder, name)))] as const)));
}

describe.each(dtypes)('UniFlow in %s', (dtype) => {
  test('saved and loaded, gives the same bits', async () => {
    const folder = join(dir, `uniflow-${dtype}`);
    const uniflow = await UniFlow.load(golden('uniflow-tiny'), { dtype });
    await uniflow.save(folder);
    const again = await UniFlow.load(folder, { dtype });
    expect(await results(again)).toEqual(await results(uniflow));
    expect(again.config).toEqual(uniflow.config);
    expect((await json(folder))['torch_dtype']).toBe(dtype);
    expect((await readdir(folder)).sort()).toEqual(['config.json', 'model.safetensors']);

    await again.save(join(dir, `uniflow-${dtype}-2`));
    expect(await contents(join(dir, `uniflow-${dtype}-2`))).toEqual(await contents(folder));
    for (const model of [uniflow, again]) await model.dispose();
  });

  test('a fresh one too', async () => {
    const uniflow = UniFlow.random('nano', { seed: 3, dtype });
    await uniflow.save(join(dir, `nano-${dtype}`));
    const again = await UniFlow.load(join(dir, `nano-${dtype}`), { dtype });
    expect(await results(again)).toEqual(await results(uniflow));
    for (const model of [uniflow, again]) await model.dispose();
  });

  test.each(families)('on the encoder %s', async (family) => {
    const folder = join(dir, `${family}-${dtype}`);
    const encoder = await VisionEncoder.load(golden(family), { dtype });
    const { mean, std } = encoder.preprocessing;
    const config = { latentChannels: 8, globalBlocks: 1, flowBlocks: 1 };
    if (encoder.config.width % 16 !== 0) {
      expect(() => UniFlow.fromEncoder(encoder, config)).toThrow(UniFlowError);
      return encoder.dispose();
    }
    const uniflow = UniFlow.fromEncoder(encoder, { ...config, seed: 5 });
    await encoder.dispose(); // they share the weights, which stay until both are disposed of
    await uniflow.save(folder);
    const again = await UniFlow.load(folder, { dtype });
    expect(await results(again)).toEqual(await results(uniflow));
    expect(again.config).toEqual(uniflow.config);
    expect(again.config).toMatchObject({ mean, std });
    for (const model of [uniflow, again]) await model.dispose();
  });

  test.each(families)('the encoder %s itself', async (family) => {
    const folder = join(dir, `encoder-${family}-${dtype}`);
    const encoder = await VisionEncoder.load(golden(family), { dtype });
    await encoder.save(folder);
    const again = await VisionEncoder.load(folder, { dtype });
    expect(await encoderResults(again)).toEqual(await encoderResults(encoder));
    for (const model of [encoder, again]) await model.dispose();
  });
});

describe('the layout', () => {
  test('of a UniFlow is the published one: names, shapes, values, config', async () => {
    const folder = join(dir, 'published');
    const uniflow = await UniFlow.load(golden('uniflow-tiny'));
    await uniflow.save(folder);
    await uniflow.dispose();
    expect(await shapes(folder)).toEqual(await shapes(golden('uniflow-tiny')));
    const values = async (of: string): Promise<unknown> =>
      Object.fromEntries(Object.entries(await readTensors(join(of, 'model.safetensors'))).map(([name, tensor]) => [name, bits(tensor)]));
    expect(await values(folder)).toEqual(await values(golden('uniflow-tiny')));
    expect(await json(folder)).toEqual(await json(golden('uniflow-tiny')));
  });

  test.each(families)('of the encoder %s is its own', async (family) => {
    const folder = join(dir, `published-${family}`);
    const encoder = await VisionEncoder.load(golden(family));
    await encoder.save(folder);
    await encoder.dispose();
    const [saved, published] = [await shapes(folder), await shapes(golden(family))];
    // a published checkpoint may contain more: a mask token, a pooling head, an unused norm; and prefixes of a larger model
    for (const [name, shape] of Object.entries(saved)) {
      const theirs = Object.keys(published).find((key) => key === name || key.endsWith(`.${name}`));
      expect({ name, shape: theirs && published[theirs] }).toEqual({ name, shape });
    }
    expect(Object.keys(published).length - Object.keys(saved).length).toBeLessThan(12);
  });

  test('lies in the file without a gap, at a multiple of 8', async () => {
    const folder = join(dir, 'aligned');
    const uniflow = UniFlow.random('nano');
    await uniflow.save(folder, { dtype: 'bfloat16' });
    await uniflow.dispose();
    const file = await readFile(join(folder, 'model.safetensors'));
    const length = Number(file.readBigUInt64LE());
    expect(length % 8).toBe(0);
    let end = 0;
    for (const [name, { data_offsets, shape, dtype }] of Object.entries(await header(folder))) {
      expect({ name, begin: data_offsets[0] }).toEqual({ name, begin: end });
      end = data_offsets[1];
      expect(end - data_offsets[0]).toBe(shape.reduce((a, b) => a * b, dtype === 'BF16' ? 2 : 4));
    }
    expect(file.length).toBe(8 + length + end);
  });
});

test('an encoder keeps the preprocessing that its folder said', async () => {
  const [source, folder] = [join(dir, 'processor'), join(dir, 'processor-saved')];
  await cp(golden('dinov2'), source, { recursive: true });
  const processor = {
    do_resize: true,
    size: { height: 56, width: 56 },
    resample: 2,
    image_mean: [0.1, 0.2, 0.3],
    image_std: [0.4, 0.5, 0.6],
  };
  await writeFile(join(source, 'preprocessor_config.json'), JSON.stringify(processor));
  const encoder = await VisionEncoder.load(source);
  await encoder.save(folder);
  const again = await VisionEncoder.load(folder);
  expect(again.preprocessing).toEqual(encoder.preprocessing);
  expect(await encoderResults(again)).toEqual(await encoderResults(encoder));
  for (const model of [encoder, again]) await model.dispose();
});

test('a UniFlow on an InternViT keeps the statistics that the encoder had', async () => {
  const [source, folder] = [join(dir, 'internvit'), join(dir, 'internvit-saved')];
  await writeInternVit(source);
  await writeFile(join(source, 'preprocessor_config.json'), JSON.stringify({ image_mean: [0.1, 0.2, 0.3], image_std: [0.4, 0.5, 0.6] }));
  const encoder = await VisionEncoder.load(source);
  const uniflow = UniFlow.fromEncoder(encoder, { latentChannels: 8, globalBlocks: 1, flowBlocks: 1 });
  expect(uniflow.config.mean).toEqual([0.1, 0.2, 0.3]);
  await uniflow.save(folder);
  const again = await UniFlow.load(folder);
  expect(again.config).toEqual(uniflow.config);
  expect(await results(again)).toEqual(await results(uniflow));
  for (const model of [encoder, uniflow, again]) await model.dispose();
});

/** The encoder of uniflow-tiny as a separate checkpoint. */
async function writeInternVit(folder: string): Promise<void> {
  await mkdir(folder);
  const { hidden_size, intermediate_size, num_attention_heads, num_hidden_layers, image_size, patch_size } = await json(
    golden('uniflow-tiny'),
  );
  const config = {
    model_type: 'intern_vit_6b',
    hidden_size,
    intermediate_size,
    num_attention_heads,
    num_hidden_layers,
    image_size,
    patch_size,
  };
  await writeFile(join(folder, 'config.json'), JSON.stringify(config));
  const file = await readFile(join(golden('uniflow-tiny'), 'model.safetensors'));
  const data = file.subarray(8 + Number(file.readBigUInt64LE()));
  const tensors: Record<string, Entry> = {};
  const parts: Buffer[] = [];
  let end = 0;
  for (const [name, { data_offsets, ...entry }] of Object.entries(await header(golden('uniflow-tiny')))) {
    if (!/^(embeddings|encoder)\./.test(name)) continue;
    const part = data.subarray(...data_offsets);
    tensors[name] = { ...entry, data_offsets: [end, (end += part.length)] };
    parts.push(part);
  }
  const text = Buffer.from(JSON.stringify(tensors));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  await writeFile(join(folder, 'model.safetensors'), Buffer.concat([length, text, ...parts]));
}

describe('saving over what is there', () => {
  async function saved(name: string): Promise<{ folder: string; before: Record<string, string> }> {
    const folder = join(dir, name);
    const old = UniFlow.random('nano', { seed: 1 });
    await old.save(folder);
    await old.dispose();
    return { folder, before: await contents(folder) };
  }

  test('replaces it', async () => {
    const { folder, before } = await saved('replaced');
    const next = UniFlow.random('nano', { seed: 2 });
    await next.save(folder);
    const after = await contents(folder);
    expect(Object.keys(after)).toEqual(Object.keys(before));
    expect(after['model.safetensors']).not.toBe(before['model.safetensors']);
    await next.dispose();
  });

  test('leaves it as it is when the model goes meanwhile', async () => {
    const { folder, before } = await saved('disposed');
    const next = UniFlow.random('nano', { seed: 2 });
    const saving = next.save(folder).then(
      () => 'saved',
      (error: UniFlowError) => error.code,
    );
    await new Promise(setImmediate);
    await next.dispose();
    expect(await saving).toBe('DISPOSED');
    expect(await contents(folder)).toEqual(before);
  });

  test('leaves it as it is when it is aborted', async () => {
    const { folder, before } = await saved('aborted');
    const next = UniFlow.random('tiny', { seed: 2 });
    for (const delay of [0, 20]) {
      const controller = new AbortController();
      const saving = next.save(folder, { signal: controller.signal });
      setTimeout(() => controller.abort('enough'), delay);
      await expect(saving).rejects.toMatchObject({ name: 'UniFlowError', code: 'ABORTED', cause: 'enough' });
    }
    await expect(next.save(folder, { signal: AbortSignal.abort('before') })).rejects.toMatchObject({ code: 'ABORTED', cause: 'before' });
    expect(await contents(folder)).toEqual(before);
    await next.dispose();
  });

  test('leaves the old weights when config.json cannot be written: never new weights with an old config', async () => {
    const { folder, before } = await saved('torn');
    await rm(join(folder, 'config.json'));
    await mkdir(join(folder, 'config.json', 'in the way'), { recursive: true });
    const next = UniFlow.random('nano', { seed: 2 });
    await expect(next.save(folder)).rejects.toMatchObject({ name: 'UniFlowError', code: 'BAD_INPUT' });
    expect(digest(await readFile(join(folder, 'model.safetensors')))).toBe(before['model.safetensors']);
    expect((await readdir(folder)).sort()).toEqual(['config.json', 'model.safetensors']);
    await next.dispose();
  });

  test('by two at once leaves one of them, whole', async () => {
    const folder = join(dir, 'two');
    const models = [UniFlow.random('nano', { seed: 1 }), UniFlow.random('nano', { seed: 2 })];
    await Promise.all(models.map((model) => model.save(folder)));
    const winner = await UniFlow.load(folder);
    const [result, ...candidates] = await Promise.all([winner, ...models].map(async (model) => bits((await model.encode(photo)).latents)));
    expect(candidates).toContain(result);
    expect((await readdir(folder)).sort()).toEqual(['config.json', 'model.safetensors']);
    for (const model of [winner, ...models]) await model.dispose();
  });

  test('of itself, into the folder that it was loaded from', async () => {
    const { folder } = await saved('itself');
    const uniflow = await UniFlow.load(folder);
    const before = await results(uniflow);
    await uniflow.save(folder);
    expect(await results(uniflow)).toEqual(before);
    const again = await UniFlow.load(folder);
    expect(await results(again)).toEqual(before);
    for (const model of [uniflow, again]) await model.dispose();
  });
});
