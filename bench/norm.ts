/** Norms over the last dimension. Memory-bound: every row is read and written once. */
import { native, type FloatType } from '../lib/native.js';
import { sizeOf } from './costs.js';
import type { Row } from './harness.js';

const EPS = 1e-6;

function layerNorm(rows: number, width: number, dtype: FloatType): Row {
  return {
    ...{ family: 'norm', name: 'LayerNorm', shape: `${rows}x${width}`, dtype },
    cost: { bytes: 2 * rows * width * sizeOf(dtype) + 8 * width },
    setup: (make) => {
      const x = make.tensor([rows, width], dtype);
      const options = { weight: make.vector(width), bias: make.vector(width), eps: EPS };
      return () => native.norm(x, options);
    },
  };
}

function rmsNorm(rows: number, width: number, dtype: FloatType): Row {
  return {
    ...{ family: 'norm', name: 'RMSNorm', shape: `${rows}x${width}`, dtype },
    cost: { bytes: 2 * rows * width * sizeOf(dtype) + 4 * width },
    setup: (make) => {
      const x = make.tensor([rows, width], dtype);
      const options = { weight: make.vector(width), eps: EPS, rms: true };
      return () => native.norm(x, options);
    },
  };
}

/** The flow head's norm: a scale and a shift for every element. */
function adaLN(rows: number, width: number, dtype: FloatType): Row {
  return {
    ...{ family: 'norm', name: 'AdaLN', shape: `${rows}x${width}`, dtype },
    cost: { bytes: 4 * rows * width * sizeOf(dtype) + 8 * width },
    setup: (make) => {
      const x = make.tensor([rows, width], dtype);
      const modulation = { scale: make.tensor([rows, width], dtype), shift: make.tensor([rows, width], dtype) };
      const options = { weight: make.vector(width), bias: make.vector(width), ...modulation, eps: EPS };
      return () => native.norm(x, options);
    },
  };
}

/** q and k are normalised and v is copied: all three are read and written. */
function qkNorm(seq: number, width: number, dtype: FloatType): Row {
  return {
    ...{ family: 'norm', name: 'qkNorm', shape: `${seq}x3x${width}`, dtype },
    cost: { bytes: 6 * seq * width * sizeOf(dtype) + 8 * width },
    setup: (make) => {
      const qkv = make.tensor([1, seq, 3 * width], dtype);
      const [q, k] = [make.vector(width), make.vector(width)];
      return () => native.qkNorm(qkv, q, k, EPS);
    },
  };
}

export const rows: Row[] = (['bfloat16', 'float32'] as const).flatMap((dtype) => [
  layerNorm(4100, 1024, dtype),
  layerNorm(197, 768, dtype),
  adaLN(4096, 1024, dtype),
  rmsNorm(1025, 3200, dtype), // InternViT-6B
  qkNorm(1025, 3200, dtype),
]);
