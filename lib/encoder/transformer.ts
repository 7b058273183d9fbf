/** The pre-norm transformer block, used by every encoder and by the decoder's global blocks. */
import type { Activation } from '../native.js';
import { attention, linear, norm, qkNorm, rope, swiglu, type Linear, type Norm } from '../ops.js';
import { recompute } from '../tape.js';
import type { Tensor } from '../tensor.js';

export interface Block {
  norm1: Norm;
  qkv: Linear; // [3D, D]
  qNorm?: Tensor | undefined; // [D]
  kNorm?: Tensor | undefined;
  proj: Linear; // [D, D]
  scale1?: Tensor | undefined; // LayerScale [D]
  norm2: Norm;
  fc1: Linear; // [M, D], or [2M, D] gated
  fc2: Linear; // [D, M]
  scale2?: Tensor | undefined;
}

export interface BlockOptions {
  heads: number;
  eps: number;
  /** Epsilon of the norm of q and k. Default: `eps`. */
  qkEps?: number;
  rms?: boolean;
  activation: Activation;
  gated?: boolean;
  /** Rotary positions of the tokens after `prefix`. */
  rotary?: { table: Tensor; prefix: number } | undefined;
  /** In training, keeps only the block's input and output: see {@link recompute}. */
  recompute?: boolean;
}

/** h [B,S,D] → [B,S,D]: h += ls1 * attention(norm1(h)); h += ls2 * mlp(norm2(h)). */
export function transformerBlock(h: Tensor, block: Block, { recompute: again = false, ...o }: BlockOptions): Tensor {
  if (again) return recompute((x) => transformerBlock(x, block, o), [h]);
  const normalise = { eps: o.eps, rms: o.rms ?? false };
  let qkv = linear(norm(h, block.norm1, normalise), block.qkv);
  if (block.qNorm && block.kNorm) qkv = qkNorm(qkv, block.qNorm, block.kNorm, o.qkEps ?? o.eps);
  if (o.rotary) qkv = rope(qkv, o.heads, o.rotary.prefix, o.rotary.table);
  h = linear(attention(qkv, o.heads), block.proj, { scale: block.scale1, residual: h });
  const u = norm(h, block.norm2, normalise);
  const m = o.gated ? swiglu(linear(u, block.fc1)) : linear(u, block.fc1, { activation: o.activation });
  return linear(m, block.fc2, { scale: block.scale2, residual: h });
}
