/**
 * Compares the gradients of every differentiable operation with central differences along random directions. In bfloat16, the gradient must
 * have the direction of the float32 gradient.
 */
import { describe, expect, test } from '@jest/globals';
import { setThreads } from '../lib/device.js';
import { velocity, type FlowHead } from '../lib/decoder/flow.js';
import { crossEntropy } from '../lib/losses/cross-entropy.js';
import { distillationLoss } from '../lib/losses/distillation.js';
import { flowLoss } from '../lib/losses/flow.js';
import { native, type Activation, type FloatType } from '../lib/native.js';
import * as ops from '../lib/ops.js';
import { differentiable, recompute, Tape } from '../lib/tape.js';
import { Tensor, tensorOf, tidy } from '../lib/tensor.js';
import { here } from './support.js';

interface Input {
  shape: number[];
  std: number;
  mean: number;
  /** Parameters that a bfloat16 model keeps in float32: biases, norms, tables. */
  float32: boolean;
}
const tokens = (...shape: number[]): Input => ({ shape, std: 1, mean: 0, float32: false });
const vector = (...shape: number[]): Input => ({ shape, std: 1, mean: 0, float32: true });
const around1 = (n: number): Input => ({ ...vector(n), std: 0.2, mean: 1 });
const matrix = (outputs: number, inputs: number): Input => ({ ...tokens(outputs, inputs), std: 1 / Math.sqrt(inputs) });

type Values = Record<string, Tensor>;
/** An operation on named inputs, all of which get gradients. `dtype` is the model's. */
interface Case {
  name: string;
  inputs: Record<string, Input>;
  /** One output, several, or a scalar loss. */
  of: (values: Values, dtype: FloatType) => Tensor | Tensor[] | { loss: Tensor };
}

const [B, S, D, OUT] = [2, 7, 48, 17];
const x = tokens(B, S, D);
const grid = { rows: 3, cols: 5 };
const EPS = 1e-6;

const constant = (seed: number, shape: number[], dtype: FloatType = 'float32'): Tensor =>
  tensorOf(native.randomParameter(shape, dtype, false, seed, 0, 1));
const labels = (n: number, classes: number): Tensor =>
  Tensor.from({ data: Int32Array.from({ length: n }, (_, i) => (i * 5) % classes), shape: [n] });

const linear: Case['inputs'] = { x, weight: matrix(OUT, D), bias: vector(OUT) };
const layer = (v: Values, name = ''): ops.Linear => ({ weight: v[`${name}weight`]!, bias: v[`${name}bias`] });

const activations: Activation[] = ['gelu', 'gelu_tanh', 'quick_gelu', 'silu'];

const P = 27;
const M = 15;
/** Parameters of a flow head of width 17 with one block, by path. */
const headInputs: Record<string, Input> = Object.fromEntries(
  Object.entries({ time1: [OUT, 256], time2: [OUT, OUT], condition: [OUT, OUT], input: [OUT, P], fc1: [OUT, OUT], fc2: [OUT, OUT] })
    .concat(Object.entries({ modulation: [3 * OUT, OUT], final: [2 * OUT, OUT], output: [P, OUT] }))
    .flatMap(([name, [outputs, inputs]]) => [
      [`${name}.weight`, matrix(outputs!, inputs!)],
      [`${name}.bias`, vector(outputs!)],
    ]),
);
const flowInputs = { x: vector(M, P), c: tokens(M, OUT), norm: around1(OUT), shift: vector(OUT), ...headInputs };
const headOf = (v: Values): FlowHead => {
  const at = (name: string): ops.Linear => layer(v, `${name}.`);
  const block = { norm: { weight: v.norm, bias: v.shift }, fc1: at('fc1'), fc2: at('fc2'), modulation: at('modulation') };
  return {
    ...{ time1: at('time1'), time2: at('time2'), condition: at('condition'), input: at('input'), blocks: [block] },
    ...{ finalModulation: at('final'), output: at('output') },
  };
};
const times = (): Tensor => Tensor.from({ data: Float32Array.from({ length: M }, (_, i) => i / M), shape: [M] });

const cases: Case[] = [
  { name: 'linear', inputs: linear, of: (v) => ops.linear(v.x!, layer(v)) },
  { name: 'linear without bias', inputs: { x, weight: matrix(OUT, D) }, of: (v) => ops.linear(v.x!, layer(v)) },
  ...activations.map((activation) => ({
    name: `linear with ${activation}`,
    inputs: linear,
    of: (v: Values) => ops.linear(v.x!, layer(v), { activation }),
  })),
  {
    name: 'linear with residual',
    inputs: { ...linear, residual: tokens(B, S, OUT) },
    of: (v) => ops.linear(v.x!, layer(v), { residual: v.residual }),
  },
  {
    name: 'linear with residual and LayerScale',
    inputs: { ...linear, residual: tokens(B, S, OUT), scale: vector(OUT) },
    of: (v) => ops.linear(v.x!, layer(v), { residual: v.residual, scale: v.scale }),
  },
  ...activations.map((kind) => ({ name: kind, inputs: { x }, of: (v: Values) => ops.activate(v.x!, kind) })),
  { name: 'scaleAdd', inputs: { residual: x, branch: x }, of: (v) => ops.scaleAdd(v.residual!, v.branch!) },
  {
    name: 'scaleAdd with LayerScale',
    inputs: { residual: x, branch: x, scale: vector(D) },
    of: (v) => ops.scaleAdd(v.residual!, v.branch!, { scale: v.scale }),
  },
  {
    name: 'scaleAdd with a gate',
    inputs: { residual: x, branch: x, gate: x },
    of: (v) => ops.scaleAdd(v.residual!, v.branch!, { gate: v.gate! }),
  },
  ...[1, 3, 16].map((heads) => ({
    name: `attention of ${heads} heads`,
    inputs: { qkv: tokens(B, S, 3 * D) },
    of: (v: Values) => ops.attention(v.qkv!, heads),
  })),
  { name: 'attention of a head of 17', inputs: { qkv: tokens(B, S, 51) }, of: (v) => ops.attention(v.qkv!, 1) },
  {
    name: 'qkNorm',
    inputs: { qkv: tokens(B, S, 3 * D), q: around1(D), k: around1(D) },
    of: (v) => ops.qkNorm(v.qkv!, v.q!, v.k!, EPS),
  },
  {
    name: 'rope',
    inputs: { qkv: tokens(B, S, 3 * D) },
    of: (v) => ops.rope(v.qkv!, 4, 1, ops.ropeTable({ rows: 2, cols: 3 }, D / 4, { theta: 100, unit: 'image' })),
  },
  ...[false, true].flatMap((rms) => {
    const name = rms ? 'RMSNorm' : 'LayerNorm';
    const weight = around1(D);
    const affine: Case['inputs'] = rms ? { x, weight } : { x, weight, bias: vector(D) };
    return [
      { name, inputs: affine, of: (v: Values) => ops.norm(v.x!, v, { eps: EPS, rms }) },
      { name: `${name} without weights`, inputs: { x }, of: (v: Values) => ops.norm(v.x!, {}, { eps: EPS, rms }) },
      {
        name: `AdaLN of ${name}`,
        inputs: { ...affine, scale: x, shift: x },
        of: (v: Values) => ops.norm(v.x!, v, { eps: EPS, rms, scale: v.scale!, shift: v.shift! }),
      },
    ];
  }),
  {
    name: 'assemble',
    inputs: { x, prefix: vector(3, D), position: vector(S, D) },
    of: ({ x, prefix, position }) => ops.assemble(x!, { prefix, position }),
  },
  ...[false, true].map((antialias) => ({
    name: `resizeTable${antialias ? ' with antialias' : ''}`,
    inputs: { table: vector(15, OUT) },
    of: (v: Values) => ops.resizeTable(v.table!, grid, { rows: 2, cols: 7 }, { antialias }),
  })),
  { name: 'cast', inputs: { x }, of: (v) => ops.cast(v.x!, 'float32') },
  { name: 'swiglu', inputs: { x: tokens(B, S, 2 * OUT) }, of: (v) => ops.swiglu(v.x!) },
  { name: 'sliceTokens', inputs: { x }, of: (v) => ops.sliceTokens(v.x!, 1, 5) },
  { name: 'reshape', inputs: { x }, of: (v) => ops.reshape(v.x!, [B * S, D]) },
  { name: 'split', inputs: { x }, of: (v) => ops.split(v.x!, 3) },
  { name: 'split, one part used', inputs: { x }, of: (v) => ops.split(v.x!, 3)[1]! },
  { name: 'add', inputs: { a: x, b: x }, of: (v) => ops.add(v.a!, v.b!) },
  { name: 'the same input twice', inputs: { x }, of: (v) => ops.scaleAdd(v.x!, v.x!, { gate: v.x! }) },
  {
    name: 'recompute',
    inputs: { ...linear, residual: tokens(B, S, OUT) },
    of: (v) => recompute((x, residual) => ops.linear(x, layer(v), { activation: 'gelu', residual }), [v.x!, v.residual!]),
  },
  { name: 'crossEntropy', inputs: { logits: tokens(OUT, 1025) }, of: (v) => crossEntropy(v.logits!, labels(OUT, 1025)) },
  // The adaptive weights are constants for the gradient; with beta 0 they really are constant.
  ...(['adaptive', 'uniform', 'last'] as const).map((weights): Case => ({
    name: `distillationLoss, ${weights}`,
    inputs: weights === 'last' ? { last: x } : { first: x, last: x },
    of: ({ first, last }: Values, dtype: FloatType) => {
      const [a, b, c] = [7, 8, 9].map((seed) => constant(seed, x.shape, dtype)) as [Tensor, Tensor, Tensor];
      return distillationLoss([first ?? a, last!], [b, c], { beta: 0, skip: 1, weights });
    },
  })),
  { name: 'velocity', inputs: flowInputs, of: (v, dtype) => velocity(headOf(v), v.x!, times(), v.c!, dtype) },
  {
    name: 'flowLoss',
    inputs: { c: flowInputs.c, ...headInputs },
    of: (v, dtype) => {
      const head = headOf({ ...v, norm: constant(5, [OUT]), shift: constant(6, [OUT]) });
      return { loss: flowLoss(head, constant(7, [M, P]), constant(8, [M, P]), times(), v.c!, dtype) };
    },
  },
];

/** Reads and disposes of a tensor. */
async function take(t: Tensor): Promise<Float32Array> {
  using last = t;
  return (await last.read()).data as Float32Array;
}

/** Standard normal numbers, the same in every run. */
async function normal(seed: number, n: number): Promise<Float32Array> {
  const out = new Float32Array(n);
  const noise = native.noise(seed, new Uint32Array(1), 1, n);
  await noise.read(out);
  noise.dispose();
  return out;
}

const sizeOf = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);
const dot = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
  Array.prototype.reduce.call(a, (sum: unknown, v, i) => (sum as number) + (v as number) * b[i]!, 0) as number;
const length = (a: ArrayLike<number>): number => Math.sqrt(dot(a, a));

/** The operation with given inputs, in a dtype. The differentiated function is Σ cotangent · output. */
class Probe {
  constructor(
    private readonly of: Case,
    private readonly dtype: FloatType,
    readonly values: Record<string, Float32Array>,
  ) {}

  static async make(of: Case, dtype: FloatType): Promise<Probe> {
    const values: Record<string, Float32Array> = {};
    for (const [i, [name, { shape, std, mean }]] of Object.entries(of.inputs).entries())
      values[name] = (await normal(i, sizeOf(shape))).map((v) => mean + std * v);
    return new Probe(of, dtype, values);
  }

  private upload(): Values {
    return Object.fromEntries(
      Object.entries(this.of.inputs).map(([name, { shape, float32 }]) => {
        const plain = Tensor.from({ data: this.values[name]!, shape });
        return [name, float32 ? plain : ops.cast(plain, this.dtype)];
      }),
    );
  }

  private outputs(values: Values): { loss?: Tensor; all: Tensor[] } {
    const out = this.of.of(values, this.dtype);
    return out instanceof Tensor ? { all: [out] } : Array.isArray(out) ? { all: out } : { loss: out.loss, all: [out.loss] };
  }

  private static cotangent(output: Tensor, i: number): Tensor {
    return constant(100 + i, output.shape, output.dtype as FloatType);
  }

  /** The gradients of the named inputs. */
  async gradients(names = Object.keys(this.of.inputs)): Promise<Record<string, Float32Array>> {
    const found = here(() =>
      tidy(() => {
        const inputs = this.upload();
        const tape = new Tape(names.map((name) => inputs[name]!));
        const { loss, all } = tape.record(() => this.outputs(inputs));
        const map = tape.backward(loss ? [{ loss, scale: 1 }] : all.map((output, i) => ({ output, gradient: Probe.cotangent(output, i) })));
        return names.map((name): [string, Tensor | undefined] => [name, map.get(inputs[name]!)]);
      }),
    );
    const read = async ([name, t]: [string, Tensor | undefined]): Promise<[string, Float32Array]> => {
      if (!t) throw new Error(`no gradient of ${name}`);
      return [name, await take(t)];
    };
    return Object.fromEntries(await Promise.all(found.map(read)));
  }

  /** Σ cotangent · output in float64, with `values` replacing the input. */
  async value(name: string, values: Float32Array): Promise<number> {
    const moved = new Probe(this.of, this.dtype, { ...this.values, [name]: values });
    const { loss, pairs } = here(() =>
      tidy(() => {
        const { loss, all } = moved.outputs(moved.upload());
        return { loss, pairs: loss ? [] : all.map((output, i) => [output, Probe.cotangent(output, i)] as const) };
      }),
    );
    if (loss) return (await take(loss))[0]!;
    const parts = await Promise.all(pairs.map(async ([y, r]) => dot(await take(y), await take(r))));
    return parts.reduce((a, b) => a + b);
  }

  /**
   * The largest |slope − gradient · direction| over some random directions, relative to the gradient's length, which is the scale of
   * gradient · direction.
   */
  async error(name: string, gradient: Float32Array): Promise<number> {
    const STEP = 1e-2;
    const { std } = this.of.inputs[name]!;
    const at = this.values[name]!;
    let worst = 0;
    for (const seed of [1000, 1001, 1002, 1003]) {
      const direction = (await normal(seed, at.length)).map((v) => v * std);
      const along = (sign: number): Promise<number> =>
        this.value(
          name,
          at.map((v, i) => v + sign * STEP * direction[i]!),
        );
      const slope = ((await along(1)) - (await along(-1))) / (2 * STEP);
      worst = Math.max(worst, Math.abs(slope - dot(gradient, direction)) / (length(gradient) * std));
    }
    return worst;
  }
}

const TOLERANCE = 1e-3;

setThreads(1); // the operations are too small for more threads

describe.each(cases.map((c) => [c.name, c] as const))('%s', (_, of) => {
  test('float32: the gradient of every input is the slope', async () => {
    const probe = await Probe.make(of, 'float32');
    for (const [name, gradient] of Object.entries(await probe.gradients())) {
      expect(gradient).toHaveLength(probe.values[name]!.length);
      const error = await probe.error(name, gradient);
      expect(`${name} ${error < TOLERANCE ? 'as the slope' : error}`).toBe(`${name} as the slope`);
    }
  });

  test('a gradient is the same where no other is wanted', async () => {
    const probe = await Probe.make(of, 'float32');
    for (const [name, gradient] of Object.entries(await probe.gradients())) {
      const { [name]: alone } = await probe.gradients([name]);
      const difference = length(gradient.map((g, i) => g - alone![i]!)) / length(gradient);
      expect(`${name} ${difference < 1e-6 ? 'the same' : difference}`).toBe(`${name} the same`);
    }
  });

  test('bfloat16: the gradient points where the float32 one does', async () => {
    const exact = await (await Probe.make(of, 'float32')).gradients();
    for (const [name, gradient] of Object.entries(await (await Probe.make(of, 'bfloat16')).gradients())) {
      const cosine = dot(gradient, exact[name]!) / (length(gradient) * length(exact[name]!));
      expect(`${name} ${cosine > 0.99 ? 'the same way' : cosine}`).toBe(`${name} the same way`);
      expect(Math.abs(length(gradient) / length(exact[name]!) - 1)).toBeLessThan(0.05);
    }
  });
});

test('a gradient that is 1 % too large does not pass', async () => {
  const wrong: Case = {
    name: 'wrong',
    inputs: { x },
    of: ({ x }) => differentiable(ops.add(x!, x!), [x], (d) => [{ gradient: d, scale: 2.02 }]),
  };
  const probe = await Probe.make(wrong, 'float32');
  expect(await probe.error('x', (await probe.gradients()).x!)).toBeGreaterThan(5 * TOLERANCE);
});
