/**
 * The operations on tensors, each with its derivative. Shapes and formulas are in native/ops/*.h.
 *
 * In inference, linear() is one fused kernel. While a tape records, it is composed of separate operations, because the backward pass needs the intermediate
 * values.
 */
import type { Levels } from './codes.js';
import { native, type Activation, type FloatType, type NativeNormalisation, type QualityConvention, type RopeUnit } from './native.js';
import { differentiable, recording } from './tape.js';
import { tensorOf, tidy, type Grid, type Tensor } from './tensor.js';

/** A linear layer's parameters: weight [out, in], packed for inference or plain for training; bias [out]. */
export interface Linear {
  weight: Tensor;
  bias?: Tensor | undefined;
}

export interface LinearOptions {
  activation?: Activation;
  /** LayerScale [out]. */
  scale?: Tensor | undefined;
  residual?: Tensor | undefined;
}

let observer: ((x: Tensor, layer: Linear) => void) | undefined;

/** @internal Calls `observe` with the input of every linear layer that `fn` runs; `fn` must be synchronous. */
export function observeLinear(observe: (x: Tensor, layer: Linear) => void, fn: () => void): void {
  observer = observe;
  try {
    fn();
  } finally {
    observer = undefined;
  }
}

/** Calls the observer, which may run layers itself. */
function notify(x: Tensor, layer: Linear): void {
  const current = observer;
  observer = undefined;
  try {
    current?.(x, layer);
  } finally {
    observer = current;
  }
}

/** residual + scale * activation(x Wᵀ + b): [..., in] → [..., out]. */
export function linear(x: Tensor, layer: Linear, { activation, scale, residual }: LinearOptions = {}): Tensor {
  if (observer) notify(x, layer);
  if (recording(x, layer.weight, layer.bias, scale, residual)) {
    const y = affine(x, layer);
    const a = activation ? activate(y, activation) : y;
    return residual ? scaleAdd(residual, a, { scale }) : a;
  }
  return tensorOf(
    native.linear(x.handle, layer.weight.handle, {
      bias: layer.bias?.handle,
      scale: scale?.handle,
      residual: residual?.handle,
      activation,
    }),
  );
}

function affine(x: Tensor, { weight, bias }: Linear): Tensor {
  const y = tensorOf(native.linear(x.handle, weight.handle, { bias: bias?.handle }));
  const tape = recording(x, weight, bias);
  const [wantX, wantWeight, wantBias] = [x, weight, bias].map((input) => tape?.watches(input) ?? false) as [boolean, boolean, boolean];
  return differentiable(y, [x, weight, bias], (d) => {
    const g = native.linearBackward(x.handle, weight.handle, d.handle, wantX, wantWeight, wantBias);
    return [g.x, g.weight, g.bias].map((handle) => handle && tensorOf(handle));
  });
}

/** GELU or SiLU of every element. */
export function activate(x: Tensor, kind: Activation): Tensor {
  const y = tensorOf(native.activation(x.handle, kind));
  return differentiable(y, [x], (d) => [tensorOf(native.activationBackward(x.handle, d.handle, kind))]);
}

/** residual + scale * branch (LayerScale [D]), or residual + gate * branch (AdaLN, same shape as branch). */
export function scaleAdd(residual: Tensor, branch: Tensor, { scale, gate }: { scale?: Tensor | undefined; gate?: Tensor } = {}): Tensor {
  const y = tensorOf(native.scaleAdd(residual.handle, branch.handle, scale?.handle, gate?.handle));
  return differentiable(y, [residual, branch, scale, gate], (d) => {
    if (!scale && !gate) return [d, d];
    const g = native.scaleAddBackward(d.handle, branch.handle, scale?.handle, gate?.handle);
    return [d, tensorOf(g.branch), g.scale && tensorOf(g.scale), g.gate && tensorOf(g.gate)];
  });
}

/** Multi-head self-attention: [B,S,3D] → [B,S,D]. */
export function attention(qkv: Tensor, heads: number): Tensor {
  if (!recording(qkv)) return tensorOf(native.attention(qkv.handle, heads));
  const forward = native.attentionForward(qkv.handle, heads);
  const [y, sums] = [tensorOf(forward.out), tensorOf(forward.logSumExp)];
  return differentiable(y, [qkv], (d) => [tensorOf(native.attentionBackward(qkv.handle, y.handle, d.handle, sums.handle, heads))]);
}

/** RMSNorm of q and k over their whole width. [B,S,3D] → [B,S,3D] */
export function qkNorm(qkv: Tensor, qWeight: Tensor, kWeight: Tensor, eps: number): Tensor {
  const y = tensorOf(native.qkNorm(qkv.handle, qWeight.handle, kWeight.handle, eps));
  return differentiable(y, [qkv, qWeight, kWeight], (d) => {
    const g = native.qkNormBackward(qkv.handle, d.handle, qWeight.handle, kWeight.handle, eps);
    return [tensorOf(g.qkv), tensorOf(g.qWeight), tensorOf(g.kWeight)];
  });
}

/** Applies rotary positions to q and k of the tokens from `prefix` on; `table` comes from {@link ropeTable}. */
export function rope(qkv: Tensor, heads: number, prefix: number, table: Tensor): Tensor {
  const y = tensorOf(native.rope(qkv.handle, heads, prefix, table.handle));
  return differentiable(y, [qkv], (d) => [tensorOf(native.ropeBackward(d.handle, heads, prefix, table.handle))]);
}

/** Rotary positions in two dimensions: half of a head's pairs rotate by the row, half by the column, the k-th by theta^(−4k / headDim) times the position. */
export interface Rope {
  theta: number;
  unit: RopeUnit;
}

/** Rotary table [2, rows*cols, headDim]: cosines, sines. */
export function ropeTable(grid: Grid, headDim: number, { theta, unit }: Rope): Tensor {
  return tensorOf(native.ropeTable(grid.rows, grid.cols, headDim, theta, unit));
}

export interface Norm {
  weight?: Tensor | undefined;
  bias?: Tensor | undefined;
}
export interface NormOptions {
  eps: number;
  /** RMSNorm instead of LayerNorm. */
  rms?: boolean;
  /** AdaLN: result * (1 + scale) + shift. */
  scale?: Tensor;
  shift?: Tensor;
}

/** LayerNorm or RMSNorm over the last dimension. */
export function norm(x: Tensor, { weight, bias }: Norm, { eps, rms = false, scale, shift }: NormOptions): Tensor {
  const options = { weight: weight?.handle, bias: bias?.handle, scale: scale?.handle, shift: shift?.handle, eps, rms };
  const y = tensorOf(native.norm(x.handle, options));
  return differentiable(y, [x, weight, bias, scale, shift], (d) => {
    const g = native.normBackward(x.handle, d.handle, options);
    return [g.x, g.weight, g.bias, g.scale, g.shift].map((handle) => handle && tensorOf(handle));
  });
}

export interface PatchEmbedding {
  projection: Linear; // [D, 3*p*p]
  prefix: Tensor | undefined; // [T, D]
  position: Tensor | undefined; // [N, D]
  patch: number;
  normalisation: NativeNormalisation;
  dtype: FloatType;
}

/** Pixels (uint8 [B,H,W,3], or float32 [B,3,H,W] normalised) → tokens [B,T+N,D]. */
export function patchEmbed(pixels: Tensor, e: PatchEmbedding): Tensor {
  return assemble(linear(unfold(pixels, e.patch, e.normalisation, e.dtype), e.projection), e);
}

/** Pixels → patch vectors [B,N,3*p*p], (channel, row, column); uint8 pixels are normalised. */
export function unfold(pixels: Tensor, patch: number, normalisation: NativeNormalisation, dtype: FloatType): Tensor {
  return tensorOf(native.unfold(pixels.handle, patch, normalisation, dtype));
}

/** Adds a position table [N,D] to x [B,N,D] and puts prefix tokens [T,D] in front: [B,T+N,D]. */
export function assemble(x: Tensor, { prefix, position }: { prefix?: Tensor | undefined; position?: Tensor | undefined }): Tensor {
  const y = tensorOf(native.assemble(x.handle, prefix?.handle, position?.handle));
  return differentiable(y, [x, prefix, position], (d) => {
    const front = prefix ? prefix.dim(0) : 0;
    const patches = tensorOf(native.sliceTokens(d.handle, front, d.dim(1)));
    const sum = (tokens: Tensor): Tensor => tensorOf(native.sumRows(tokens.handle, 2)); // over the batch
    return [patches, prefix && sum(tensorOf(native.sliceTokens(d.handle, 0, front))), position && sum(patches)];
  });
}

/** Bicubic resize of a position table [rows*cols, D] to another grid. */
export function resizeTable(table: Tensor, from: Grid, to: Grid, { antialias = false } = {}): Tensor {
  const y = tensorOf(native.resizeTable(table.handle, from.rows, from.cols, to.rows, to.cols, antialias));
  return differentiable(y, [table], (d) => [
    tensorOf(native.resizeTableBackward(d.handle, from.rows, from.cols, to.rows, to.cols, antialias)),
  ]);
}

export function cast(x: Tensor, dtype: FloatType): Tensor {
  const from = x.dtype as FloatType;
  if (from === dtype) return x;
  return differentiable(tensorOf(native.cast(x.handle, dtype)), [x], (d) => [tensorOf(native.cast(d.handle, from))]);
}

/** Finite scalar quantisation of latents [..., Z]. The gradient passes straight through the rounding. */
export function fsq(x: Tensor, levels: Levels): Tensor {
  const of = Uint32Array.from(levels);
  return differentiable(tensorOf(native.fsq(x.handle, of)), [x], (d) => [tensorOf(native.fsqBackward(x.handle, d.handle, of))]);
}

/** Codes of quantised latents, [..., Z] → int32 [..., G]; other latents have the code of the nearest ones. */
export function latentsToCodes(latents: Tensor, levels: Levels): Tensor {
  return tensorOf(native.latentsToCodes(latents.handle, Uint32Array.from(levels)));
}

/** Latents of codes, int32 [..., G] → float32 [..., Z]. Fails for codes that do not exist. */
export function codesToLatents(codes: Tensor, levels: Levels): Tensor {
  return tensorOf(native.codesToLatents(codes.handle, Uint32Array.from(levels)));
}

/** silu(x[..., :n]) * x[..., n:]. */
export function swiglu(x: Tensor): Tensor {
  return differentiable(tensorOf(native.swiglu(x.handle)), [x], (d) => [tensorOf(native.swigluBackward(x.handle, d.handle))]);
}

/** Tokens [begin, end) of every image. */
export function sliceTokens(x: Tensor, begin: number, end: number): Tensor {
  const y = tensorOf(native.sliceTokens(x.handle, begin, end));
  return differentiable(y, [x], (d) => [tensorOf(native.padTokens(d.handle, begin, x.dim(1)))]);
}

/** The same elements with another shape. */
export function reshape(x: Tensor, shape: readonly number[]): Tensor {
  return differentiable(x.reshape(shape), [x], (d) => [d.reshape(x.shape)]);
}

/** Splits x [..., parts * n] into equal parts, [..., n] each. */
export function split(x: Tensor, parts: number): Tensor[] {
  const outputs = Array.from({ length: parts }, (_, part) => tensorOf(native.split(x.handle, part, parts)));
  recording(x)?.add({ outputs, inputs: [x], backward: (d) => [tensorOf(native.concat(d.map((g) => g?.handle)))] });
  return outputs;
}

/** a + b */
export function add(a: Tensor, b: Tensor): Tensor {
  return differentiable(tensorOf(native.add(a.handle, b.handle, undefined, 0, 1)), [a, b], (d) => [d, d]);
}

/** The pixels of whole patches, uint8 [B,h,w,3]; normalised ones [B,3,H,W] are denormalised, rounded and clamped. */
export function toUint8(pixels: Tensor, grid: Grid, patch: number, normalisation: NativeNormalisation): Tensor {
  const [height, width] = [grid.rows * patch, grid.cols * patch];
  if (pixels.dtype === 'uint8' && pixels.dim(1) === height && pixels.dim(2) === width) return pixels.slice(0, pixels.dim(0));
  return tidy(() => {
    const patches = unfold(pixels, patch, normalisation, 'float32');
    return tensorOf(native.fold(patches.handle, grid.rows, grid.cols, patch, normalisation, 'uint8'));
  });
}

/** PSNR (dB) and SSIM of each pair of uint8 images [B,H,W,3]: float32 [B,2]. */
export function imageQuality(a: Tensor, b: Tensor, convention: QualityConvention = 'standard'): Tensor {
  return tensorOf(native.imageQuality(a.handle, b.handle, convention));
}

/** Fails `x`, and everything that depends on it, if a value is NaN or infinite. */
export function checkFinite(x: Tensor, name: string): Tensor {
  native.checkFinite(x.handle, name);
  return x;
}
