/**
 * int8 weights, with a gate: a linear layer gets them only if its int8 products come out close to its float ones on a few images, and if a
 * tokenizer as a whole loses little by them.
 *
 * Each layer is judged on the inputs that it has in the float model. Scales are per output of a weight and per row of activations
 * (native/cpu/int8.h).
 */
import { z } from 'zod';
import { checkNumber } from './check.js';
import { throwIfAborted, UniFlowError } from './errors.js';
import { problemsOf } from './encoder/config-fields.js';
import { batchesOf, type Batches, type ImageInput } from './images/input.js';
import type { Checkpoint } from './io/checkpoint.js';
import type { Preprocessing } from './io/preprocess.js';
import { distillationLoss } from './losses/distillation.js';
import { native } from './native.js';
import { linear, observeLinear, resizeTable, type Linear } from './ops.js';
import type { Parameter } from './parameters.js';
import { keep, onDevice, tensorOf, tidy, uncancellable, type Tensor } from './tensor.js';

/** Layers below this cosine keep their float weights. Rows of normally distributed values come to 0.9999. */
export const DEFAULT_COSINE = 0.9998;

/** Loss of PSNR that int8 may cause a tokenizer, in dB. */
export const DEFAULT_LOSS = 0.1;

const layerSchema = z.object({
  /** Checkpoint names of its weights, without `.weight`; several are stacked. */
  names: z.array(z.string()),
  /** Cosine between the rows of its int8 and float products: the mean of an image's rows, the lowest of the images. */
  cosine: z.number(),
  /** Whether its weights are int8. */
  int8: z.boolean(),
});

const schema = z.object({
  /** Lowest cosine of an int8 layer. */
  threshold: z.number(),
  /** Number of images compared. */
  images: z.int(),
  /** Whether the images were made up, because none were given. */
  synthetic: z.boolean(),
  /** PSNR that the images' reconstructions lost to int8, in dB; absent if it was not measured. */
  loss: z.number().optional(),
  layers: z.array(layerSchema),
});

export type QuantizedLayer = z.infer<typeof layerSchema>;

/** How a model's layers came through the gate, in the order of the forward pass. */
export type Quantization = z.infer<typeof schema>;

export interface QuantizeOptions {
  /** Layers whose {@link QuantizedLayer.cosine} is lower keep their float weights. Default 0.9998. */
  threshold?: number;
  signal?: AbortSignal;
}

/** With images given, a tokenizer is also judged as a whole. */
export interface TokenizerQuantizeOptions extends QuantizeOptions {
  /** The PSNR of the images' reconstructions, in dB, that int8 may cost; further layers keep their float weights, the least close first. Default 0.1. */
  maxLoss?: number;
}

/** A model to quantise. */
export interface Quantizable {
  parameters: readonly Parameter[];
  device: string;
  preprocessing: Preprocessing;
  patch: number;
  /** Queues all that the model does with pixels [1,H,W,3] or [1,3,H,W]. */
  run(pixels: Tensor): void;
  /** Mean PSNR of the images' reconstructions, in dB. */
  psnr?(images: ImageInput): Promise<number>;
}

/**
 * Replaces weights of a model by int8 ones, layer by layer.
 * @param images to compare on; without them, made-up ones.
 */
export async function quantizeModel(
  model: Quantizable,
  images: ImageInput | undefined,
  { threshold = DEFAULT_COSINE, maxLoss, signal }: TokenizerQuantizeOptions,
): Promise<Quantization> {
  checkNumber('threshold', threshold, -1, 1);
  if (maxLoss !== undefined) checkNumber('maxLoss', maxLoss, 0, Infinity);
  if (maxLoss !== undefined && !(images && model.psnr))
    throw UniFlowError.expected('BAD_INPUT', 'maxLoss', 'a UniFlow model, and images to measure it on', 'neither or one');
  const { device, parameters, preprocessing, patch } = model;
  if (device !== 'cpu') throw UniFlowError.expected('UNSUPPORTED', 'quantize', 'a model on the CPU', `one on ${device}`);
  if (isInt8(parameters))
    throw UniFlowError.expected('BAD_INPUT', 'quantize', 'a model of float weights; load its float checkpoint', 'one with int8 weights');
  const batches = images === undefined ? synthetic(preprocessing.size) : batchesOf(images, preprocessing, patch, device, { signal });
  const candidates = candidatesOf(parameters);
  try {
    for (let i = 0; i < batches.count; i++) {
      throwIfAborted(signal);
      const pixels = await batches.load(i, i + 1);
      const observe = (x: Tensor, layer: Linear): void => compare(candidates.get(layer.weight), x, layer);
      onDevice(device, () => tidy(() => observeLinear(observe, () => model.run(pixels))));
      pixels.dispose();
      await onDevice(device, () => native.synchronize());
    }
    for (const candidate of candidates.values()) candidate.cosine = await worstCosine(candidate);
    const passed = [...candidates.values()].filter(({ cosine }) => cosine >= threshold).sort((a, b) => b.cosine - a.cosine);
    throwIfAborted(signal);
    let loss: number | undefined;
    if (images && model.psnr) loss = await applyWithin(passed, maxLoss ?? DEFAULT_LOSS, () => model.psnr!(images), signal);
    else apply(passed, passed.length);
    const layers = [...candidates.values()].map(({ parameter, cosine }) => ({
      names: layerNames(parameter),
      cosine,
      int8: isInt8([parameter]),
    }));
    return { threshold, images: batches.count, synthetic: images === undefined, loss, layers };
  } finally {
    for (const { int8, float, distances } of candidates.values()) for (const tensor of [int8, float, ...distances]) tensor.dispose();
    batches.dispose();
  }
}

/** Whether any of the weights is int8. */
export function isInt8(parameters: readonly Parameter[]): boolean {
  return parameters.some(({ tensor }) => tensor.dtype === 'int8');
}

interface Candidate {
  parameter: Parameter;
  /** Its weights of both kinds. */
  int8: Tensor;
  float: Tensor;
  /** 1 − cosine, one of each image and call: [1]. */
  distances: Tensor[];
  cosine: number;
}

/** The best `count` of the candidates become int8, the others float. */
function apply(candidates: readonly Candidate[], count: number): void {
  for (const [i, { parameter, int8, float }] of candidates.entries()) parameter.tensor.assign((i < count ? int8 : float).handle.share());
}

/** Makes as many candidates int8, the best first, as cost at most `maxLoss` dB. @returns the loss. */
async function applyWithin(
  candidates: readonly Candidate[],
  maxLoss: number,
  psnr: () => Promise<number>,
  signal?: AbortSignal,
): Promise<number> {
  const before = await psnr();
  let [low, high, loss] = [0, candidates.length, 0];
  while (low < high) {
    const count = Math.ceil((low + high) / 2);
    apply(candidates, count);
    const lost = before - (await psnr());
    if (lost <= maxLoss) [low, loss] = [count, lost];
    else high = count - 1;
    if (signal?.aborted) low = high = 0;
  }
  apply(candidates, low);
  throwIfAborted(signal);
  return loss;
}

function candidatesOf(parameters: readonly Parameter[]): Map<Tensor, Candidate> {
  return new Map(
    parameters
      .filter(({ quantizable }) => quantizable)
      .map((parameter) => {
        const float = tensorOf(parameter.tensor.handle.share());
        return [parameter.tensor, { parameter, int8: packed(parameter.tensor), float, distances: [], cosine: -1 }];
      }),
  );
}

/** An int8 copy of a weight, which outlives the scope of the call. */
function packed(weight: Tensor): Tensor {
  return keep(
    tidy(() => {
      const floats = tensorOf(native.copyParameter(weight.handle, 'float32'));
      return tensorOf(native.packLinear(floats.handle, 'int8'));
    }),
  );
}

/** Queues both products of a layer's input, and their distance. */
function compare(candidate: Candidate | undefined, x: Tensor, { weight }: Linear): void {
  if (!candidate) return;
  const distance = tidy(() => {
    const [int8, float] = [candidate.int8, weight].map((w) => rowsOf(linear(x, { weight: w }))) as [Tensor, Tensor];
    return distillationLoss([int8], [float]).alpha;
  });
  candidate.distances.push(keep(distance));
}

/** [..., N] → [1, M, N] */
const rowsOf = (y: Tensor): Tensor => y.reshape([1, y.shape.slice(0, -1).reduce((a, b) => a * b, 1), y.dim(-1)]);

/** The lowest cosine over all images and calls; -1 if no image reached the layer, or if its values are not finite. */
async function worstCosine({ distances }: Candidate): Promise<number> {
  const values = await Promise.all(distances.map(async (distance) => (await distance.read()).get(0)));
  const worst = Math.max(...values);
  return Number.isFinite(worst) ? 1 - worst : -1;
}

const layerNames = ({ parts }: Parameter): string[] => parts.map(({ name }) => name.replace(/\.weight$/, ''));

// ----- stored with the weights ----------------------------------------------------------------------------------

/** Key of the table in a checkpoint's metadata. */
const QUANTIZATION = 'quantization';

export function quantizationMetadata(table: Quantization | undefined): Record<string, string> {
  return table ? { [QUANTIZATION]: JSON.stringify(table) } : {};
}

/** The table of a model that was loaded for int8: its checkpoint's, if that has int8 weights, or else that of `quantize`, run now. */
export async function quantizationAtLoad(
  { quantized, metadata, path }: Pick<Checkpoint, 'quantized' | 'metadata' | 'path'>,
  quantize: () => Promise<Quantization>,
): Promise<Quantization | undefined> {
  return quantized ? storedQuantization(metadata, path) : quantize();
}

/** The table stored in a checkpoint's metadata; undefined if there is none. @throws UniFlowError `BAD_CHECKPOINT` if it is not one. */
export function storedQuantization(metadata: Readonly<Record<string, string>>, path: string): Quantization | undefined {
  const text = metadata[QUANTIZATION];
  if (text === undefined) return undefined;
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    json = undefined;
  }
  const { data, error } = schema.safeParse(json);
  if (data) return data;
  throw UniFlowError.expected('BAD_CHECKPOINT', `${path}: metadata ${QUANTIZATION}`, 'the table of a gate', problemsOf(error).join('; '));
}

// ----- images made up -------------------------------------------------------------------------------------------

/** Number of made-up images to compare on. */
const SYNTHETIC_IMAGES = 2;

/**
 * Pixels that resemble a photograph's in their spectrum: noise of every scale from 2x2 up, the coarser the stronger, at about unit variance;
 * float32 [1,3,H,W] normalised, the same for the same seed.
 */
function syntheticPixels([height, width]: readonly [number, number], seed: number): Tensor {
  return uncancellable(() =>
    tidy(() => {
      const channels = [0, 1, 2].map((channel) => octaves({ rows: height, cols: width }, 3 * seed + channel).reshape([1, height * width]));
      return tensorOf(native.concat(channels.map(({ handle }) => handle))).reshape([1, 3, height, width]);
    }),
  );
}

/** [rows*cols, 1] */
function octaves(grid: { rows: number; cols: number }, seed: number): Tensor {
  let sum: Tensor | undefined;
  for (let cells = 2; cells <= Math.min(grid.rows, grid.cols, 64); cells *= 2) {
    const noise = tensorOf(native.noise(seed, new Uint32Array([cells]), cells * cells, 1)).reshape([cells * cells, 1]);
    const octave = resizeTable(noise, { rows: cells, cols: cells }, grid);
    sum = sum ? tensorOf(native.add(sum.handle, octave.handle, undefined, 0, 2 / cells)) : octave;
  }
  return sum as Tensor;
}

/** Made-up images of the given size. */
function synthetic(size: readonly [number, number]): Batches {
  return { count: SYNTHETIC_IMAGES, size, load: (index) => onDevice('cpu', () => syntheticPixels(size, index)), dispose: () => undefined };
}
