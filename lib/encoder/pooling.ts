/** From an encoder's tokens [B,S,D] to one vector per image. */
import { native } from '../native.js';
import { cast, norm } from '../ops.js';
import { onDevice, Tensor, tensorOf } from '../tensor.js';

/**
 * - `cls`: the class token, after the final norm if the family has one.
 * - `mean`: the mean of the patch tokens.
 * - `head`: the pooling head that the encoder was trained with: SigLIP's attention pool; CLIP's norm and projection of the class token.
 */
export type Pool = 'cls' | 'mean' | 'head';

export const POOLS: Record<Pool, true> = { cls: true, mean: true, head: true };

/** Mean over the tokens, computed per image so that it does not depend on the batch: [B,N,D] → float32 [B,D]. */
export function meanOfTokens(tokens: Tensor): Tensor {
  const [images, count, width] = tokens.shape as [number, number, number];
  const means = Array.from({ length: images }, (_, b) => {
    const sum = tensorOf(native.sumRows(tokens.slice(b, b + 1).handle, 1));
    return tensorOf(native.add(undefined, sum.handle, undefined, 0, 1 / count)).handle;
  });
  return tensorOf(native.concat(means)).reshape([images, width]);
}

/** All tokens concatenated: [B,N,D] → float32 [B,N*D]. */
export function flat(tokens: Tensor): Tensor {
  const [images, count, width] = tokens.shape as [number, number, number];
  return cast(tokens, 'float32').reshape([images, count * width]);
}

/** Keeps a vector of zeros zero, as the smallest norm of PyTorch's normalize (1e-12) does. */
const SMALLEST_SQUARE = 1e-24;

/** Vectors of length 1: float32 [B,E] → [B,E]. It is an RMSNorm with the weight 1 / √E. */
export function unitLength(vectors: Tensor): Tensor {
  const width = vectors.dim(1);
  const weight = onDevice(vectors.device, () => Tensor.from({ data: new Float32Array(width).fill(width ** -0.5), shape: [width] }));
  return norm(vectors, { weight }, { eps: SMALLEST_SQUARE / width, rms: true });
}
