/** Projection of vectors onto a few principal components. */
import { Matrix } from 'ml-matrix';
import type { Linear } from '../ops.js';
import { Tensor } from '../tensor.js';
import type { PrincipalComponents } from './pca.js';

/** The linear layer x → m + V Vᵀ (x − m), [..., D] → [..., D], with the first `count` directions V [D,K]. Call inside tidy() or dispose of it. */
export function projection({ mean, directions }: PrincipalComponents, count: number): Linear {
  const d = mean.length;
  const kept = directions.subMatrixColumn(Array.from({ length: count }, (_, k) => k));
  const weight = kept.mmul(kept.transpose()); // zero without directions
  const m = Matrix.columnVector(mean);
  const bias = Matrix.sub(m, weight.mmul(m));
  return {
    weight: Tensor.from({ data: Float32Array.from(weight.to1DArray()), shape: [d, d] }),
    bias: Tensor.from({ data: Float32Array.from(bias.to1DArray()), shape: [d] }),
  };
}
