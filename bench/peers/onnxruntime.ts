/**
 * The same float32 operations in ONNX Runtime's CPU provider: in this process, with as many threads, on the same numbers.
 * What it computes is compared with ours first, so that both do the same work.
 */
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { cpuInfo } from '../../lib/device.js';
import { native, type TensorHandle } from '../../lib/native.js';
import { time, type Effort, type Row, type Work } from '../harness.js';
import { Inputs } from '../inputs.js';
import { onnxModel, type FloatArray, type Graph, type Node } from './onnx.js';

/** What is used of onnxruntime-node, whose own types are there only once it is installed. */
interface OnnxRuntime {
  Tensor: new (type: 'float32', data: Float32Array, shape: readonly number[]) => unknown;
  InferenceSession: { create(model: Uint8Array, options: object): Promise<Session> };
}
interface Session {
  run(feeds: Record<string, unknown>): Promise<Record<string, { data: Float32Array }>>;
  release(): Promise<void>;
}

export interface PeerResult {
  family: 'peers';
  name: string;
  shape: string;
  dtype: 'float32';
  oursMs: number;
  theirsMs: number;
  /** oursMs / theirsMs: below 1 we are faster. */
  ratio: number;
  /** Relative L2 of our result against theirs. */
  difference: number;
}

interface Comparison {
  name: string;
  shape: string;
  output: readonly number[];
  /** Queues our operation; its operands are `inputs`. */
  ours(inputs: Inputs): Promise<{ work: () => TensorHandle; feeds: Record<string, FloatArray>; weights?: Record<string, FloatArray> }>;
  /** Ways to say the same in ONNX; the fastest counts. Every graph ends in `out`. */
  graphs: Node[][];
}

const MAX_DIFFERENCE = 1e-4;
const MICROSOFT = 'com.microsoft';
const EPS = 1e-6;

/** Values on both sides: ours as a tensor, theirs as an array. */
async function shared(inputs: Inputs, ...shape: number[]): Promise<{ tensor: TensorHandle; array: FloatArray }> {
  const tensor = inputs.tensor(shape, 'float32');
  const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
  await tensor.read(data);
  return { tensor, array: { data, shape } };
}

/** [rows, cols] → [cols, rows], or columns [begin, end) of it as they are. */
function transposed({ data, shape }: FloatArray): FloatArray {
  const [rows, cols] = shape as [number, number];
  const out = new Float32Array(data.length);
  for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) out[c * rows + r] = data[r * cols + c] as number;
  return { data: out, shape: [cols, rows] };
}

function columns({ data, shape }: FloatArray, begin: number, end: number): Float32Array {
  const width = shape.at(-1) as number;
  const out = new Float32Array((data.length / width) * (end - begin));
  for (let r = 0; r < data.length / width; r++) out.set(data.subarray(r * width + begin, r * width + end), r * (end - begin));
  return out;
}

function linearGelu(rows: number, inputs: number, outputs: number): Comparison {
  return {
    ...{ name: 'linear bias+gelu', shape: `${rows}x${inputs}->${outputs}`, output: [rows, outputs] },
    ours: async (make) => {
      const [x, w, bias] = [await shared(make, rows, inputs), await shared(make, outputs, inputs), await shared(make, outputs)];
      const weight = make.keep(native.packLinear(w.tensor, 'float32'));
      const work = (): TensorHandle => native.linear(x.tensor, weight, { bias: bias.tensor, activation: 'gelu' });
      return { work, feeds: { x: x.array }, weights: { w: transposed(w.array), bias: bias.array } };
    },
    graphs: [
      [
        { op: 'MatMul', inputs: ['x', 'w'], outputs: ['product'] },
        { op: 'Add', inputs: ['product', 'bias'], outputs: ['sum'] },
        { op: 'Gelu', inputs: ['sum'], outputs: ['out'] },
      ],
      [
        { op: 'Gemm', inputs: ['x', 'w', 'bias'], outputs: ['sum'] },
        { op: 'Gelu', inputs: ['sum'], outputs: ['out'] },
      ],
    ],
  };
}

function attention(heads: number, seq: number, headDim: number): Comparison {
  const width = heads * headDim;
  return {
    ...{ name: 'attention', shape: `1x${heads}x${seq}x${headDim}`, output: [1, seq, width] },
    ours: async (make) => {
      const { tensor, array } = await shared(make, 1, seq, 3 * width);
      const part = (i: number): FloatArray => ({ data: columns(array, i * width, (i + 1) * width), shape: [1, seq, width] });
      return { work: () => native.attention(tensor, heads), feeds: { q: part(0), k: part(1), v: part(2) } };
    },
    graphs: [
      [{ op: 'MultiHeadAttention', domain: MICROSOFT, inputs: ['q', 'k', 'v'], outputs: ['out'], attributes: { num_heads: heads } }],
    ],
  };
}

function layerNorm(rows: number, width: number): Comparison {
  return {
    ...{ name: 'LayerNorm', shape: `${rows}x${width}`, output: [rows, width] },
    ours: async (make) => {
      const [x, weight, bias] = [await shared(make, rows, width), await shared(make, width), await shared(make, width)];
      const work = (): TensorHandle => native.norm(x.tensor, { weight: weight.tensor, bias: bias.tensor, eps: EPS });
      return { work, feeds: { x: x.array }, weights: { weight: weight.array, bias: bias.array } };
    },
    graphs: [
      [{ op: 'LayerNormalization', inputs: ['x', 'weight', 'bias'], outputs: ['out'], attributes: { axis: 1, epsilon: { float: EPS } } }],
    ],
  };
}

const comparisons = [linearGelu(1025, 1024, 4096), attention(16, 1025, 64), layerNorm(4100, 1024)];

/** All comparisons that are wanted; none, and why, where ONNX Runtime cannot be had. */
export async function comparePeers(
  effort: Effort,
  wanted: (row: Pick<Row, 'family' | 'name' | 'shape' | 'dtype'>) => boolean,
  say: (line: string) => void,
): Promise<PeerResult[]> {
  const chosen = comparisons.filter(({ name, shape }) => wanted({ family: 'peers', name, shape, dtype: 'float32' }));
  if (chosen.length === 0) return [];
  const runtime = loadRuntime(say);
  if (!runtime) return [];
  const results: PeerResult[] = [];
  say(`\n${'float32, median ms'.padEnd(40)}${'ours'.padStart(10)}${'ONNX Runtime'.padStart(14)}${'ours/theirs'.padStart(13)}`);
  for (const comparison of chosen) {
    const result = await compare(comparison, runtime, effort);
    const cells = [result.oursMs.toFixed(2).padStart(10), result.theirsMs.toFixed(2).padStart(14), result.ratio.toFixed(2).padStart(13)];
    say(`${result.name} ${result.shape}`.padEnd(40) + cells.join(''));
    results.push(result);
  }
  return results;
}

async function compare(comparison: Comparison, runtime: OnnxRuntime, effort: Effort): Promise<PeerResult> {
  const make = new Inputs();
  try {
    const { work, feeds, weights } = await comparison.ours(make);
    const oursMs = (await time(work, effort)).latency.p50;
    const expected = await valuesOf(work(), comparison.output);
    const theirs: { ms: number; difference: number }[] = [];
    for (const nodes of comparison.graphs) {
      const inputs = Object.fromEntries(Object.entries(feeds).map(([name, { shape }]) => [name, shape]));
      const graph: Graph = { nodes, inputs, outputs: { out: comparison.output }, ...(weights ? { initializers: weights } : {}) };
      theirs.push(await timeGraph(runtime, graph, feeds, effort, expected));
    }
    const difference = Math.max(...theirs.map((t) => t.difference));
    if (!(difference < MAX_DIFFERENCE))
      throw new Error(`${comparison.name}: ours and ONNX Runtime's differ by ${difference}: not the same operation`);
    const theirsMs = Math.min(...theirs.map((t) => t.ms));
    const { name, shape } = comparison;
    return { family: 'peers', name, shape, dtype: 'float32', oursMs, theirsMs, ratio: oursMs / theirsMs, difference };
  } finally {
    await make.release();
  }
}

async function timeGraph(
  runtime: OnnxRuntime,
  graph: Graph,
  feeds: Record<string, FloatArray>,
  effort: Effort,
  expected: Float32Array,
): Promise<{ ms: number; difference: number }> {
  const session = await runtime.InferenceSession.create(onnxModel(graph), {
    executionProviders: ['cpu'],
    graphOptimizationLevel: 'all',
    intraOpNumThreads: cpuInfo().threads,
    interOpNumThreads: 1,
  });
  try {
    const tensors = Object.fromEntries(
      Object.entries(feeds).map(([name, { data, shape }]) => [name, new runtime.Tensor('float32', data, shape)]),
    );
    const { out } = await session.run(tensors);
    const work: Work = () => session.run(tensors);
    return { ms: (await time(work, effort)).latency.p50, difference: relativeL2(expected, out!.data) };
  } finally {
    await session.release();
  }
}

async function valuesOf(handle: TensorHandle, shape: readonly number[]): Promise<Float32Array> {
  const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
  await handle.read(values);
  handle.dispose();
  return values;
}

function relativeL2(actual: Float32Array, expected: Float32Array): number {
  let [difference, norm] = [0, 0];
  for (const [i, value] of expected.entries()) {
    difference += ((actual[i] as number) - value) ** 2;
    norm += value ** 2;
  }
  return Math.sqrt(difference / norm);
}

/**
 * Loads onnxruntime-node, installing it first where it is not there. Its install script is left out: it only fetches
 * GPU libraries, and the CPU's are in the package.
 */
function loadRuntime(say: (line: string) => void): OnnxRuntime | undefined {
  const require = createRequire(import.meta.url);
  const load = (): OnnxRuntime => require('onnxruntime-node') as OnnxRuntime;
  try {
    return load();
  } catch {
    say('\nInstalling onnxruntime-node into bench/peers ...');
  }
  const npm = ['install', '--prefix', import.meta.dirname, '--ignore-scripts', '--no-package-lock', '--no-audit', '--no-fund'];
  const { status, stderr, error } = spawnSync('npm', npm, { encoding: 'utf8' });
  try {
    if (status !== 0) throw error ?? new Error(stderr.split('\n').find((line) => line.startsWith('npm error')) ?? 'npm failed');
    return load();
  } catch (failure) {
    say(`ONNX Runtime cannot be had, so it is not compared with: ${(failure as Error).message.split('\n')[0] ?? ''}`);
    return undefined;
  }
}
