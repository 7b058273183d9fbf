/** Expectations of device 'cuda': the CPU's results, memory that is freed, and devices used concurrently. */
import { afterAll, beforeAll, describe, expect, jest, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  devices,
  memoryStats,
  presets,
  Trainer,
  UniFlow,
  UniFlowError,
  VisionEncoder,
  type DecodeOptions,
  type DeviceOptions,
  type MemoryStats,
  type StepResult,
} from '../lib/index.js';
import { native } from '../lib/native.js';
import { onDevice, Tensor } from '../lib/tensor.js';
import { Compiled, inWorker } from './fixtures/child.js';
import { awaken, failure, golden, photos, readTensors, relativeL2, tolerances } from './support.js';

jest.setTimeout(60_000);

const gpu = devices().find(({ name, available }) => name.startsWith('cuda') && available);
const none = devices()
  .find(({ name }) => name.startsWith('cuda'))
  ?.description.split('\n')[0];
const suite = gpu ? describe : describe.skip;
const reason = gpu ? gpu.description : `skipped, as no GPU is available: ${none}`;

const dtypes = ['float32', 'bfloat16'] as const;
const decodeTolerance = (dtype: 'float32' | 'bfloat16'): number => (dtype === 'float32' ? tolerances.decode : tolerances.bfloat16);

const wave = (shape: number[]): NdArray<Float32Array> =>
  ndarray(
    new Float32Array(shape.reduce((a, b) => a * b, 1)).map((_, i) => Math.sin(i + Math.sin(0.01 * i))),
    shape,
  );
const pixels = (batch = 1, side = 56): { pixels: NdArray<Float32Array> } => ({ pixels: wave([batch, 3, side, side]) });
const latents = (batch = 1, patches = 16): NdArray<Float32Array> => wave([batch, patches, 16]);

/** The same model on the CPU and on the GPU. */
const both = (options: Omit<DeviceOptions, 'device'> = {}): [cpu: UniFlow, cuda: UniFlow] => [
  awaken(UniFlow.random('nano', { ...options, seed: 3, device: 'cpu' })),
  awaken(UniFlow.random('nano', { ...options, seed: 3, device: 'cuda' })),
];

/** Memory statistics of the GPU; zeros before its first use. */
const memory = (): MemoryStats => memoryStats().devices['cuda:0'] ?? { active: 0, peak: 0, pool: 0 };

/** Waits until the device has freed the uploads that it frees after the last result. */
async function settled(expected: Partial<MemoryStats>): Promise<void> {
  const there = (): boolean => Object.entries(expected).every(([name, value]) => memory()[name as keyof MemoryStats] === value);
  for (let i = 0; i < 100 && !there(); i++) await new Promise((resolve) => setTimeout(resolve, 10));
  expect(memory()).toMatchObject(expected);
}

/** Memory in use after the uploads have been freed. */
async function rest(): Promise<MemoryStats> {
  let now = memory();
  for (let quiet = 0; quiet < 5;) {
    await new Promise((resolve) => setTimeout(resolve, 5));
    const next = memory();
    quiet = next.active === now.active ? quiet + 1 : 0;
    now = next;
  }
  return now;
}

/** Creates the backend's workspace, which lives as long as the process. */
async function warm(): Promise<void> {
  await using uniflow = UniFlow.random('nano', { device: 'cuda' });
  await uniflow.encode(pixels());
}

async function inFolder<T>(work: (dir: string) => Promise<T>): Promise<T> {
  const dir = await mkdtemp(join(tmpdir(), 'uniflow-cuda-'));
  try {
    return await work(dir);
  } finally {
    await rm(dir, { recursive: true });
  }
}

const savedWeights = (uniflow: UniFlow): Promise<Buffer> =>
  inFolder(async (dir) => {
    await uniflow.save(dir);
    return readFile(join(dir, 'model.safetensors'));
  });

function cosine(a: NdArray, b: NdArray): number {
  const [x, y] = [a.data, b.data] as unknown as [Float32Array, Float32Array];
  let [xy, xx, yy] = [0, 0, 0];
  x.forEach((v, i) => {
    xy += v * y[i]!;
    xx += v * v;
    yy += y[i]! ** 2;
  });
  return xy / Math.sqrt(xx * yy);
}

/** Frees tensors that earlier tests left to the garbage collector, which would otherwise free memory in the middle of a test. */
async function collectGarbage(): Promise<void> {
  setFlagsFromString('--expose-gc');
  const gc = runInNewContext('gc') as () => void;
  for (let i = 0; i < 3; i++) {
    gc();
    await new Promise((resolve) => setImmediate(resolve)); // finalizers run in between
  }
}

/** Allocates tensors that fill the GPU's memory except for a few KiB. */
async function filled(): Promise<Tensor[]> {
  await collectGarbage();
  const tensors: Tensor[] = [];
  for (const bytes of [2 ** 28, 2 ** 22, 2 ** 16, 2 ** 12]) {
    for (let fits = true; fits;) {
      const tensor = onDevice('cuda:0', () => new Tensor(native.constantParameter([bytes / 4], 0)));
      fits = await native.synchronize([tensor.handle]).then(
        () => true,
        () => false,
      );
      if (fits) tensors.push(tensor);
      else tensor.dispose();
    }
  }
  return tensors;
}

suite(`device 'cuda' (${reason})`, () => {
  describe('the device', () => {
    test('is listed as cuda:0 with what it is', () => {
      expect(devices()[0]).toMatchObject({ name: 'cpu', available: true });
      expect(gpu).toMatchObject({ name: 'cuda:0', available: true });
      expect(gpu!.description).toMatch(/, \d+ GiB, sm_\d+, CUDA \d+\.\d+, cuBLASLt /);
    });

    test.each<[string, DeviceOptions]>([
      ['by default', {}],
      ["as 'auto'", { device: 'auto' }],
      ["as 'cuda'", { device: 'cuda' }],
      ["as 'cuda:0'", { device: 'cuda:0' }],
    ])('has a model %s', async (_, options) => {
      await using uniflow = UniFlow.random('nano', options);
      expect(uniflow.device).toBe('cuda:0');
      expect(uniflow.parameters.map(({ tensor }) => tensor.device)).toEqual(uniflow.parameters.map(() => 'cuda:0'));
    });

    test("'cpu' keeps a model off it", async () => {
      const before = await rest();
      await using uniflow = UniFlow.random('nano', { device: 'cpu' });
      await uniflow.decode((await uniflow.encode(pixels())).latents);
      expect(uniflow.device).toBe('cpu');
      expect(memory()).toEqual(before);
    });

    test('that does not exist is UNSUPPORTED, and what there is is named', async () => {
      const load = (): Promise<UniFlow> => UniFlow.load(golden('uniflow-tiny'), { device: 'cuda:63' });
      const error = await failure(load());
      expect(error.code).toBe('UNSUPPORTED');
      expect(error.message).toContain("'cuda:63'");
      expect(error.message).toContain('cuda:0');
      expect(() => UniFlow.random('nano', { device: 'cuda:63' })).toThrow(error.message);
    });

    test.each(['gpu', 'cuda:', 'cuda:x', 'cuda:-1'])('%s is BAD_INPUT', (device) => {
      expect(() => UniFlow.random('nano', { device: device as 'cuda' })).toThrow(expect.objectContaining({ code: 'BAD_INPUT' }));
    });
  });

  describe.each(dtypes)('%s', (dtype) => {
    describe('a random model gives what it gives on the CPU', () => {
      let cpu: UniFlow;
      let cuda: UniFlow;
      beforeAll(() => {
        [cpu, cuda] = both({ dtype });
      });
      afterAll(() => Promise.all([cpu.dispose(), cuda.dispose()]));

      test('the same weights from the same seed, to the bit', async () => {
        expect((await savedWeights(cuda)).equals(await savedWeights(cpu))).toBe(true);
      });

      test.each([
        [1, 28],
        [3, 56],
        [2, 70],
      ])('encode %i images of %i pixels: latents, tokens, hidden states', async (batch, side) => {
        const options = { tokens: true, hiddenStates: true };
        const [want, got] = [await cpu.encode(pixels(batch, side), options), await cuda.encode(pixels(batch, side), options)];
        expect(got.grid).toEqual(want.grid);
        expect(relativeL2(got.latents, want.latents)).toBeLessThan(tolerances[dtype]);
        expect(relativeL2(got.tokens!, want.tokens!)).toBeLessThan(tolerances[dtype]);
        expect(got.hiddenStates).toHaveLength(3);
        got.hiddenStates!.forEach((state, i) => expect(relativeL2(state, want.hiddenStates![i]!)).toBeLessThan(tolerances[dtype]));
      });

      test('encode images of a file, and of bytes as pixels', async () => {
        const path = join(photos, 'fig.jpg');
        const [want, got] = [await cpu.encode([path, path], { size: 56 }), await cuda.encode([path, path], { size: 56 })];
        expect(relativeL2(got.latents, want.latents)).toBeLessThan(tolerances[dtype]);
        const bytes = {
          pixels: ndarray(
            Uint8Array.from({ length: 56 * 56 * 3 }, (_, i) => (i * 7) % 256),
            [1, 56, 56, 3],
          ),
        };
        expect(relativeL2((await cuda.encode(bytes)).latents, (await cpu.encode(bytes)).latents)).toBeLessThan(tolerances[dtype]);
      });

      test('encodeStream', async () => {
        const path = join(golden('preprocess'), 'photo.png');
        const want = await cpu.encode(path);
        for await (const { ids, latents } of cuda.encodeStream([path])) {
          expect(ids).toEqual([path]);
          expect(relativeL2(latents, want.latents)).toBeLessThan(tolerances[dtype]);
        }
      });

      test.each<[string, DecodeOptions]>([
        ['one step', { steps: 1 }],
        ['several steps', { steps: 4 }],
        ['another schedule', { steps: 5, schedule: 'pow_0.25' }],
        ['guidance', { steps: 3, guidance: 1.5 }],
        ['another seed', { seed: 7 }],
        ['a large seed', { seed: 2 ** 40 + 1 }],
        ['imageIds', { steps: 2, imageIds: [4, 2 ** 32 - 1] }],
        ['noise of its own', { steps: 2, noise: wave([2, 16, 588]) }],
        ['another grid', { grid: { rows: 2, cols: 8 } }],
      ])('decode with %s, to float32 and to uint8', async (_, options) => {
        for (const output of ['float32', 'uint8'] as const) {
          const want = await cpu.decode(latents(2), { ...options, output });
          const got = await cuda.decode(latents(2), { ...options, output });
          expect(got.data.constructor.name).toBe(output === 'uint8' ? 'Uint8Array' : 'Float32Array');
          expect(relativeL2(got, want)).toBeLessThan(decodeTolerance(dtype));
        }
      });

      test('reconstruct, with psnr and ssim', async () => {
        const options = { steps: 2, seed: 1 };
        const [want, got] = [await cpu.reconstruct(pixels(2), options), await cuda.reconstruct(pixels(2), options)];
        expect(got.originals).toEqual(want.originals);
        expect(relativeL2(got.images, want.images)).toBeLessThan(decodeTolerance(dtype));
        for (const measure of ['psnr', 'ssim'] as const) {
          const close = (a: number, b: number): void =>
            expect(Math.abs(a - b)).toBeLessThan(decodeTolerance(dtype) * Math.max(1, Math.abs(b)));
          close(got[measure], want[measure]);
          got.perImage[measure].forEach((value, i) => close(value, want.perImage[measure][i]!));
        }
      });

      test('decodes of one shape are the same to the bit, however often: the second is recorded, the later ones replay it', async () => {
        for (const options of [{ steps: 3 }, { steps: 2, guidance: 2 }, { steps: 1, imageIds: [1, 2, 3] }] as DecodeOptions[]) {
          const first = await cuda.decode(latents(3), { ...options, output: 'float32' });
          for (let i = 0; i < 4; i++) expect(await cuda.decode(latents(3), { ...options, output: 'float32' })).toEqual(first);
        }
      });

      test('a replayed decode takes the new latents, seed and noise', async () => {
        const inputs: [NdArray<Float32Array>, DecodeOptions][] = [
          [latents(2), {}],
          [latents(2), { seed: 5 }],
          [
            ndarray(
              latents(2).data.map((v) => -v),
              [2, 16, 16],
            ),
            {},
          ],
          [latents(2), { noise: wave([2, 16, 588]) }],
          [latents(2), { output: 'float32' }],
        ];
        for (let round = 0; round < 2; round++)
          for (const [z, options] of inputs)
            expect(relativeL2(await cuda.decode(z, { ...options, steps: 6 }), await cpu.decode(z, { ...options, steps: 6 }))).toBeLessThan(
              decodeTolerance(dtype),
            );
      });

      test('a batch in parts gives what the whole batch gives', async () => {
        const whole = await cuda.encode(pixels(5), { batchSize: 5 });
        const image = await cuda.decode(latents(5), { batchSize: 5, output: 'float32' });
        const limit = dtype === 'float32' ? tolerances.batch : tolerances.bfloat16;
        for (const batchSize of [1, 2, 4]) {
          expect(relativeL2((await cuda.encode(pixels(5), { batchSize })).latents, whole.latents)).toBeLessThan(limit);
          expect(relativeL2(await cuda.decode(latents(5), { batchSize, output: 'float32' }), image)).toBeLessThan(limit);
        }
      });

      test('save() writes what another device loads', () =>
        inFolder(async (dir) => {
          await cuda.save(dir);
          await using there = await UniFlow.load(dir, { device: 'cpu', dtype });
          await using back = await UniFlow.load(dir, { device: 'cuda', dtype });
          const [want, got] = [(await cuda.encode(pixels(2))).latents, (await there.encode(pixels(2))).latents];
          expect(there.device).toBe('cpu');
          expect(got).toEqual((await cpu.encode(pixels(2))).latents);
          expect(relativeL2(got, want)).toBeLessThan(tolerances[dtype]);
          expect((await back.encode(pixels(2))).latents).toEqual(want);
        }));
    });

    describe('published encoders', () => {
      test('DINOv2 with registers against its own implementation', async () => {
        const expected = await readTensors(join(golden('dinov2-registers'), 'golden.safetensors'));
        await using encoder = await VisionEncoder.load(golden('dinov2-registers'), { device: 'cuda', dtype });
        const out = await encoder.encode({ pixels: expected['pixels']! }, { hiddenStates: true });
        expect(encoder.device).toBe('cuda:0');
        expect(out.hiddenStates!.length).toBeGreaterThan(1);
        out.hiddenStates!.forEach((state, i) => expect(relativeL2(state, expected[`hidden.${i}`]!)).toBeLessThan(tolerances[dtype]));
        expect(relativeL2(out.lastHiddenState, expected['last_hidden_state']!)).toBeLessThan(tolerances[dtype]);
        const other = await encoder.encode({ pixels: expected['pixels_rect']! });
        expect(relativeL2(other.lastHiddenState, expected['last_hidden_state_rect']!)).toBeLessThan(tolerances[dtype]);
      });

      test('a tokenizer on one: its decoder is where the encoder is, as it would be on the CPU', async () => {
        const [want, got] = await Promise.all(
          (['cpu', 'cuda'] as const).map(async (device) => {
            await using encoder = await VisionEncoder.load(golden('dinov2'), { device, dtype });
            await using uniflow = UniFlow.fromEncoder(encoder, { latentChannels: 16, globalBlocks: 1, flowBlocks: 1, seed: 5 });
            const { latents, grid } = await uniflow.encode(pixels(2));
            return { device: uniflow.device, latents, images: await uniflow.decode(latents, { grid, steps: 2, output: 'float32' }) };
          }),
        );
        expect([want!.device, got!.device]).toEqual(['cpu', 'cuda:0']);
        expect(relativeL2(got!.latents, want!.latents)).toBeLessThan(tolerances[dtype]);
        expect(relativeL2(got!.images, want!.images)).toBeLessThan(decodeTolerance(dtype));
      });
    });
  });

  describe('float8', () => {
    const float8 = (options: DeviceOptions = {}): UniFlow =>
      UniFlow.random('nano', { seed: 3, device: 'cuda', dtype: 'bfloat16', float8: true, ...options });

    test('latents stay near those of float32, and images can be made of them', async () => {
      await using exact = UniFlow.random('nano', { seed: 3, device: 'cpu' });
      await using uniflow = float8();
      const [want, got] = [await exact.encode(pixels(4)), await uniflow.encode(pixels(4))];
      const near = cosine(got.latents, want.latents);
      console.log(`float8: cosine of the latents to float32's ${near.toFixed(5)}`);
      expect(near).toBeGreaterThan(0.99);
      expect((await uniflow.decode(got.latents)).shape).toEqual([4, 56, 56, 3]);
    });

    test("takes less memory than bfloat16's weights", async () => {
      const bytes = (uniflow: UniFlow): number => uniflow.parameters.reduce((sum, { tensor }) => sum + tensor.handle.bytes, 0);
      await using half = UniFlow.random('nano', { device: 'cuda', dtype: 'bfloat16' });
      await using uniflow = float8();
      expect(bytes(uniflow)).toBeLessThan(bytes(half));
    });

    test('is refused with float32, which is the default', () => {
      for (const options of [{ float8: true }, { float8: true, dtype: 'float32' as const }])
        expect(() => UniFlow.random('nano', { device: 'cuda', ...options })).toThrow(
          expect.objectContaining({ code: 'BAD_INPUT', message: "dtype: expected 'bfloat16', with float8 weights, but got 'float32'" }),
        );
    });

    test('is refused on the CPU', () => {
      expect(() => float8({ device: 'cpu' })).toThrow(
        expect.objectContaining({ code: 'UNSUPPORTED', message: "float8: expected a GPU, but got device 'cpu'" }),
      );
    });

    test('is refused where a width is no multiple of 16, by the sizes', () => {
      expect(() =>
        UniFlow.random({ ...presets.nano, intermediate_size: 200 }, { device: 'cuda', dtype: 'bfloat16', float8: true }),
      ).toThrow(expect.objectContaining({ code: 'UNSUPPORTED', message: expect.stringMatching(/multiples of 16.*\[200, 64\]/) }));
    });

    test('reads a published encoder, and a tokenizer on it', async () => {
      const images = pixels(2);
      await using exact = await VisionEncoder.load(golden('dinov2'), { device: 'cpu' });
      await using encoder = await VisionEncoder.load(golden('dinov2'), { device: 'cuda', dtype: 'bfloat16', float8: true });
      const [want, got] = [await exact.encode(images), await encoder.encode(images)];
      expect(cosine(got.lastHiddenState, want.lastHiddenState)).toBeGreaterThan(0.99);
      const uniflow = UniFlow.fromEncoder(encoder, { latentChannels: 16, globalBlocks: 1, flowBlocks: 1 });
      const { latents, grid } = await uniflow.encode(images);
      expect((await uniflow.decode(latents, { grid })).shape).toEqual([2, 56, 56, 3]);
      await uniflow.dispose();
      expect((await encoder.encode(images)).lastHiddenState).toEqual(got.lastHiddenState);
    });

    test('training and save() refuse the rounded weights, and leave the model as it was', () =>
      inFolder(async (dir) => {
        await using uniflow = float8();
        const want = (await uniflow.encode(pixels())).latents;
        const handles = memoryStats().handles;
        const refusals = [
          failure(uniflow.save(join(dir, 'model'))),
          failure((async () => new Trainer(uniflow, { lambdaDistillation: 0 }).step({ pixels: pixels(2).pixels }))()),
        ];
        for (const error of await Promise.all(refusals)) {
          expect(error.code).toBe('UNSUPPORTED');
          expect(error.message).toContain('float8');
        }
        expect(await readdir(dir)).toEqual([]);
        expect(memoryStats().handles).toBe(handles);
        expect((await uniflow.encode(pixels())).latents).toEqual(want);
      }));
  });

  describe('training', () => {
    const batch = { pixels: wave([2, 3, 56, 56]) };
    const optimizer = { lr: 1e-4, ema: 0.9 };

    async function trained(device: 'cpu' | 'cuda', more = {}): Promise<{ results: StepResult[]; latents: NdArray; images: NdArray }> {
      await using uniflow = UniFlow.random('nano', { seed: 3, device });
      await using teacher = UniFlow.random('nano', { seed: 4, device });
      const trainer = new Trainer(uniflow, { teacher, optimizer, ...more });
      const results: StepResult[] = [];
      for (let i = 0; i < 4; i++) results.push(await trainer.step(batch));
      await trainer.finish();
      const { latents } = await uniflow.encode(pixels(2));
      return { results, latents, images: await uniflow.decode(latents, { steps: 2, output: 'float32' }) };
    }

    test.each([
      ['as it is', {}],
      ['recomputing, in two parts', { recompute: true, accumulate: 2 }],
      ['with times near the middle', { time: { mean: 0, std: 1 } }],
      ['of the decoder alone', { freezeEncoder: true, lambdaDistillation: 0 }],
    ])('%s: the losses and gradients of the CPU, and a model that works', async (_, options) => {
      const [want, got] = [await trained('cpu', options), await trained('cuda', options)];
      got.results.forEach((result, i) => {
        for (const name of ['loss', 'flow', 'distillation', 'gradNorm'] as const) {
          const value = want.results[i]![name];
          expect(Math.abs(result[name] - value)).toBeLessThan(1e-4 * Math.max(1, Math.abs(value)));
        }
        expect(result.skipped).toBe(false);
      });
      expect(got.results[3]!.loss).toBeLessThan(got.results[0]!.loss);
      expect(relativeL2(got.latents, want.latents)).toBeLessThan(tolerances.decode); // Adam's first steps equal the gradient's sign
      expect(relativeL2(got.images, want.images)).toBeLessThan(tolerances.decode);
    });

    test('in bfloat16', async () => {
      await using uniflow = UniFlow.random('nano', { device: 'cuda', dtype: 'bfloat16' });
      const trainer = new Trainer(uniflow, { lambdaDistillation: 0, optimizer: { lr: 1e-3 } });
      const losses = [];
      for (let i = 0; i < 4; i++) losses.push((await trainer.step(batch)).loss);
      expect(losses[3]).toBeLessThan(losses[0]!);
      await trainer.finish();
      expect((await uniflow.encode(pixels())).latents.shape).toEqual([1, 16, 16]);
    });

    test('a teacher on another device is refused with both named, and nothing is left', async () => {
      for (const [mine, other] of [
        ['cuda', 'cpu'],
        ['cpu', 'cuda'],
      ] as const) {
        await using uniflow = UniFlow.random('nano', { device: mine });
        await using teacher = UniFlow.random('nano', { device: other });
        const before = memoryStats().handles;
        const train = async (): Promise<unknown> => new Trainer(uniflow, { teacher }).step(batch);
        const error = await failure(train());
        expect(error.code).toBe('BAD_INPUT');
        expect(error.message).toContain('teacher');
        expect(error.message).toContain('cpu');
        expect(error.message).toContain('cuda:0');
        expect(memoryStats().handles).toBe(before);
      }
    });

    test('gives its memory back', async () => {
      await warm();
      await trained('cuda'); // its decode may leave a recorded graph
      const cycle = async (): Promise<number> => {
        await using uniflow = UniFlow.random('nano', { device: 'cuda' });
        const trainer = new Trainer(uniflow, { lambdaDistillation: 0 });
        for (let i = 0; i < 3; i++) await trainer.step(batch);
        await trainer.finish();
        await uniflow.dispose();
        return (await rest()).active;
      };
      const before = (await rest()).active;
      for (let i = 0; i < 3; i++) expect(await cycle()).toBe(before);
    });
  });

  describe('memory', () => {
    beforeAll(warm);

    test('is flat over fifty encodes and decodes', async () => {
      await using uniflow = UniFlow.random('nano', { device: 'cuda' });
      const use = async (): Promise<unknown> => uniflow.decode((await uniflow.encode(pixels(2))).latents);
      for (let i = 0; i < 10; i++) await use();
      const { active, pool } = await rest();
      const handles = memoryStats().handles;
      for (let i = 0; i < 50; i++) await use();
      await settled({ active });
      expect(memory().pool).toBeLessThan(pool + 1e5); // concurrent uploads may each need a block
      expect(memoryStats().handles).toBe(handles);
    });

    test('returns to where it was when a model that encoded is disposed of', async () => {
      const before = (await rest()).active;
      for (let i = 0; i < 3; i++) {
        const uniflow = UniFlow.random('nano', { device: 'cuda' });
        await uniflow.encode(pixels(3));
        expect(memory().active).toBeGreaterThan(before + 1e5);
        await uniflow.dispose();
        await settled({ active: before });
      }
    });

    test('returns there also when it decoded, repeatedly', async () => {
      const { active } = await rest();
      const uniflow = UniFlow.random('nano', { device: 'cuda' });
      for (let i = 0; i < 3; i++) await uniflow.decode(latents(64)); // more than in any earlier test
      await uniflow.dispose();
      expect((await rest()).active).toBeLessThanOrEqual(active);
    });

    test('of models that decoded does not grow with their number', async () => {
      const cycle = async (): Promise<number> => {
        const uniflow = UniFlow.random('nano', { device: 'cuda' });
        for (const batch of [1, 2, 3]) for (let i = 0; i < 3; i++) await uniflow.decode(latents(batch));
        await uniflow.dispose();
        return (await rest()).active;
      };
      const after: number[] = [];
      for (let i = 0; i < 10; i++) after.push(await cycle());
      expect(Math.max(...after.slice(5))).toBeLessThanOrEqual(Math.max(...after.slice(0, 5)));
    });

    test('that is not there: OUT_OF_MEMORY with the sizes, and the next encode works', async () => {
      const gib = Number(/(\d+) GiB/.exec(gpu!.description)![1]);
      const hidden = 65536; // 4 MiB per image between the two layers of an MLP
      const config = { ...presets.nano, num_hidden_layers: 1, intermediate_size: hidden };
      await using uniflow = UniFlow.random(config, { device: 'cuda' });
      await uniflow.encode(pixels()); // caches its position table
      const want = (await uniflow.encode(pixels(1, 28))).latents;
      const before = { active: (await rest()).active, handles: memoryStats().handles };
      const many = 280 * gib; // 1.16 times the memory
      const bytes = { pixels: ndarray(new Uint8Array(many * 56 * 56 * 3), [many, 56, 56, 3]) };
      const error = await failure(uniflow.encode(bytes, { batchSize: many }));
      expect(error.code).toBe('OUT_OF_MEMORY');
      expect(error.message).toContain(`asked for ${many * 17 * hidden * 4} bytes`);
      expect(error.message).toMatch(/\d+ bytes in use/);
      expect(memoryStats().handles).toBeLessThanOrEqual(before.handles); // tables that may have failed are recreated
      await uniflow.encode(pixels());
      expect((await uniflow.encode(pixels(1, 28))).latents).toEqual(want);
      await settled({ active: before.active });
    });

    test('is not kept by a model that was refused halfway', () => {
      const handles = memoryStats().handles;
      const config = { ...presets.nano, intermediate_size: 200 };
      expect(() => UniFlow.random(config, { device: 'cuda', dtype: 'bfloat16', float8: true })).toThrow();
      expect(memoryStats().handles).toBe(handles);
    });
  });

  describe('memory that is full', () => {
    const batch = { pixels: pixels(2).pixels };
    const make = (): UniFlow => UniFlow.random('nano', { device: 'cuda', seed: 3 });
    const load = (): Promise<UniFlow> => UniFlow.load(golden('uniflow-tiny'), { device: 'cuda' });
    let uniflow: UniFlow;
    let trained: UniFlow;
    let trainer: Trainer;
    const errors: Record<string, UniFlowError> = {};
    let handlesOfLoad: number;

    beforeAll(async () => {
      await warm();
      [uniflow, trained] = [make(), make()];
      await uniflow.encode(pixels());
      trainer = new Trainer(trained, { lambdaDistillation: 0 });
      await trainer.step(batch);
      const full: Tensor[] = [];
      const refusal = async (work: () => Promise<unknown>): Promise<UniFlowError> => {
        full.push(...(await filled())); // refills memory that garbage collection has freed since
        return failure(work());
      };
      errors['encode'] = await refusal(() => uniflow.encode(pixels()));
      errors['encode a new size'] = await refusal(() => uniflow.encode(pixels(1, 28)));
      errors['decode'] = await refusal(() => uniflow.decode(latents()));
      errors['step'] = await refusal(() => trainer.step(batch));
      full.push(...(await filled()));
      const { handles } = memoryStats();
      errors['load'] = await failure(load());
      handlesOfLoad = memoryStats().handles - handles;
      for (const tensor of full) tensor.dispose();
    });
    afterAll(() => Promise.all([uniflow.dispose(), trained.dispose()]));

    test('is OUT_OF_MEMORY with the sizes, whatever is tried', () => {
      expect(Object.keys(errors)).toHaveLength(5);
      for (const { code, message } of Object.values(errors)) {
        expect(code).toBe('OUT_OF_MEMORY');
        expect(message).toMatch(/asked for \d+ bytes with \d+ bytes in use/);
      }
    });

    test.each([28, 56])('leaves no trace: when there is room again, images of %i pixels are encoded, and decoded', async (side) => {
      await using same = make();
      const want = (await same.encode(pixels(1, side))).latents;
      const got: unknown = await uniflow.encode(pixels(1, side)).then(
        ({ latents }) => latents,
        ({ message }: Error) => message,
      );
      expect(got).toEqual(want);
      expect(await uniflow.decode(want)).toEqual(await same.decode(want));
    });

    test('in a training step: nothing is changed, and the training goes on', async () => {
      await using same = make();
      const undisturbed = new Trainer(same, { lambdaDistillation: 0 });
      await undisturbed.step(batch);
      expect(await trainer.step(batch)).toEqual(await undisturbed.step(batch));
      await Promise.all([trainer.finish(), undisturbed.finish()]);
    });

    test('while a model is loaded: it loads when there is room again, and nothing is kept of the first attempt', async () => {
      await using again = await load();
      expect((await again.encode(pixels())).latents.shape).toEqual([1, 16, 16]);
      expect(handlesOfLoad).toBe(0);
    });
  });

  describe('an AbortSignal in the middle', () => {
    let uniflow: UniFlow;
    beforeAll(() => {
      uniflow = UniFlow.random('nano', { device: 'cuda' });
    });
    afterAll(() => uniflow.dispose());

    test.each<[string, (signal: AbortSignal) => Promise<unknown>]>([
      ['a decode of many steps', (signal) => uniflow.decode(latents(16), { steps: 2000, signal })],
      ['a decode in many parts, recorded', (signal) => uniflow.decode(latents(256), { steps: 4, batchSize: 1, signal })],
      ['an encode in many parts', (signal) => uniflow.encode(pixels(256), { batchSize: 1, signal })],
      ['a reconstruction', (signal) => uniflow.reconstruct(pixels(64), { batchSize: 1, steps: 20, signal })],
    ])('of %s: ABORTED with its reason, and the device is as it was', async (_, work) => {
      const use = async (): Promise<NdArray> => uniflow.decode((await uniflow.encode(pixels(2))).latents, { steps: 4, output: 'float32' });
      const want = await use();
      await use();
      const { active } = await rest();
      const { handles } = memoryStats();
      const controller = new AbortController();
      const reason = new Error('on purpose');
      const running = work(controller.signal);
      setTimeout(() => controller.abort(reason), 40);
      const start = performance.now();
      const error = await failure(running);
      expect(error.code).toBe('ABORTED');
      expect(error.cause).toBe(reason);
      expect(performance.now() - start).toBeLessThan(5000);
      expect(memoryStats().handles).toBeLessThanOrEqual(handles); // fewer if garbage of another test is collected
      expect((await rest()).active).toBeLessThanOrEqual(active + 1e6); // a recorded decode
      expect(await use()).toEqual(want);
    });
  });

  describe('side by side', () => {
    test('a model on the CPU and one on the GPU work at the same time', async () => {
      const models = both();
      const use = async (uniflow: UniFlow): Promise<unknown> => {
        const { latents } = await uniflow.encode(pixels(3));
        return { latents, images: await uniflow.decode(latents, { steps: 3 }) };
      };
      const want = [];
      for (const model of models) want.push(await use(model));
      const again = await Promise.all([...models, ...models, ...models].map(use));
      expect(again).toEqual([...want, ...want, ...want]);
      await Promise.all(models.map((model) => model.dispose()));
    });

    test('many calls of one model give what they give one after another', async () => {
      await using uniflow = UniFlow.random('nano', { device: 'cuda' });
      const inputs = Array.from({ length: 12 }, (_, i) => pixels(1 + (i % 3), i % 2 ? 56 : 28));
      const want = [];
      for (const input of inputs) want.push((await uniflow.encode(input)).latents);
      expect(await Promise.all(inputs.map(async (input) => (await uniflow.encode(input)).latents))).toEqual(want);
    });

    test('after dispose() it is DISPOSED, and a second dispose() is nothing', async () => {
      const uniflow = UniFlow.random('nano', { device: 'cuda' });
      await uniflow.encode(pixels());
      await Promise.all([uniflow.dispose(), uniflow.dispose()]);
      expect((await failure(uniflow.encode(pixels()))).code).toBe('DISPOSED');
      expect((await failure(uniflow.decode(latents()))).code).toBe('DISPOSED');
    });

    test('an image that is not finite fails its own call alone', async () => {
      await using uniflow = UniFlow.random('nano', { device: 'cuda' });
      const want = (await uniflow.encode(pixels())).latents;
      const bad = pixels();
      bad.pixels.data.fill(NaN, 5, 6);
      const [error, good] = await Promise.all([failure(uniflow.encode(bad)), uniflow.encode(pixels())]);
      expect(error.code).toBe('BAD_INPUT');
      expect(good.latents).toEqual(want);
    });
  });

  describe('processes and threads', () => {
    let compiled: Compiled;
    beforeAll(async () => {
      compiled = await Compiled.library();
    });
    afterAll(() => compiled.remove());

    const load = `
    const { UniFlow } = await library();
    const uniflow = UniFlow.random('nano', { device: 'cuda' });
  `;

    test('two workers encode at once, each as if alone', async () => {
      const worker = inWorker(`
      ${load}
      const values = [];
      for (let i = 0; i < 20; i++) values.push([...(await uniflow.encode(pixels(2))).latents.data]);
      parentPort.postMessage(values);
    `);
      const { code, signal, printed, stderr } = await compiled.run(`
      const message = (worker) => new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
      const all = await Promise.all([${worker}, ${worker}].map(message));
      ${load}
      const alone = JSON.stringify([...(await uniflow.encode(pixels(2))).latents.data]);
      print(all.map((values) => values.length));
      print(all.flat().every((values) => JSON.stringify(values) === alone));
    `);
      expect({ code, signal, stderr }).toEqual({ code: 0, signal: null, stderr: '' });
      expect(printed).toEqual([[20, 20], true]);
    });

    test('a worker is terminated while it works; the memory of its model is free, and the others go on', async () => {
      const { code, signal, printed, stderr } = await compiled.run(`
      const message = (worker) => new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
      ${load}
      const want = [...(await uniflow.encode(pixels(2))).latents.data];
      const { memoryStats } = await library();
      const active = async () => (await sleep(100), memoryStats().devices['cuda:0'].active); // behind the last upload
      const before = await active();
      const workers = Array.from({ length: 4 }, () => ${inWorker(`
        ${load}
        await uniflow.encode(pixels(2));
        parentPort.postMessage('busy');
        for (;;) await uniflow.encode(pixels(2));
      `)});
      await Promise.all(workers.map(message));
      await Promise.all(workers.map((worker) => worker.terminate()));
      print(await active() - before);
      print(JSON.stringify([...(await uniflow.encode(pixels(2))).latents.data]) === JSON.stringify(want));
    `);
      expect({ code, signal, stderr }).toEqual({ code: 0, signal: null, stderr: '' });
      expect(printed).toEqual([0, true]);
    });

    test('a process with models not disposed of ends by itself', async () => {
      const { code, signal, printed, stderr } = await compiled.run(
        `${load} for (let i = 0; i < 3; i++) await uniflow.decode((await uniflow.encode(pixels())).latents); print('done');`,
        { timeout: 20_000 },
      );
      expect({ code, signal, printed, stderr }).toEqual({ code: 0, signal: null, printed: ['done'], stderr: '' });
    });

    test('process.exit() in the middle of the work comes at once, with its code', async () => {
      const { code, signal, stderr } = await compiled.run(
        `
      ${load}
      uniflow.decode(latents(64), { steps: 5000 });
      for (let i = 0; i < 8; i++) uniflow.encode(pixels(64), { batchSize: 1 });
      await sleep(200);
      process.exit(7);
    `,
        { timeout: 20_000 },
      );
      expect({ code, signal, stderr }).toEqual({ code: 7, signal: null, stderr: '' });
    });

    test('without a GPU the library says why, and the CPU is the default', async () => {
      const outcome = await compiled.run(`
      process.env.UNIFLOW_CUDA_LIBRARY = '/nowhere.so';
      const { devices, UniFlow } = await library();
      print(devices().map(({ name, available }) => [name, available]));
      print(UniFlow.random('nano').device);
      try { UniFlow.random('nano', { device: 'cuda' }); } catch ({ code, message }) { print([code, message.includes('/nowhere.so')]); }
    `);
      expect(outcome.printed).toEqual([
        [
          ['cpu', true],
          ['cuda', false],
        ],
        'cpu',
        ['UNSUPPORTED', true],
      ]);
    });
  });
});
