/** Single operations in ONNX Runtime. */
import { native, type TensorHandle } from '../../lib/native.js';
import { time } from '../harness.js';
import type { Inputs } from '../inputs.js';
import type { Comparison } from './compare.js';
import { MICROSOFT, transposed, type FloatArray, type Node } from './onnx.js';
import { timeGraphs, type OnnxRuntime } from './onnxruntime.js';

interface Operation {
  name: string;
  shape: string;
  output: readonly number[];
  /** Queues this library's operation on operands from `inputs`. */
  ours: (inputs: Inputs) => Promise<{ work: () => TensorHandle; feeds: Record<string, FloatArray>; weights?: Record<string, FloatArray> }>;
  /** Equivalent ONNX graphs. The output of each is named `out`. */
  graphs: Node[][];
}

const EPS = 1e-6;

/** The same values for both sides: a tensor and an array. */
async function shared(inputs: Inputs, ...shape: number[]): Promise<{ tensor: TensorHandle; array: FloatArray }> {
  const tensor = inputs.tensor(shape, 'float32');
  const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
  await tensor.read(data);
  return { tensor, array: { data, shape } };
}

/** Columns [begin, end). */
function columns({ data, shape }: FloatArray, begin: number, end: number): Float32Array {
  const width = shape.at(-1) as number;
  const out = new Float32Array((data.length / width) * (end - begin));
  for (let r = 0; r < data.length / width; r++) out.set(data.subarray(r * width + begin, r * width + end), r * (end - begin));
  return out;
}

function linearGelu(rows: number, inputs: number, outputs: number): Operation {
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

function attention(heads: number, seq: number, headDim: number): Operation {
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

function layerNorm(rows: number, width: number): Operation {
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

function comparison({ name, shape, output, ours, graphs }: Operation): Comparison<OnnxRuntime> {
  return {
    ...{ peer: 'ONNX Runtime', name, shape },
    measure: async (runtime, make, effort) => {
      const { work, feeds, weights } = await ours(make);
      const oursMs = (await time(work, effort)).latency.p50;
      const expected = await valuesOf(work(), output);
      const inputs = Object.fromEntries(Object.entries(feeds).map(([input, array]) => [input, array.shape]));
      const alike = { inputs, outputs: { out: output }, ...(weights ? { initializers: weights } : {}) };
      const variants = graphs.map((nodes) => ({ nodes, ...alike }));
      return { oursMs, ...(await timeGraphs(runtime, variants, feeds, effort, expected)) };
    },
  };
}

async function valuesOf(handle: TensorHandle, shape: readonly number[]): Promise<Float32Array> {
  const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
  await handle.read(values);
  handle.dispose();
  return values;
}

export const operations = [linearGelu(1025, 1024, 4096), attention(16, 1025, 64), layerNorm(4100, 1024)].map(comparison);
