/**
 * int8 weights, with a gate: a linear layer gets them only if its int8 products come out close to its float ones on a few images.
 *
 * Each layer is judged alone, on the inputs that it has in the float model. Scales are per output of a weight and per row of activations
 * (native/cpu/int8.h).
 */
import { z } from 'zod';
import { checkNumber } from './check.js';
import { throwIfAborted, UniFlowError } from './errors.js';
import { problemsOf } from './encoder/config-fields.js';
import { batchesOf, type Batches, type ImageInput } from './images/input.js';
import type { Preprocessing } from './io/preprocess.js';
import { distillationLoss } from './losses/distillation.js';
import { native } from './native.js';
import { linear, observeLinear, resizeTable, type Linear } from './ops.js';
import type { Parameter } from './parameters.js';
import { keep, onDevice, tensorOf, tidy, uncancellable, type Tensor } from './tensor.js';

/** Layers below this cosine keep their float weights. */
export const DEFAULT_COSINE = 0.999;

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
  layers: z.array(layerSchema),
});

export type QuantizedLayer = z.infer<typeof layerSchema>;

/** How a model's layers came through the gate, in the order of the forward pass. */
export type Quantization = z.infer<typeof schema>;

export interface QuantizeOptions {
  /** Layers whose {@link QuantizedLayer.cosine} is lower keep their float weights. Default 0.999. */
  threshold?: number;
  signal?: AbortSignal;
}

/** A model to quantise. */
export interface Quantizable {
  parameters: readonly Parameter[];
  device: string;
  preprocessing: Preprocessing;
  patch: number;
  /** Queues all that the model does with pixels [1,H,W,3] or [1,3,H,W]. */
  run(pixels: Tensor): void;
}

/**
 * Replaces weights of a model by int8 ones, layer by layer.
 * @param images to compare on; without them, made-up ones.
 */
export async function quantizeModel(
  model: Quantizable,
  images: ImageInput | undefined,
  { threshold = DEFAULT_COSINE, signal }: QuantizeOptions,
): Promise<Quantization> {
  checkNumber('threshold', threshold, -1, 1);
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
    const layers: QuantizedLayer[] = [];
    for (const candidate of candidates.values()) layers.push(await judge(candidate, threshold));
    throwIfAborted(signal);
    for (const [i, { parameter, int8 }] of [...candidates.values()].entries())
      if (layers[i]?.int8) parameter.tensor.assign(int8.handle.share());
    return { threshold, images: batches.count, synthetic: images === undefined, layers };
  } finally {
    for (const { int8, distances } of candidates.values()) for (const tensor of [int8, ...distances]) tensor.dispose();
    batches.dispose();
  }
}

/** Whether any of the weights is int8. */
export function isInt8(parameters: readonly Parameter[]): boolean {
  return parameters.some(({ tensor }) => tensor.dtype === 'int8');
}

interface Candidate {
  parameter: Parameter;
  int8: Tensor;
  /** 1 − cosine, one of each image and call: [1]. */
  distances: Tensor[];
}

function candidatesOf(parameters: readonly Parameter[]): Map<Tensor, Candidate> {
  return new Map(
    parameters
      .filter(({ quantizable }) => quantizable)
      .map((parameter) => [parameter.tensor, { parameter, int8: packed(parameter.tensor), distances: [] }]),
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

async function judge({ parameter, distances }: Candidate, threshold: number): Promise<QuantizedLayer> {
  const values = await Promise.all(distances.map(async (distance) => (await distance.read()).get(0)));
  const worst = Math.max(...values); // -Infinity if no image reached the layer, NaN if its values are not finite
  const cosine = Number.isFinite(worst) ? 1 - worst : -1;
  return { names: parameter.parts.map(({ name }) => name.replace(/\.weight$/, '')), cosine, int8: cosine >= threshold };
}

// ----- stored with the weights ----------------------------------------------------------------------------------

/** Key of the table in a checkpoint's metadata. */
const QUANTIZATION = 'quantization';

export function quantizationMetadata(table: Quantization | undefined): Record<string, string> {
  return table ? { [QUANTIZATION]: JSON.stringify(table) } : {};
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
