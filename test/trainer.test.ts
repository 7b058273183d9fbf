/**
 * The trainer: three steps against the reference implementation (losses, every gradient, every parameter), followed by its rules: which
 * values a step changes and which it keeps.
 */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { presets } from '../lib/config.js';
import { memoryStats, setThreads, Trainer, UniFlow, type StepResult, type TrainerOptions, type TrainingBatch } from '../lib/index.js';
import { native } from '../lib/native.js';
import { drawTimes, learningRate } from '../lib/train/schedule.js';
import { Tensor } from '../lib/tensor.js';
import { awaken, device, golden, readTensors, relativeL2 } from './support.js';

interface Golden {
  hyper: {
    lambda_flow: number;
    lambda_dist: number;
    beta: number;
    lr: number;
    betas: [number, number];
    eps: number;
    weight_decay: number;
    clip_global_norm: number;
    steps: number;
  };
  log: { loss: number; flow: number; dist: number; alpha: number[]; weight: number[]; grad_norm: number }[];
}

const tensors = await readTensors(join(golden('uniflow-tiny'), 'training.safetensors'));
const before = await readTensors(join(golden('uniflow-tiny'), 'model.safetensors'));
const { hyper, log } = JSON.parse(await readFile(join(golden('uniflow-tiny'), 'training.json'), 'utf8')) as Golden;
const batch = { pixels: tensors['batch.pixels']!, noise: tensors['batch.noise']!, time: tensors['batch.time']! };

/** A folder like uniflow-tiny's, with the golden teacher's encoder. */
async function teacherFolder(): Promise<string> {
  const dir = await mkdtemp(join(tmpdir(), 'uniflow-teacher-'));
  await cp(golden('uniflow-tiny'), dir, { recursive: true });
  const teacher = Object.entries(tensors).filter(([name]) => name.startsWith('teacher.'));
  const merged = { ...before, ...Object.fromEntries(teacher.map(([name, value]) => [name.slice('teacher.'.length), value])) };
  await writeFile(join(dir, 'model.safetensors'), safetensors(merged));
  return dir;
}

function safetensors(arrays: Record<string, NdArray>): Buffer {
  const header: Record<string, unknown> = {};
  let offset = 0;
  const chunks = Object.entries(arrays).map(([name, a]) => {
    const bytes = Buffer.from(Float32Array.from(a.data as unknown as Float32Array).buffer);
    header[name] = { dtype: 'F32', shape: a.shape, data_offsets: [offset, (offset += bytes.length)] };
    return bytes;
  });
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  return Buffer.concat([length, json, ...chunks]);
}

beforeAll(() => setThreads(1)); // a thread team waits for its slowest thread, which another program may delay

describe.each(['float32', 'bfloat16'] as const)('%s', (dtype) => {
  const loose = dtype === 'bfloat16';
  let dir: string;
  let uniflow: UniFlow;
  let teacher: UniFlow;
  let trainer: Trainer;
  const results: StepResult[] = [];
  let gradients: Map<string, NdArray>;

  beforeAll(async () => {
    dir = await teacherFolder();
    uniflow = await UniFlow.load(golden('uniflow-tiny'), { dtype });
    teacher = await UniFlow.load(dir, { dtype });
    const { lr, betas, eps, weight_decay: weightDecay, clip_global_norm: clipNorm } = hyper;
    trainer = new Trainer(uniflow, {
      teacher,
      optimizer: { lr, betas, eps, weightDecay, clipNorm },
      lambdaFlow: hyper.lambda_flow,
      lambdaDistillation: hyper.lambda_dist,
      beta: hyper.beta,
    });
    for (let i = 0; i < hyper.steps; i++) {
      results.push(await trainer.step(batch));
      if (i === 0) gradients = await trainer.gradients();
    }
  });
  afterAll(async () => {
    await uniflow.dispose();
    await teacher.dispose();
    await rm(dir, { recursive: true });
  });

  test('losses, alpha, weights and gradient norm of every step', () => {
    // Adam's first steps equal the gradients' signs, which amplify bfloat16's rounding; a GPU sums in another order than the CPU.
    const bfloat16 = device === 'cpu' ? 0.03 : 0.05;
    const close = (actual: number, wanted: number, absolute: number): void =>
      expect(Math.abs(actual - wanted)).toBeLessThan((loose ? bfloat16 : absolute) * Math.max(1, Math.abs(wanted)));
    results.forEach((r, i) => {
      const want = log[i]!;
      const tolerance = i === 0 ? 1e-5 : 1e-4; // later steps accumulate the errors of earlier ones
      close(r.loss, want.loss, tolerance);
      close(r.flow, want.flow, tolerance);
      close(r.distillation, want.dist, tolerance);
      close(r.gradNorm, want.grad_norm, 1e-4);
      r.alpha.forEach((a, l) => close(a, want.alpha[l]!, tolerance));
      r.weight.forEach((w, l) => close(w, want.weight[l]!, tolerance));
    });
  });

  test('every parameter gradient of the first step', () => {
    const names = Object.keys(tensors).filter((name) => name.startsWith('grad.'));
    expect(gradients.size).toBe(names.length);
    for (const name of names) {
      const error = relativeL2(gradients.get(name.slice('grad.'.length))!, tensors[name]!);
      expect(`${name} ${error < (loose ? 0.1 : 1e-3)}`).toBe(`${name} true`);
    }
  });

  test('every parameter after three steps', async () => {
    if (loose) return; // Adam's first steps equal the gradient's sign, and in bfloat16 small gradients change theirs
    const after = await trainer.parameters();
    for (const [name, value] of after) {
      const want = tensors[`after.${name}`]!;
      const moved = relativeL2(want, before[name]!);
      const error = (relativeL2(value, want) * norm(want)) / (moved * norm(before[name]!));
      expect(`${name} ${error < 2e-2}`).toBe(`${name} true`);
    }
  });

  test('leaves a model that encodes and decodes like a loaded one', async () => {
    await trainer.finish();
    const { latents, grid } = await uniflow.encode({ pixels: batch.pixels });
    const images = await uniflow.decode(latents, { grid });
    expect(images.shape).toEqual([3, 56, 56, 3]);
  });
});

function norm(a: NdArray): number {
  return Math.sqrt((a.data as unknown as Float32Array).reduce((sum, v) => sum + v * v, 0));
}

// ----- rules, on a small model ----------------------------------------------------------------------------------

const micro = {
  ...presets.nano,
  ...{ hidden_size: 32, vit_hidden_size: 32, intermediate_size: 128, image_size: 28, latent_ch: 8, num_decoder_layers: 1 },
};
const [PATCHES, VALUES] = [4, 588];

/** Reproducible numbers on [-1, 1). */
function numbers(count: number): Float32Array {
  let state = 1;
  const next = (): number => ((state = (state * 16807) % 2147483647) / 2147483647) * 2 - 1;
  return Float32Array.from({ length: count }, next);
}
const pixels = (images = 4): NdArray => ndarray(numbers(images * 3 * 28 * 28), [images, 3, 28, 28]);

interface Small {
  uniflow: UniFlow;
  trainer: Trainer;
}

async function small<T>(
  work: (it: Small) => Promise<T>,
  { dtype = 'float32', ...options }: TrainerOptions & { dtype?: 'float32' | 'bfloat16' } = {},
): Promise<T> {
  await using uniflow = awaken(UniFlow.random(micro, { dtype, seed: 3 }));
  const trainer = new Trainer(uniflow, { lambdaDistillation: 0, ...options });
  const result = await work({ uniflow, trainer });
  await trainer.finish();
  return result;
}

/** Everything that the next step depends on, as bytes. */
async function bitsOf(trainer: Trainer): Promise<Map<string, Buffer>> {
  const { tensors: all } = trainer.state();
  const read = [...all].map(async ([name, handle]): Promise<[string, Buffer]> => {
    const { data } = await new Tensor(handle).read();
    return [name, Buffer.from(data.buffer)];
  });
  return new Map(await Promise.all(read));
}

const changed = (before: Map<string, Buffer>, after: Map<string, Buffer>): string[] =>
  [...after.keys()].filter((name) => !after.get(name)!.equals(before.get(name)!));

const isEncoder = (name: string): boolean => name.startsWith('embeddings.') || name.startsWith('encoder.');

describe('a gradient that is not finite', () => {
  const broken: TrainingBatch = {
    pixels: pixels(),
    noise: ndarray(new Float32Array(4 * PATCHES * VALUES).fill(NaN), [4, PATCHES, VALUES]),
  };

  test.each(['float32', 'bfloat16'] as const)('changes nothing, is counted, and the training continues (%s)', (dtype) =>
    small(
      async ({ trainer }) => {
        await trainer.step({ pixels: pixels() });
        const before = await bitsOf(trainer);
        expect(await trainer.step(broken)).toMatchObject({ skipped: true, loss: NaN, flow: NaN, gradNorm: NaN });
        expect(changed(before, await bitsOf(trainer))).toEqual([]);
        expect(trainer.state().position).toEqual({ iteration: 2, steps: 1, skippedInARow: 1 });
        const next = await trainer.step({ pixels: pixels() });
        expect(next).toMatchObject({ skipped: false, flow: expect.any(Number) });
        expect(Number.isFinite(next.flow)).toBe(true);
        const moved = changed(before, await bitsOf(trainer));
        expect([...before.keys()].filter((name) => name.endsWith('.m') && !moved.includes(name))).toEqual([]);
        expect(trainer.state().position).toEqual({ iteration: 3, steps: 2, skippedInARow: 0 });
      },
      { dtype, optimizer: { ema: 0.9 } },
    ),
  );

  test('in one part of an accumulated batch is enough', () =>
    small(
      async ({ trainer }) => {
        const noise = numbers(4 * PATCHES * VALUES);
        noise[noise.length - 1] = Infinity;
        const { skipped } = await trainer.step({ pixels: pixels(), noise: ndarray(noise, [4, PATCHES, VALUES]) });
        expect(skipped).toBe(true);
      },
      { accumulate: 4 },
    ));

  test('throws after maxSkipped in a row; a finite one resets the count', () =>
    small(
      async ({ trainer }) => {
        await trainer.step(broken);
        await trainer.step(broken);
        await trainer.step({ pixels: pixels() });
        await trainer.step(broken);
        await trainer.step(broken);
        await expect(trainer.step(broken)).rejects.toMatchObject({
          code: 'INTERNAL',
          message: '3 steps in a row had a gradient that is not finite: lower the learning rate',
        });
      },
      { maxSkipped: 3 },
    ));
});

describe('accumulate', () => {
  const batch: TrainingBatch = {
    pixels: pixels(),
    noise: ndarray(numbers(4 * PATCHES * VALUES), [4, PATCHES, VALUES]),
    time: ndarray(
      numbers(4 * PATCHES).map((t) => (t + 1) / 2),
      [4, PATCHES],
    ),
  };
  const oneStep = (accumulate: number): Promise<{ result: StepResult; gradients: Map<string, NdArray> }> =>
    small(async ({ trainer }) => ({ result: await trainer.step(batch), gradients: await trainer.gradients() }), { accumulate });

  test.each([2, 4])('%d parts give the loss and the gradients of the whole', async (parts) => {
    const [whole, split] = [await oneStep(1), await oneStep(parts)];
    expect(Math.abs(split.result.flow / whole.result.flow - 1)).toBeLessThan(1e-5);
    expect(Math.abs(split.result.gradNorm / whole.result.gradNorm - 1)).toBeLessThan(1e-5);
    for (const [name, gradient] of whole.gradients) {
      const error = norm(gradient) === 0 ? norm(split.gradients.get(name)!) : relativeL2(split.gradients.get(name)!, gradient);
      expect(`${name} ${error < 1e-5 ? 'close' : error}`).toBe(`${name} close`);
    }
  });

  test('rejects a batch that does not divide', () =>
    small(
      async ({ trainer }) => {
        await expect(trainer.step({ pixels: pixels(5) })).rejects.toMatchObject({
          code: 'BAD_INPUT',
          message: 'pixels: expected a multiple of 2 images (accumulate), but got 5',
        });
      },
      { accumulate: 2 },
    ));
});

test('noise and times may be views of other arrays', async () => {
  const noise = ndarray(numbers(4 * PATCHES * VALUES), [4, PATCHES, VALUES]);
  const apart = ndarray(new Float32Array(2 * noise.size), [4, PATCHES, VALUES], [2 * PATCHES * VALUES, 2 * VALUES, 2]);
  for (let b = 0; b < 4; b++) for (let n = 0; n < PATCHES; n++) for (let v = 0; v < VALUES; v++) apart.set(b, n, v, noise.get(b, n, v));
  const flowOf = (of: NdArray): Promise<number> => small(async ({ trainer }) => (await trainer.step({ pixels: pixels(), noise: of })).flow);
  expect(await flowOf(apart)).toBe(await flowOf(noise));
});

describe('the moving average', () => {
  const ema = 0.3; // in effect from the third step on, where (1 + 3) / (10 + 3) is larger

  test('is used by evaluating(), and gives the start less weight in early steps', () =>
    small(
      async ({ uniflow, trainer }) => {
        const { tensor, parts } = uniflow.parameters.find(({ matrix, parts }) => matrix && parts.length === 1)!;
        const shown = (): Promise<NdArray> => trainer.evaluating(() => tensor.read());
        const current = async (): Promise<Float32Array> =>
          (await trainer.parameters()).get(parts[0]!.name)!.data as unknown as Float32Array;
        let average = await current();
        for (const old of [2 / 11, 3 / 12, ema]) {
          await trainer.step({ pixels: pixels() });
          const now = await current();
          average = average.map((value, i) => old * value + (1 - old) * now[i]!);
          const { shape } = tensor;
          expect(relativeL2(await shown(), ndarray(average, shape))).toBeLessThan(1e-6);
          expect(relativeL2(ndarray(now, shape), ndarray(average, shape))).toBeGreaterThan(1e-4);
        }
      },
      { optimizer: { ema, lr: 0.1 } },
    ));

  test.each(['float32', 'bfloat16'] as const)('leaves later steps unchanged by evaluating() (%s)', async (dtype) => {
    const steps = (look: boolean): Promise<Map<string, Buffer>> =>
      small(
        async ({ uniflow, trainer }) => {
          for (let i = 0; i < 3; i++) {
            await trainer.step({ pixels: pixels() });
            if (look) await trainer.evaluating(() => uniflow.reconstruct({ pixels: pixels(2) }));
          }
          return bitsOf(trainer);
        },
        { dtype, optimizer: { ema: 0.9 } },
      );
    expect(changed(await steps(false), await steps(true))).toEqual([]);
  });

  test('is removed again when the work fails', () =>
    small(
      async ({ trainer }) => {
        await trainer.step({ pixels: pixels() });
        await expect(trainer.evaluating(() => Promise.reject(new Error('no')))).rejects.toThrow('no');
        const { flow } = await trainer.step({ pixels: pixels() });
        const other = await small(
          async ({ trainer }) => {
            await trainer.step({ pixels: pixels() });
            return (await trainer.step({ pixels: pixels() })).flow;
          },
          { optimizer: { ema: 0.9 } },
        );
        expect(flow).toBe(other);
      },
      { optimizer: { ema: 0.9 } },
    ));
});

test('decays only matrices, by lr · weightDecay', () =>
  small(
    async ({ uniflow, trainer }) => {
      const matrices = new Set(uniflow.parameters.flatMap(({ matrix, parts }) => (matrix ? parts.map(({ name }) => name) : [])));
      const start = await trainer.parameters();
      const { gradNorm, skipped } = await trainer.step({ pixels: pixels() }); // without a loss, all gradients are zero
      expect({ gradNorm, skipped }).toEqual({ gradNorm: 0, skipped: false });
      const end = await trainer.parameters();
      for (const [name, value] of end) {
        const factor = matrices.has(name) ? 1 - 0.1 * 0.5 : 1;
        const expected = start.get(name)!;
        const scaled = ndarray(
          (expected.data as unknown as Float32Array).map((v) => factor * v),
          expected.shape,
        );
        expect(`${name} ${norm(value) === norm(scaled) || relativeL2(value, scaled) < 1e-6}`).toBe(`${name} true`);
      }
      expect(matrices.size).toBeGreaterThan(10);
      expect(end.size).toBeGreaterThan(matrices.size);
    },
    { lambdaFlow: 0, optimizer: { lr: 0.1, weightDecay: 0.5 } },
  ));

describe('learning rates', () => {
  /** The parameters changed by two steps, without Adam's moments. */
  const moved = (options: TrainerOptions, lrScale = 1): Promise<string[]> =>
    small(async ({ trainer }) => {
      const before = await trainer.parameters();
      for (let i = 0; i < 2; i++) await trainer.step({ pixels: pixels() }, { lrScale });
      const after = await trainer.parameters();
      return [...after].filter(([name, value]) => relativeDistance(value, before.get(name)!) > 0).map(([name]) => name);
    }, options);

  test("encoderLr is the encoder's, lr the rest's, and lrScale is for both", async () => {
    const both = await moved({ optimizer: { lr: 0.1 } });
    const [encoder, decoder] = [both.filter(isEncoder), both.filter((name) => !isEncoder(name))];
    expect(encoder.length).toBeGreaterThan(20);
    expect(await moved({ optimizer: { lr: 0.1, encoderLr: 0 } })).toEqual(decoder);
    expect(await moved({ freezeEncoder: true, optimizer: { lr: 0.1 } })).toEqual(decoder);
    expect(await moved({ optimizer: { lr: 0, encoderLr: 0.1 } })).toEqual(encoder);
    expect(await moved({}, 0)).toEqual([]);
  });

  test('follow a linear warm-up, half a cosine, and the floor', () => {
    const at = (step: number, floor = 0.1): number => learningRate(step, { steps: 110, warmup: 10, floor });
    expect([0, 4, 9].map((step) => at(step))).toEqual([0.1, 0.5, 1]);
    expect(at(10)).toBe(1);
    expect(at(35)).toBeCloseTo(0.1 + 0.9 * 0.5 * (1 + Math.SQRT1_2), 12);
    expect(at(60)).toBeCloseTo(0.55, 12);
    expect(at(110)).toBeCloseTo(0.1, 12);
    expect(at(1000)).toBeCloseTo(0.1, 12);
    const all = Array.from({ length: 110 }, (_, step) => at(step, 0));
    all.slice(11).forEach((value, i) => expect(value).toBeLessThan(all[10 + i]!));
    expect(learningRate(0, { steps: 1, warmup: 0 })).toBe(1);
    expect(learningRate(5, { steps: 5, warmup: 100 })).toBeCloseTo(0.06, 12);
  });
});

describe('times', () => {
  async function times(sampling: Parameters<typeof drawTimes>[0], seed = 1, ids = Uint32Array.from({ length: 64 }, (_, i) => i)) {
    const tensor = new Tensor(drawTimes(sampling, seed, ids, 256));
    const { data } = await tensor.read();
    tensor.dispose();
    return [...(data as Float32Array)];
  }
  const mean = (values: number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
  const deviation = (values: number[], middle = mean(values)): number => Math.sqrt(mean(values.map((v) => (v - middle) ** 2)));

  test('uniform on (0, 1]', async () => {
    const all = await times('uniform');
    expect(Math.min(...all)).toBeGreaterThan(0);
    expect(Math.max(...all)).toBeLessThanOrEqual(1);
    expect(mean(all)).toBeCloseTo(0.5, 2);
    expect(deviation(all)).toBeCloseTo(1 / Math.sqrt(12), 2);
    const tenths = Array.from({ length: 10 }, (_, i) => all.filter((t) => t > i / 10 && t <= (i + 1) / 10).length / all.length);
    tenths.forEach((part) => expect(Math.abs(part - 0.1)).toBeLessThan(0.01));
  });

  test('logit-normal, with this mean and deviation of the logits', async () => {
    const all = await times({ mean: -0.5, std: 1.5 });
    expect(Math.min(...all)).toBeGreaterThan(0);
    expect(Math.max(...all)).toBeLessThan(1);
    const logits = all.map((t) => Math.log(t / (1 - t)));
    expect(Math.abs(mean(logits) + 0.5)).toBeLessThan(0.04); // three standard errors of the mean of 16,384
    expect(Math.abs(deviation(logits) - 1.5)).toBeLessThan(0.03);
  });

  test.each(['uniform', { mean: 0, std: 1 }] as const)('%p: depend only on seed and image', async (sampling) => {
    const some = await times(sampling, 1, Uint32Array.of(7, 3));
    expect(await times(sampling, 1, Uint32Array.of(7, 3))).toEqual(some);
    expect(await times(sampling, 1, Uint32Array.of(3))).toEqual(some.slice(256));
    expect(await times(sampling, 2, Uint32Array.of(3))).not.toEqual(some.slice(256));
    expect(new Set(await times(sampling)).size).toBeGreaterThan(16000);
  });

  test('are drawn anew, with new noise, in every step from the seed', async () => {
    const flows = (seed: number, time?: TrainerOptions['time']): Promise<number[]> =>
      small(
        async ({ trainer }) => {
          const results: number[] = [];
          for (let i = 0; i < 2; i++) results.push((await trainer.step({ pixels: pixels() }, { lrScale: 0 })).flow);
          return results;
        },
        { seed, ...(time ? { time } : {}) },
      );
    const [first, second] = await flows(1);
    expect(first).not.toBe(second);
    expect(await flows(1)).toEqual([first, second]);
    expect((await flows(2))[0]).not.toBe(first);
    expect((await flows(1, { mean: 0, std: 1 }))[0]).not.toBe(first);
  });
});

test('takes no more memory for two hundred steps than for fifty', () =>
  small(
    async ({ trainer }) => {
      const batch = { pixels: pixels(2) };
      const after = async (steps: number): Promise<{ active: number; handles: number }> => {
        for (let i = 0; i < steps; i++) await trainer.step(batch);
        await native.synchronize();
        const { host, handles } = memoryStats();
        return { active: host.active, handles };
      };
      const fifty = await after(50);
      expect(await after(150)).toEqual(fifty);
    },
    { accumulate: 2, optimizer: { ema: 0.9 } },
  ));

describe('rejected arguments', () => {
  test.each<[string, TrainerOptions, string]>([
    ['no teacher', { lambdaDistillation: 1 }, 'teacher: expected an encoder, as lambdaDistillation is not 0, but got none'],
    ['a negative rate', { optimizer: { lr: -1 } }, 'lr: expected a number from 0 on, but got -1'],
    ['an average beyond 1', { optimizer: { ema: 2 } }, 'ema: expected a number from 0 to 1, but got 2'],
    ['no parts', { accumulate: 0 }, 'accumulate: expected an integer from 1 to 65536, but got 0'],
  ])('%s', async (_, options, message) => {
    await expect(small(() => Promise.resolve(), options)).rejects.toMatchObject({ code: 'BAD_INPUT', message });
  });

  test('a teacher of another size', async () => {
    await using teacher = UniFlow.random('nano');
    await expect(small(() => Promise.resolve(), { teacher, lambdaDistillation: 1 })).rejects.toMatchObject({
      code: 'BAD_INPUT',
      message: 'teacher: expected 2 layers of width 32 and patch 14, but got 2 of 64 and 14',
    });
  });

  test('noise, times and images of other shapes', () =>
    small(async ({ trainer }) => {
      const zeros = (...shape: number[]): NdArray => ndarray(new Float32Array(shape.reduce((a, b) => a * b, 1)), shape);
      for (const [batch, message] of [
        [{ pixels: pixels(), noise: zeros(4, PATCHES, 7) }, 'noise: expected an ndarray [4, 4, 588], but got [4, 4, 7]'],
        [{ pixels: pixels(), time: zeros(4) }, 'time: expected an ndarray [4, 4], but got [4]'],
        [{ pixels: zeros(1, 3, 13, 28) }, 'image size: expected at least one patch of 14 pixels, but got 13x28'],
      ] as [TrainingBatch, string][])
        await expect(trainer.step(batch)).rejects.toMatchObject({ code: 'BAD_INPUT', message });
    }));
});

const relativeDistance = (a: NdArray, b: NdArray): number =>
  (a.data as unknown as Float32Array).reduce((sum, v, i) => sum + Math.abs(v - (b.data as unknown as Float32Array)[i]!), 0);
