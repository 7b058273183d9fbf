/**
 * Latents of a pretrained encoder: the linear map from its tokens t (or the sum of its last layers) to the patches' normalised principal coefficients y with the least mean squared error, by
 * ridge regression in closed form. With C the covariances, S the tokens' deviations and ρ the ridge:
 *
 *   A = C_yt S⁻¹ (S⁻¹ C_tt S⁻¹ + ρ I)⁻¹ S⁻¹,   latents = A (t − mean t)
 *
 * Each token channel is normalised by its own deviation, because a few channels of pretrained encoders are thousands of times larger than the others.
 */
import { CholeskyDecomposition, Matrix } from 'ml-matrix';
import type { NdArray } from 'ndarray';
import { Moments, type PrincipalComponents } from '../eval/pca.js';
import { add, cast, linear, sliceTokens, unfold, type Linear } from '../ops.js';
import { onDevice, Tensor, tidy } from '../tensor.js';
import type { UniFlowModel } from '../model.js';
import { capacity } from './capacity.js';
import { inverseDeviation, type Coefficients } from './linear.js';

const RIDGE = 1e-4;

/** @param pixels batches uint8 [B,H,W,3]. @returns latents as a function of the encoder's tokens. */
export async function regressLatents(
  uniflow: UniFlowModel,
  components: PrincipalComponents,
  pixels: AsyncIterable<NdArray>,
): Promise<Coefficients> {
  const { channels } = capacity(uniflow.config);
  const { width } = uniflow.config.encoder;
  const coefficients = coefficientsOf(components, channels);
  const { device } = uniflow;
  const moments = new Moments();
  for await (const batch of pixels) {
    const rows = onDevice(device, () => tidy(() => tokensAndCoefficients(uniflow, Tensor.from(batch, 'pixels'), coefficients)));
    try {
      await onDevice(device, () => moments.add(rows));
    } finally {
      rows.dispose();
    }
  }
  const { mean, covariance } = moments.statistics();
  const all = Matrix.from1DArray(width + channels, width + channels, covariance);
  const inverse = Array.from({ length: width }, (_, i) => (all.get(i, i) > 0 ? 1 / Math.sqrt(all.get(i, i)) : 0)); // a dead channel carries no information
  const scaled = (m: Matrix): Matrix => m.mulColumnVector(inverse);
  const correlations = scaled(all.subMatrix(0, width - 1, 0, width - 1)).mulRowVector(inverse);
  const tokens = Matrix.add(correlations, correlations.transpose()).mul(0.5); // rounding makes them slightly asymmetric
  for (let i = 0; i < width; i++) tokens.set(i, i, 1 + RIDGE);
  const covariances = all.subMatrix(0, width - 1, width, width + channels - 1); // C_ty [D,K]
  const weight = scaled(new CholeskyDecomposition(tokens).solve(scaled(covariances.clone()))).transpose(); // [K,D]
  const centre = Matrix.columnVector(mean.subarray(0, width));
  const varianceOf = (k: number): number => Math.max(0, dot(weight.getRow(k), covariances.getColumn(k))); // of a latent, but for the ridge
  const deviations = Float64Array.from({ length: channels }, (_, k) => Math.sqrt(varianceOf(k)));
  return { weight, bias: Float64Array.from(weight.mmul(centre).mul(-1).to1DArray()), deviations };
}

const dot = (a: readonly number[], b: readonly number[]): number => a.reduce((sum, v, i) => sum + v * (b[i] as number), 0);

/** Maps patch vectors to principal coefficients divided by their deviations, as a float32 layer: weight [K,P], bias [K]. */
function coefficientsOf(
  { directions, variances, mean }: PrincipalComponents,
  channels: number,
): { weight: Float32Array; bias: Float32Array } {
  const weight = directions.subMatrix(0, mean.length - 1, 0, channels - 1).transpose();
  weight.mulColumnVector(Array.from({ length: channels }, (_, k) => inverseDeviation(variances, k)));
  const bias = weight.mmul(Matrix.columnVector(mean)).mul(-1);
  return { weight: Float32Array.from(weight.to1DArray()), bias: Float32Array.from(bias.to1DArray()) };
}

/** Both concatenated, [B·N, D + K] float32. It is a sum of two products, because there is no op that joins rows of different widths. */
function tokensAndCoefficients(uniflow: UniFlowModel, pixels: Tensor, { weight, bias }: ReturnType<typeof coefficientsOf>): Tensor {
  const { encoder, normalisation, config } = uniflow;
  const all = uniflow.latentTokens(pixels);
  const tokens = cast(sliceTokens(all, encoder.prefix, all.dim(1)), 'float32');
  const patches = unfold(pixels, config.patch, normalisation, 'float32');
  const width = tokens.dim(2);
  const rows = width + bias.length;
  const upper = new Float32Array(rows * width);
  for (let i = 0; i < width; i++) upper[i * (width + 1)] = 1;
  const lower = new Float32Array(rows * patches.dim(2));
  lower.set(weight, width * patches.dim(2));
  const offset = new Float32Array(rows);
  offset.set(bias, width);
  const layer = (values: Float32Array): Linear => ({ weight: Tensor.from({ data: values, shape: [rows, values.length / rows] }) });
  const both = add(linear(tokens, layer(upper)), linear(patches, { ...layer(lower), bias: Tensor.from({ data: offset, shape: [rows] }) }));
  return both.reshape([both.dim(0) * both.dim(1), rows]);
}
