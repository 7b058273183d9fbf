/** int8 inference: near the float model, the same bits in any batch, gated layer by layer, and stored with the gate's table. */
import { afterAll, beforeAll, describe, expect, jest, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { embeddedModel, setThreads, Tensor, Trainer, UniFlow, VisionEncoder } from '../lib/index.js';
import { assignParameter, type Parameter } from '../lib/parameters.js';
import { failure, golden, photos, startCommand } from './support.js';

jest.setTimeout(240_000); // for busy machines

let dir: string;
let images: string[];
let float: UniFlow;
let int8: UniFlow;

beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-int8-'));
  images = (await readdir(photos)).filter((name) => name.endsWith('.jpg')).map((name) => join(photos, name));
  float = await UniFlow.load(undefined, { device: 'cpu' });
  int8 = await UniFlow.load(undefined, { dtype: 'int8' });
});
afterAll(async () => {
  await Promise.all([float.dispose(), int8.dispose(), rm(dir, { recursive: true, force: true })]);
});

const floats = ({ data }: NdArray): Float32Array => data as unknown as Float32Array;
const bytes = (array: NdArray): Uint8Array => new Uint8Array(floats(array).slice().buffer);

/** Mean cosine of the rows of two arrays [..., n]. */
function cosine(a: NdArray, b: NdArray): number {
  const [x, y] = [floats(a), floats(b)];
  const width = a.shape.at(-1)!;
  let total = 0;
  for (let begin = 0; begin < x.length; begin += width) {
    let [xy, xx, yy] = [0, 0, 0];
    for (let i = begin; i < begin + width; i++) [xy, xx, yy] = [xy + x[i]! * y[i]!, xx + x[i]! ** 2, yy + y[i]! ** 2];
    total += xy / Math.sqrt(xx * yy);
  }
  return total / (x.length / width);
}

describe('the bundled model', () => {
  test('has int8 weights in the layers that the gate let through, and only there', () => {
    const { threshold, synthetic, layers } = int8.quantization!;
    expect({ threshold, synthetic }).toEqual({ threshold: 0.9998, synthetic: true });
    const { encoder, decoder } = int8.config;
    expect(layers).toHaveLength(4 * (encoder.layers + decoder.globalBlocks) + 3 * decoder.flowBlocks);
    for (const layer of layers) expect(layer.int8).toBe(layer.cosine >= threshold);
    const stored = new Map(int8.parameters.map(({ parts, tensor }) => [parts[0]!.name, tensor.dtype]));
    for (const { names, int8: passed } of layers) expect(stored.get(`${names[0]!}.weight`) === 'int8').toBe(passed);
    expect(layers.filter((layer) => layer.int8).length).toBeGreaterThan(layers.length / 2);
    expect(int8.precision).toBe('int8');
  });

  test('gives tokens near those of float32, and images as good', async () => {
    const [a, b] = await Promise.all([float, int8].map((model) => model.reconstruct(images, { tokens: true })));
    expect(cosine(b!.tokens!, a!.tokens!)).toBeGreaterThan(0.999);
    expect(a!.psnr - b!.psnr).toBeLessThan(0.5); // of 37.3 dB
  });

  test('gives an image the same bits in any batch, with any number of threads', async () => {
    const together = await int8.encode(images.slice(0, 3));
    setThreads(1);
    const alone = await int8.encode(images[1]!);
    setThreads(2);
    const size = bytes(alone.latents).length;
    expect(bytes(together.latents).subarray(size, 2 * size)).toEqual(bytes(alone.latents));
  });
});

describe('an int8 checkpoint', () => {
  const saved = (): string => join(dir, 'model');

  test('written by `uniflow quantize` encodes with the bits of the model that was quantised', async () => {
    const { code, stdout, stderr } = await startCommand(['quantize', embeddedModel, saved(), '--images', photos, '--count', '2', '--json'])
      .ended;
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    const report = JSON.parse(stdout) as { images: number; synthetic: boolean; layers: { int8: boolean }[] };
    expect(report).toMatchObject({ folder: saved(), images: 2, synthetic: false });

    const options = { device: 'cpu', dtype: 'int8' } as const;
    await using loaded = await UniFlow.load(saved(), options);
    expect(loaded.quantization?.layers).toEqual(report.layers);
    const first = await loaded.encode(images[0]!);
    await loaded.save(join(dir, 'again'));
    await using again = await UniFlow.load(join(dir, 'again'), options);
    expect(bytes((await again.encode(images[0]!)).latents)).toEqual(bytes(first.latents));
    expect(again.quantization).toEqual(loaded.quantization);
  });

  test('is smaller, and is described by `uniflow info`', async () => {
    const size = async (folder: string): Promise<number> => (await stat(join(folder, 'model.safetensors'))).size;
    await using half = await UniFlow.load(undefined, { device: 'cpu' });
    await half.save(join(dir, 'float'));
    expect(await size(saved())).toBeLessThan(0.8 * (await size(join(dir, 'float'))));
    const { stdout } = await startCommand(['info', saved()]).ended;
    expect(stdout).toMatch(/int8: \d+ of \d+ layers \(cosine from 0\.9998 on 2 images, -?0\.\d\d dB lost\)/);
    expect(stdout).toMatch(/ 0\.99\d+ {2}int8 /);
  });

  test('loads as float32 as well, and then trains', async () => {
    await using loaded = await UniFlow.load(saved(), { device: 'cpu' });
    expect(loaded.precision).toBe('float32');
    const { latents } = await loaded.encode(images[0]!);
    expect(cosine(latents, (await float.encode(images[0]!)).latents)).toBeGreaterThan(0.99);
    using trainer = new Trainer(loaded, { lambdaDistillation: 0 });
    expect(trainer).toBeDefined();
  });
});

test('a layer whose inputs have an outlier channel keeps its float weights', async () => {
  await using encoder = await VisionEncoder.load(golden('dinov2'), { device: 'cpu' });
  const find = (name: string): Parameter => encoder.parameters.find(({ parts }) => parts[0]!.name.endsWith(name))!;
  const scale = async (parameter: Parameter, factorOf: (i: number) => number): Promise<void> => {
    const { data, shape } = await parameter.tensor.read();
    const value = Tensor.from(
      ndarray(
        Float32Array.from(data, (v, i) => factorOf(i) * v),
        shape,
      ),
    );
    assignParameter(parameter, value.handle, 'float32');
  };
  // The second block's MLP computes the same as before, but one of its inputs is 1000 times as large, and that input's weights are as much smaller.
  const width = encoder.config.width;
  for (const name of ['layer.1.norm2.weight', 'layer.1.norm2.bias']) await scale(find(name), (i) => (i === 3 ? 1000 : 1));
  await scale(find('layer.1.mlp.fc1.weight'), (i) => (i % width === 3 ? 1e-3 : 1));
  const { layers } = await encoder.quantize(images[0]);
  const failed = layers.filter((layer) => !layer.int8).flatMap(({ names }) => names);
  expect(failed.some((name) => name.includes('layer.1.mlp.fc1'))).toBe(true);
  expect(failed.some((name) => name.includes('layer.0.mlp.fc1'))).toBe(false);
});

test('with images given, as many layers become int8 as cost at most maxLoss', async () => {
  const few: number[] = [];
  for (const maxLoss of [0, 0.1, 1]) {
    await using model = await UniFlow.load(undefined, { device: 'cpu' });
    const { layers, loss } = await model.quantize(images.slice(0, 3), { maxLoss });
    const [before, after] = await Promise.all([float, model].map(async (m) => (await m.reconstruct(images.slice(0, 3))).psnr));
    expect(before! - after!).toBeCloseTo(loss!, 5);
    expect(loss).toBeLessThanOrEqual(maxLoss);
    few.push(layers.filter((layer) => layer.int8).length);
  }
  expect(few[0]).toBeLessThan(few[1]!);
  expect(few[1]).toBeLessThan(few[2]!);
});

describe('refuses', () => {
  test('to train an int8 model, or with one as the teacher', () => {
    const expected = { code: 'UNSUPPORTED', message: expect.stringContaining('int8 weights') as unknown };
    expect(() => new Trainer(int8, { lambdaDistillation: 0 })).toThrow(expect.objectContaining(expected));
    expect(() => new Trainer(float, { teacher: int8 })).toThrow(expect.objectContaining(expected));
  });

  test('random weights, another device, and quantising twice', async () => {
    expect(() => UniFlow.random('nano', { dtype: 'int8' })).toThrow(expect.objectContaining({ code: 'UNSUPPORTED' }));
    expect(await failure(UniFlow.load(undefined, { device: 'cuda', dtype: 'int8' }))).toMatchObject({
      code: 'UNSUPPORTED',
      message: "dtype: expected 'bfloat16' on a GPU, with float8: true for 8 bits, but got 'int8', which is for the CPU",
    });
    expect(await failure(int8.quantize())).toMatchObject({ code: 'BAD_INPUT' });
  });

  test('a limit of the loss without images to measure it on, or for an encoder, which has no PSNR', async () => {
    const expected = { code: 'BAD_INPUT', message: expect.stringContaining('maxLoss') as unknown };
    expect(await failure(float.quantize(undefined, { maxLoss: 0.1 }))).toMatchObject(expected);
    const run = await startCommand(['quantize', golden('dinov2'), join(dir, 'none'), '--images', photos, '--max-loss', '0.1']).ended;
    expect(run).toMatchObject({ code: 1, stderr: expect.stringContaining('maxLoss') as unknown });
  });

  test('a threshold that is no cosine', async () => {
    expect(await failure(float.quantize(undefined, { threshold: 2 }))).toMatchObject({
      code: 'BAD_INPUT',
      message: expect.stringContaining('threshold') as unknown,
    });
  });
});
