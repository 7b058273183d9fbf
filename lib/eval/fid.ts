/**
 * Fréchet distance of two feature sets, each modelled as a Gaussian (Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule"):
 *
 *   d² = |m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½)
 *
 * With C₁ = F Fᵀ and F = V Λ^½ from its eigenvectors and eigenvalues, C₁ C₂ has the eigenvalues of the symmetric Fᵀ C₂ F, and the trace of the root is the
 * sum of their roots. So the root of an asymmetric matrix (`scipy.linalg.sqrtm` in other implementations) is not needed, and rank-deficient covariances are
 * no special case. Covariances are summed natively, the rest is float64.
 */
import { EigenvalueDecomposition, Matrix } from 'ml-matrix';
import type { NdArray } from 'ndarray';
import { UniFlowError } from '../errors.js';
import { native } from '../native.js';
import { Tensor, tensorOf, tidy } from '../tensor.js';

export interface Gaussian {
  /** [D] */
  mean: Float32Array;
  /** [D,D], divisor N − 1. */
  covariance: Float32Array;
}

/** Mean and covariance of features [N,D]. */
export async function gaussianOf(features: NdArray): Promise<Gaussian> {
  const [mean, covariance] = tidy(() => {
    const moments = native.covariance(Tensor.from(features, 'features').handle);
    return [tensorOf(moments.mean), tensorOf(moments.covariance)] as const;
  });
  try {
    const read = await Promise.all([mean.read(), covariance.read()]);
    return { mean: read[0].data as Float32Array, covariance: read[1].data as Float32Array };
  } finally {
    mean.dispose();
    covariance.dispose();
  }
}

export function frechetDistance(a: Gaussian, b: Gaussian): number {
  const d = a.mean.length;
  if (b.mean.length !== d) throw UniFlowError.expected('BAD_INPUT', 'features', `${d} dimensions in both sets`, String(b.mean.length));
  for (const [i, { mean, covariance }] of [a, b].entries())
    if (![mean, covariance].every((values) => values.every(Number.isFinite)))
      throw UniFlowError.expected('BAD_INPUT', `features of set ${i + 1}`, 'finite numbers, with finite variances', 'NaN or infinity');
  const [c1, c2] = [a, b].map(({ covariance }) => Matrix.from1DArray(d, d, covariance)) as [Matrix, Matrix];
  const difference = Matrix.sub(Matrix.rowVector(a.mean), Matrix.rowVector(b.mean));
  const { eigenvectorMatrix, realEigenvalues } = symmetric(c1);
  const f = eigenvectorMatrix.mulRowVector(realEigenvalues.map(root));
  const roots = symmetric(f.transpose().mmul(c2).mmul(f)).realEigenvalues.map(root);
  return difference.dot(difference) + c1.trace() + c2.trace() - 2 * roots.reduce((sum, r) => sum + r, 0);
}

const symmetric = (m: Matrix): EigenvalueDecomposition => new EigenvalueDecomposition(m, { assumeSymmetric: true });

/** Rounding may make an eigenvalue of zero negative. */
const root = (value: number): number => Math.sqrt(Math.max(0, value));

/** Fréchet distance between feature sets [N,D] and [M,D]. */
export async function fid(a: NdArray, b: NdArray): Promise<number> {
  return frechetDistance(await gaussianOf(a), await gaussianOf(b));
}
