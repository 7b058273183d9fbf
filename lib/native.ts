/** Types of the addon: exactly what `bindings/` exports. */
import { loadAddon } from './addon.js';
import { UniFlowError } from './errors.js';

/** float8 (e4m3) and int8 are for packed weights only. */
export type DType = 'float32' | 'bfloat16' | 'uint8' | 'int32' | 'float8' | 'int8';
export type FloatType = 'float32' | 'bfloat16';
/** Storage of a linear weight for products: float8 (e4m3) only on GPUs that support it, int8 only on the CPU. */
export type WeightType = FloatType | 'float8' | 'int8';
export type Activation = 'gelu' | 'gelu_tanh' | 'quick_gelu' | 'silu';
/** Unit of rotary positions: patches, or the width of the image, from −2π at one edge to 2π at the other (DINOv3). */
export type RopeUnit = 'patch' | 'image';
export type ResampleFilter = 'box' | 'bilinear' | 'bicubic' | 'lanczos';
export interface Resampling {
  width: number;
  height: number;
  mode: 'cover' | 'shortest_edge' | 'stretch';
  /** Used by 'shortest_edge', in pixels. */
  edge: number;
  filter: ResampleFilter;
}
export type HostArray = Float32Array | Uint8Array | Uint8ClampedArray | Int32Array | Uint16Array;

/** The native side of {@link Tensor}. */
export interface TensorHandle {
  readonly shape: number[];
  readonly dtype: DType;
  readonly packed: boolean;
  /** 'cpu', 'cuda:0'. */
  readonly device: string;
  readonly disposed: boolean;
  readonly bytes: number;
  dispose(): void;
  reshape(shape: readonly number[]): TensorHandle;
  slice(begin: number, end: number): TensorHandle;
  /** Another handle of the same tensor. Each handle is disposed of separately. */
  share(): TensorHandle;
  read(into: HostArray): Promise<void>;
}

declare const fileBrand: unique symbol;
declare const jpegBrand: unique symbol;
declare const tokenBrand: unique symbol;
export type FileHandle = { [fileBrand]: true };
export type JpegHandle = { [jpegBrand]: true };
export type CancelToken = { [tokenBrand]: true };

/** Per-channel statistics of pixels scaled to [0, 1]. */
export interface NativeNormalisation {
  mean: Float32Array;
  std: Float32Array;
}

export interface NativeLayer {
  weight: TensorHandle;
  bias: TensorHandle | undefined;
}

export interface NativeFlowHead {
  time1: NativeLayer;
  time2: NativeLayer;
  condition: NativeLayer;
  input: NativeLayer;
  blocks: { normWeight: TensorHandle; normBias: TensorHandle; fc1: NativeLayer; fc2: NativeLayer; modulation: NativeLayer }[];
  finalModulation: NativeLayer;
  output: NativeLayer;
}

export interface NativeFlowOptions {
  time: Float32Array;
  step: Float32Array;
  guidance: number;
  noise: TensorHandle | undefined;
  seed: number;
  ids: Uint32Array;
  rows: number;
  cols: number;
  patch: number;
  normalisation: NativeNormalisation;
  output: 'uint8' | 'float32';
}

export type ParameterPart = { file: FileHandle; name: string } | { rows: number };

export interface NativeNormOptions {
  weight?: TensorHandle | undefined;
  bias?: TensorHandle | undefined;
  scale?: TensorHandle | undefined;
  shift?: TensorHandle | undefined;
  eps: number;
  rms?: boolean | undefined;
}

/** Variant of SSIM, see native/ops/quality.h: 'standard' is Wang et al.'s, 'paper' that of the notebook published with UniFlow. */
export type QualityConvention = 'standard' | 'paper';

/** Layer weights of the distillation loss; 'adaptive' is the paper's. */
export type LayerWeights = 'adaptive' | 'uniform' | 'last';

export interface NativeOptimizedParameter {
  parameter: TensorHandle;
  grad: TensorHandle;
  m: TensorHandle;
  v: TensorHandle;
  average: TensorHandle | undefined;
  compute: TensorHandle | undefined;
  lr: number;
  weightDecay: number;
}

export interface NativeAdamWOptions {
  beta1: number;
  beta2: number;
  eps: number;
  /** Weight of the old value in the moving average. */
  ema: number;
  /** Largest global gradient norm; 0 disables clipping. */
  clip: number;
  /** Starts at 1. */
  step: number;
}

export interface CpuInfo {
  /** Instruction set of the kernels. */
  kernels: string;
  /** Instruction sets supported by this machine, best first; UNIFLOW_ISA overrides the choice. */
  instructionSets: string[];
  nativeBfloat16: boolean;
  threads: number;
  defaultThreads: number;
}

export interface Native {
  setErrorClass(errorClass: typeof UniFlowError): void;
  fromHost(data: HostArray, shape: readonly number[]): TensorHandle;
  packLinear(weight: TensorHandle, dtype: WeightType): TensorHandle;
  linear(
    x: TensorHandle,
    weight: TensorHandle,
    options: {
      bias?: TensorHandle | undefined;
      scale?: TensorHandle | undefined;
      residual?: TensorHandle | undefined;
      activation?: Activation | undefined;
    },
  ): TensorHandle;
  attention(qkv: TensorHandle, heads: number): TensorHandle;
  qkNorm(qkv: TensorHandle, qWeight: TensorHandle, kWeight: TensorHandle, eps: number): TensorHandle;
  rope(qkv: TensorHandle, heads: number, prefix: number, table: TensorHandle): TensorHandle;
  ropeTable(rows: number, cols: number, headDim: number, theta: number, unit: RopeUnit): TensorHandle;
  norm(x: TensorHandle, options: NativeNormOptions): TensorHandle;
  unfold(pixels: TensorHandle, patch: number, normalisation: NativeNormalisation, dtype: FloatType): TensorHandle;
  fold(
    patches: TensorHandle,
    rows: number,
    cols: number,
    patch: number,
    normalisation: NativeNormalisation,
    dtype: 'uint8' | 'float32',
  ): TensorHandle;
  imageQuality(a: TensorHandle, b: TensorHandle, convention: QualityConvention): TensorHandle;
  /**
   * Opens a path, or the bytes of a file, which must not change until decodeJpeg resolves. Returns undefined if the file cannot be read, is not a JPEG that
   * decodeJpeg supports, or has more than `maxPixels` pixels. The size is that of the upright image.
   */
  openJpeg(source: string | Uint8Array, maxPixels: number): Promise<{ width: number; height: number; file: JpegHandle } | undefined>;
  /** Decodes to packed RGB, resized if `to` is given; resolves to false if the file is faulty in any way. Invalidates the handle. */
  decodeJpeg(file: JpegHandle, into: Uint8Array, to: Resampling | undefined): Promise<boolean>;
  /** Resizes RGB pixels to `into`, a packed [height, width, 3]. Neither array may change until it resolves. */
  resample(pixels: Uint8Array, width: number, height: number, into: Uint8Array, to: Resampling): Promise<void>;
  /** Rounds to 16 bits; UNSUPPORTED for values that float16 cannot represent. Here and in the next two, the arrays must not change until it resolves. */
  store(values: Float32Array, type: 'float16' | 'bfloat16', bits: Uint16Array): Promise<void>;
  restore(bits: Uint16Array, type: 'float16' | 'bfloat16', values: Float32Array): Promise<void>;
  /** Per channel of values [..., channels]: the mean, and the sum of squared deviations from it, in float64. */
  moments(values: Float32Array, channels: number, mean: Float64Array, squares: Float64Array): Promise<void>;
  /** Adds one to counts[group, code] for each of codes [..., groups]. Neither array may change until it resolves. */
  countCodes(codes: Int32Array, groups: number, counts: Int32Array): Promise<void>;
  /** Locks an open file until it is closed or the process ends; false if another open file description holds the lock. */
  lockFile(fd: number): boolean;
  patchEmbed(
    pixels: TensorHandle,
    options: {
      weight: TensorHandle;
      bias: TensorHandle | undefined;
      prefix: TensorHandle | undefined;
      position: TensorHandle | undefined;
      patch: number;
      normalisation: NativeNormalisation;
      dtype: FloatType;
    },
  ): TensorHandle;
  assemble(x: TensorHandle, prefix: TensorHandle | undefined, position: TensorHandle | undefined): TensorHandle;
  checkFinite(x: TensorHandle, name: string): void;
  resizeTable(table: TensorHandle, rows: number, cols: number, outRows: number, outCols: number, antialias: boolean): TensorHandle;
  cast(x: TensorHandle, dtype: FloatType): TensorHandle;
  swiglu(x: TensorHandle): TensorHandle;
  /** Finite scalar quantisation, codes and back: see native/ops/codes.h. `levels`: one number per channel of a group. */
  fsq(x: TensorHandle, levels: Uint32Array): TensorHandle;
  fsqBackward(x: TensorHandle, dOut: TensorHandle, levels: Uint32Array): TensorHandle;
  /** [..., Z] → int32 [..., G] */
  latentsToCodes(latents: TensorHandle, levels: Uint32Array): TensorHandle;
  /** int32 [..., G] → float32 [..., Z]; BAD_INPUT for a code that does not exist. */
  codesToLatents(codes: TensorHandle, levels: Uint32Array): TensorHandle;
  sliceTokens(x: TensorHandle, begin: number, end: number): TensorHandle;
  noise(seed: number, ids: Uint32Array, patches: number, width: number): TensorHandle;
  /** Uniform on (0, 1], [ids.length, patches], a function of (seed, id, patch). */
  uniform(seed: number, ids: Uint32Array, patches: number): TensorHandle;
  /** sigmoid(mean + std * normal), [ids.length, patches], a function of (seed, id, patch). */
  logitNormal(seed: number, ids: Uint32Array, patches: number, mean: number, std: number, zero: number): TensorHandle;
  flowIntegrate(head: NativeFlowHead, condition: TensorHandle, options: NativeFlowOptions): TensorHandle;
  flowVelocity(head: NativeFlowHead, x: TensorHandle, t: TensorHandle, condition: TensorHandle): TensorHandle;
  linearBackward(
    x: TensorHandle,
    weight: TensorHandle,
    dOut: TensorHandle,
    wantX: boolean,
    wantWeight: boolean,
    wantBias: boolean,
  ): { x?: TensorHandle; weight?: TensorHandle; bias?: TensorHandle };
  normBackward(
    x: TensorHandle,
    dOut: TensorHandle,
    options: NativeNormOptions,
  ): { x: TensorHandle; weight?: TensorHandle; bias?: TensorHandle; scale?: TensorHandle; shift?: TensorHandle };
  qkNormBackward(
    qkv: TensorHandle,
    dOut: TensorHandle,
    qWeight: TensorHandle,
    kWeight: TensorHandle,
    eps: number,
  ): { qkv: TensorHandle; qWeight: TensorHandle; kWeight: TensorHandle };
  ropeBackward(dOut: TensorHandle, heads: number, prefix: number, table: TensorHandle): TensorHandle;
  attentionForward(qkv: TensorHandle, heads: number): { out: TensorHandle; logSumExp: TensorHandle };
  attentionBackward(qkv: TensorHandle, out: TensorHandle, dOut: TensorHandle, logSumExp: TensorHandle, heads: number): TensorHandle;
  activation(x: TensorHandle, kind: Activation): TensorHandle;
  activationBackward(x: TensorHandle, dOut: TensorHandle, kind: Activation): TensorHandle;
  scaleAdd(residual: TensorHandle, branch: TensorHandle, scale: TensorHandle | undefined, gate: TensorHandle | undefined): TensorHandle;
  scaleAddBackward(
    dOut: TensorHandle,
    branch: TensorHandle,
    scale: TensorHandle | undefined,
    gate: TensorHandle | undefined,
  ): { branch: TensorHandle; scale?: TensorHandle; gate?: TensorHandle };
  swigluBackward(x: TensorHandle, dOut: TensorHandle): TensorHandle;
  resizeTableBackward(dOut: TensorHandle, rows: number, cols: number, outRows: number, outCols: number, antialias: boolean): TensorHandle;
  /** a + factor[index] * scale * b; a and factor may be undefined (0 and 1). */
  add(a: TensorHandle | undefined, b: TensorHandle, factor: TensorHandle | undefined, index: number, scale: number): TensorHandle;
  /** Sum over all dimensions except the last `kept`, float32. */
  sumRows(x: TensorHandle, kept: number): TensorHandle;
  padTokens(x: TensorHandle, begin: number, total: number): TensorHandle;
  split(x: TensorHandle, part: number, parts: number): TensorHandle;
  concat(parts: (TensorHandle | undefined)[]): TensorHandle;
  distillation(
    student: TensorHandle[],
    teacher: TensorHandle[],
    beta: number,
    skip: number,
    weights: LayerWeights,
    grads: boolean,
  ): { loss: TensorHandle; alpha: TensorHandle; weight: TensorHandle; grads: TensorHandle[] };
  interpolate(data: TensorHandle, noise: TensorHandle, t: TensorHandle): { noisy: TensorHandle; target: TensorHandle };
  meanSquaredError(value: TensorHandle, target: TensorHandle): { loss: TensorHandle; grad: TensorHandle };
  /** Mean over the rows, its gradient in the logits' dtype, and the number of rows whose label is the largest logit: [M,C], int32 [M]. */
  crossEntropy(logits: TensorHandle, labels: TensorHandle): { loss: TensorHandle; grad: TensorHandle; correct: TensorHandle };
  /** The k largest of each row, descending: [M,N] → float32 and int32 [M,k]. */
  topK(scores: TensorHandle, k: number): { values: TensorHandle; indices: TensorHandle };
  /** Mean and covariance of the columns, divisor N − 1: [N,D] → [D], [D,D]. */
  covariance(x: TensorHandle): { mean: TensorHandle; covariance: TensorHandle };
  /** Sinusoids of 1000 t, cosines first: [M] → [M, 256]. */
  timestepEmbedding(t: TensorHandle): TensorHandle;
  globalNorm(grads: TensorHandle[]): TensorHandle;
  adamw(parameters: NativeOptimizedParameter[], norm: TensorHandle, options: NativeAdamWOptions): void;
  /** A plain copy of a parameter, outside the pool; it lives as long as its handle. */
  copyParameter(parameter: TensorHandle, dtype: FloatType): TensorHandle;
  openSafetensors(path: string): {
    handle: FileHandle;
    metadata: Record<string, string>;
    tensors: Record<string, { dtype: string; shape: number[] }>;
  };
  /** A copy of a tensor's bytes, as stored in the file. */
  tensorBytes(file: FileHandle, name: string): Uint8Array;
  loadParameter(parts: ParameterPart[], shape: readonly number[], dtype: WeightType, packed: boolean): TensorHandle;
  randomParameter(shape: readonly number[], dtype: WeightType, packed: boolean, seed: number, stream: number, std: number): TensorHandle;
  constantParameter(shape: readonly number[], value: number): TensorHandle;
  /** uint8 [bytes]: the values in C order, as a checkpoint stores them. */
  /** 'int8' only of an int8 weight. */
  parameterBytes(parameter: TensorHandle, dtype: FloatType | 'int8'): TensorHandle;
  /** The scales [out] of an int8 weight's rows. */
  parameterScales(weight: TensorHandle): TensorHandle;
  createToken(): CancelToken;
  cancel(token: CancelToken): void;
  /** Operations queued from now on carry this token; without one they cannot be cancelled. */
  useToken(token?: CancelToken): void;
  /** Resolves when everything queued on the device (of the tensors, or the current one) has run; rejects if one of `tensors` failed. */
  synchronize(tensors?: TensorHandle[]): Promise<void>;
  setThreads(threads: number): void;
  memoryStats(): { handles: number; devices: Record<string, { active: number; peak: number; pool: number }> };
  /** All devices; for a kind without any, the reason. */
  devices(): { name: string; available: boolean; description: string }[];
  /** Opens a device and returns its full name: 'cuda' is 'cuda:0'. */
  openDevice(name: string): string;
  /** Tensors that are not made from other tensors are created there from now on. */
  useDevice(name: string): void;
  resetPeak(): void;
  trimMemory(): void;
  cpuInfo(): CpuInfo;
  measurePeak(into: Float64Array): Promise<void>;
}

const { addon, path } = loadAddon();

export const native = addon as Native;
native.setErrorClass(UniFlowError);

/** Path of the loaded addon. */
export const addonPath = path;
