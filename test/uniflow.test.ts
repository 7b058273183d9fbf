/** The tokenizer against the reference implementation's float64 values. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { join } from 'node:path';
import { nativeFlowHead, velocity } from '../lib/decoder/flow.js';
import { Tensor, tidy, UniFlow } from '../lib/index.js';
import { native } from '../lib/native.js';
import { cast } from '../lib/ops.js';
import { tensorOf } from '../lib/tensor.js';
import { golden, readTensors, relativeL2, tolerances, here } from './support.js';

const expected: Record<string, NdArray<Float32Array>> = {};
beforeAll(async () => {
  Object.assign(expected, await readTensors(join(golden('uniflow-tiny'), 'golden.safetensors')));
});

describe.each(['float32', 'bfloat16'] as const)('uniflow-tiny in %s', (dtype) => {
  let uniflow: UniFlow;
  beforeAll(async () => {
    uniflow = await UniFlow.load(golden('uniflow-tiny'), { dtype });
  });
  afterAll(() => uniflow.dispose());

  test('encode: every hidden state', async () => {
    const out = await uniflow.encode({ pixels: expected['pixels']! }, { hiddenStates: true, tokens: true });
    expect(out.grid).toEqual({ rows: 4, cols: 4 });
    expect(out.hiddenStates).toHaveLength(4);
    out.hiddenStates!.forEach((h, i) => expect(relativeL2(h, expected[`hidden.${i}`]!)).toBeLessThan(tolerances[dtype]));
    expect(relativeL2(out.latents, expected['latent']!)).toBeLessThan(tolerances[dtype]);
    expect(out.tokens!.shape).toEqual([2, 16, 64]);
  });

  test('encode: a non-square image', async () => {
    const out = await uniflow.encode({ pixels: expected['pixels_rect']! }, { hiddenStates: true });
    expect(out.grid).toEqual({ rows: 6, cols: 5 });
    expect(relativeL2(out.hiddenStates!.at(-1)!, expected['hidden_rect.last']!)).toBeLessThan(tolerances[dtype]);
  });

  test('decode: the condition of each patch, and the velocity field, fused and as single operations', async () => {
    const read = async (make: () => Tensor): Promise<NdArray> => {
      const tensor = here(() => tidy(make));
      return tensor.read().finally(() => tensor.dispose());
    };
    const flat = (name: string): Tensor => Tensor.from(ndarray(expected[name]!.data, [32, expected[name]!.shape[2]!]));
    const { decoder } = uniflow;
    const condition = await read(() => decoder.condition(cast(Tensor.from(expected['latent']!), dtype), { rows: 4, cols: 4 }));
    expect(relativeL2(condition, expected['condition']!)).toBeLessThan(tolerances[dtype]);
    const inputs = (): [Tensor, Tensor, Tensor] => [flat('noise'), Tensor.from(expected['time']!), cast(flat('condition'), dtype)];
    const fused = await read(() => {
      const [x, t, c] = inputs();
      return tensorOf(native.flowVelocity(nativeFlowHead(decoder.head), x.handle, t.handle, c.handle));
    });
    const single = await read(() => velocity(decoder.head, ...inputs(), dtype));
    for (const v of [fused, single]) expect(relativeL2(v, expected['velocity']!)).toBeLessThan(tolerances[dtype]);
  });

  test.each([
    ['linear1', { steps: 1 }],
    ['linear4', { steps: 4 }],
    ['pow0.25x5', { steps: 5, schedule: 'pow_0.25' }],
    ['linear4_guided1.5', { steps: 4, guidance: 1.5 }],
  ] as const)('decode: %s', async (name, options) => {
    const image = await uniflow.decode(expected['latent']!, { ...options, noise: expected['noise']!, output: 'float32' });
    expect(relativeL2(image, expected[`image.${name}`]!)).toBeLessThan(dtype === 'float32' ? tolerances.decode : tolerances.bfloat16);
  });

  test('decode: uint8 pixels are the float32 ones denormalised, rounded and clamped', async () => {
    const options = { steps: 1, noise: expected['noise']! };
    const bytes = await uniflow.decode(expected['latent']!, options);
    const floats = await uniflow.decode(expected['latent']!, { ...options, output: 'float32' });
    expect(bytes.shape).toEqual([2, 56, 56, 3]);
    const { mean, std } = uniflow.config;
    for (const [b, y, x, c] of [
      [0, 0, 0, 0],
      [1, 55, 55, 2],
      [0, 17, 31, 1],
    ] as const) {
      const value = 255 * (floats.get(b, c, y, x) * std[c] + mean[c]);
      expect(bytes.get(b, y, x, c)).toBe(Math.round(Math.min(255, Math.max(0, value))));
    }
  });
});

describe('reproducibility', () => {
  let uniflow: UniFlow;
  beforeAll(async () => {
    uniflow = await UniFlow.load(golden('uniflow-tiny'));
  });
  afterAll(() => uniflow.dispose());
  const row = (a: NdArray, i: number): NdArray => {
    const [, ...rest] = a.shape;
    const size = rest.reduce((x, y) => x * y, 1);
    return ndarray((a.data as unknown as Float32Array).subarray(i * size, (i + 1) * size), [1, ...rest]);
  };

  test('an image has the same latents alone and inside a batch', async () => {
    const both = await uniflow.encode({ pixels: expected['pixels']! });
    for (const i of [0, 1]) {
      const alone = await uniflow.encode({ pixels: row(expected['pixels']!, i) });
      expect(relativeL2(alone.latents, row(both.latents, i))).toBeLessThan(tolerances.batch);
    }
  });

  test('an image depends on its latent and the seed, not on the batch', async () => {
    const both = await uniflow.decode(expected['latent']!, { seed: 7, steps: 2, output: 'float32' });
    for (const i of [0, 1]) {
      const alone = await uniflow.decode(row(expected['latent']!, i), { seed: 7, steps: 2, output: 'float32' });
      expect(relativeL2(alone, row(both, i))).toBeLessThan(tolerances.batch);
    }
    const other = await uniflow.decode(expected['latent']!, { seed: 8, steps: 2, output: 'float32' });
    expect(relativeL2(other, both)).toBeGreaterThan(1e-3);
  });

  test('imageIds give images noise of their own', async () => {
    const z = row(expected['latent']!, 0);
    const twice = ndarray(Float32Array.from([...(z.data as unknown as Float32Array), ...(z.data as unknown as Float32Array)]), [2, 16, 16]);
    const own = await uniflow.decode(twice, { imageIds: [3, 4], output: 'float32' });
    expect(relativeL2(row(own, 0), row(own, 1))).toBeGreaterThan(1e-3);
    const alone = await uniflow.decode(z, { imageIds: [4], output: 'float32' });
    expect(relativeL2(alone, row(own, 1))).toBeLessThan(tolerances.batch);
  });

  test('two runs are bit-identical', async () => {
    const run = async (): Promise<Uint8Array> => {
      const { latents } = await uniflow.encode({ pixels: expected['pixels']! });
      const image = await uniflow.decode(latents, { seed: 1, steps: 3, output: 'float32' });
      return new Uint8Array((image.data as unknown as Float32Array).buffer);
    };
    expect(Buffer.compare(await run(), await run())).toBe(0);
  });
});
