/**
 * Second moments of patches and their principal components: the best linear codec, which a tokenizer must beat and can start from.
 *
 * Moments are summed in one pass. The native kernel gives each batch's mean m and scatter S = Σ (x − m)(x − m)ᵀ. Two batches a, b are combined in float64
 * (Chan, Golub and LeVeque 1983) with δ = m_b − m_a and n = n_a + n_b:
 *
 *   m = m_a + δ n_b / n,   S = S_a + S_b + δ δᵀ n_a n_b / n
 */
import { EigenvalueDecomposition, Matrix } from 'ml-matrix';
import type { NdArray } from 'ndarray';
import { UniFlowError } from '../errors.js';
import { native, type NativeNormalisation } from '../native.js';
import { unfold } from '../ops.js';
import { onDevice, Tensor, tidy } from '../tensor.js';

/** Mean and covariance of vectors. */
export interface Statistics {
  /** Number of vectors. */
  count: number;
  /** [D] */
  mean: Float64Array;
  /** [D,D], divisor count − 1. */
  covariance: Float64Array;
}

/** Accumulates {@link Statistics} of vectors in batches. */
export class Moments {
  private count = 0;
  private mean: Float64Array | undefined;
  private scatter: Float64Array | undefined;

  /** Adds the rows of x [N,D] float32. */
  async add(x: Tensor): Promise<void> {
    if (x.dim(0) === 1) return this.combine(1, (await x.read()).data as Float32Array, new Float32Array(x.dim(1) ** 2)); // a single row has no covariance
    const moments = native.covariance(x.handle);
    const [mean, covariance] = [new Tensor(moments.mean), new Tensor(moments.covariance)];
    try {
      const read = await Promise.all([mean.read(), covariance.read()]);
      this.combine(x.dim(0), read[0].data as Float32Array, read[1].data as Float32Array);
    } finally {
      mean.dispose();
      covariance.dispose();
    }
  }

  private combine(rows: number, mean: Float32Array, covariance: Float32Array): void {
    const width = mean.length;
    const ours = (this.mean ??= new Float64Array(width));
    const scatter = (this.scatter ??= new Float64Array(width * width));
    if (ours.length !== width) throw UniFlowError.expected('BAD_INPUT', 'x', `rows of ${ours.length} values`, String(width));
    const total = this.count + rows;
    const delta = Float64Array.from(mean, (m, i) => m - (ours[i] as number));
    for (let i = 0, at = 0; i < width; i++) {
      const factor = ((delta[i] as number) * this.count * rows) / total;
      for (let j = 0; j < width; j++, at++)
        scatter[at] = (scatter[at] as number) + (covariance[at] as number) * (rows - 1) + factor * (delta[j] as number);
    }
    for (let i = 0; i < width; i++) ours[i] = (ours[i] as number) + ((delta[i] as number) * rows) / total;
    this.count = total;
  }

  /** @throws UniFlowError `BAD_INPUT` if nothing was added. */
  statistics(): Statistics {
    const { count, mean, scatter } = this;
    if (!mean || !scatter) throw UniFlowError.expected('BAD_INPUT', 'statistics', 'at least one batch', 'none');
    return { count, mean, covariance: scatter.map((sum) => sum / (count - 1)) };
  }
}

export interface PatchOptions {
  patch: number;
  normalisation: NativeNormalisation;
  /** Default `'cpu'`. */
  device?: string;
}

/**
 * Statistics of all patch vectors of images, (channel, row, column), normalised, in one pass.
 * @param pixels batches, uint8 [B,H,W,3] or float32 [B,3,H,W] normalised; H and W multiples of the patch. Batches may differ in size.
 */
export async function patchStatistics(
  pixels: Iterable<NdArray> | AsyncIterable<NdArray>,
  { patch, normalisation, device = 'cpu' }: PatchOptions,
): Promise<Statistics> {
  const moments = new Moments();
  for await (const batch of pixels) {
    const rows = onDevice(device, () =>
      tidy(() => {
        const vectors = unfold(Tensor.from(batch, 'pixels'), patch, normalisation, 'float32'); // [B,N,P]
        return vectors.reshape([vectors.dim(0) * vectors.dim(1), vectors.dim(2)]);
      }),
    );
    try {
      await onDevice(device, () => moments.add(rows));
    } finally {
      rows.dispose();
    }
  }
  return moments.statistics();
}

/** Orthonormal directions of largest variance, in descending order. */
export interface PrincipalComponents {
  /** [D] */
  mean: Float64Array;
  /** [D,K]: column k is direction k. */
  directions: Matrix;
  /** [K]: variance along each direction. */
  variances: Float64Array;
  /** Total variance outside these directions: the mean squared error per vector when keeping K coefficients. */
  residual: number;
}

/** The first `count` principal components; default: all. */
export function principalComponents({ mean, covariance }: Statistics, count: number = mean.length): PrincipalComponents {
  const d = mean.length;
  const { realEigenvalues, eigenvectorMatrix } = new EigenvalueDecomposition(Matrix.from1DArray(d, d, covariance), {
    assumeSymmetric: true,
  });
  const order = realEigenvalues.map((_, i) => i).sort((a, b) => (realEigenvalues[b] as number) - (realEigenvalues[a] as number));
  const variance = (i: number): number => Math.max(0, realEigenvalues[i] as number); // rounding may make a variance of zero negative
  const [kept, left] = [order.slice(0, count), order.slice(count)];
  return {
    mean,
    directions: eigenvectorMatrix.subMatrixColumn(kept),
    variances: Float64Array.from(kept, variance),
    residual: left.reduce((sum, i) => sum + variance(i), 0),
  };
}
