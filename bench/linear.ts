/**
 * Linear layers of ViT-L at 448 px, as called by the encoder. Compute-bound, except with few rows, which are bound by reading the weight.
 */
import { native, type Activation, type FloatType, type TensorHandle } from '../lib/native.js';
import { linearCost } from './costs.js';
import type { Row } from './harness.js';

interface Layer {
  name: string;
  inputs: number;
  outputs: number;
  activation?: Activation;
  /** With LayerScale and residual connection. */
  scaled?: boolean;
}

const D = 1024;
const qkv: Layer = { name: 'qkv bias', inputs: D, outputs: 3 * D };
const proj: Layer = { name: 'proj bias+scale+residual', inputs: D, outputs: D, scaled: true };
const fc1: Layer = { name: 'fc1 bias+gelu', inputs: D, outputs: 4 * D, activation: 'gelu' };
const fc2: Layer = { name: 'fc2 bias+scale+residual', inputs: 4 * D, outputs: D, scaled: true };

/** With int8 weights, activations are bfloat16, and quantising them is part of the call. */
function row({ name, inputs, outputs, activation, scaled = false }: Layer, rows: number, type: FloatType | 'int8'): Row {
  const dtype = type === 'int8' ? 'bfloat16' : type;
  return {
    ...{ family: 'linear', name, shape: `${rows}x${inputs}->${outputs}`, dtype: type },
    cost: linearCost({ rows, inputs, outputs, dtype, weight: type, residual: scaled }),
    setup: (make) => {
      const x = make.tensor([rows, inputs], dtype);
      const weight = make.weight(outputs, inputs, type);
      const options = {
        bias: make.vector(outputs),
        activation,
        ...(scaled ? { scale: make.vector(outputs), residual: make.tensor([rows, outputs], dtype) } : {}),
      };
      return () => native.linear(x, weight, options);
    },
  };
}

/** One gradient of fc1: of its input (dX = dY·W) or of its weight (dW = dYᵀ·X). Both have the products of the forward pass. */
function backwardRow(of: 'x' | 'weight', rows: number, dtype: FloatType): Row {
  const { inputs, outputs } = fc1;
  return {
    ...{ family: 'linear', name: `fc1 backward, d${of}`, shape: `${rows}x${inputs}->${outputs}`, dtype },
    cost: linearCost({ rows, inputs, outputs, dtype, residual: false }),
    setup: (make) => {
      const x = make.tensor([rows, inputs], dtype);
      const weight = make.tensor([outputs, inputs], dtype);
      const dOut = make.tensor([rows, outputs], dtype);
      return () => native.linearBackward(x, weight, dOut, of === 'x', of === 'weight', false)[of] as TensorHandle;
    },
  };
}

const floatRows = (['bfloat16', 'float32'] as const).flatMap((dtype) => [
  ...[qkv, proj, fc1, fc2].map((layer) => row(layer, 1025, dtype)),
  ...[4100, 197, 1].map((count) => row(fc1, count, dtype)),
  row({ ...fc1, inputs: 768, outputs: 3072 }, 257, dtype),
  ...(['x', 'weight'] as const).map((of) => backwardRow(of, 1025, dtype)),
]);

export const rows: Row[] = [
  ...floatRows,
  ...[qkv, proj, fc1, fc2].map((layer) => row(layer, 1025, 'int8')),
  ...[4100, 1].map((count) => row(fc1, count, 'int8')),
];
