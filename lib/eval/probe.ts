/**
 * Linear probe: softmax regression on frozen features, trained with this library's own kernels.
 *
 *   x̂ = (x − μ) / σ of the training set, per dimension;   p = softmax(W x̂ + b);   loss = mean −log p[label]
 *
 * AdamW on large batches of rows shuffled once; the learning rate decays to zero along half a cosine. The result is a function of the features, the labels
 * and the options.
 */
import ndarray, { type NdArray } from 'ndarray';
import { checkInteger, checkNumber, checkOptions } from '../check.js';
import { permutation } from '../train/random.js';
import { onCpu } from '../device.js';
import { throwIfAborted } from '../errors.js';
import { crossEntropy } from '../losses/cross-entropy.js';
import { native } from '../native.js';
import { assemble, linear, scaleAdd, type Linear } from '../ops.js';
import { RandomSource } from '../parameters.js';
import { Tape } from '../tape.js';
import { contiguous, Tensor, tensorOf, tidy } from '../tensor.js';
import { AdamW } from '../train/optimizer.js';
import { learningRate } from '../train/schedule.js';
import { checkLabelled, type LabelledFeatures } from './labelled.js';

export interface ProbeOptions {
  /** Default 1000. */
  steps?: number;
  /** Rows per step. Default 1024. */
  batchSize?: number;
  /** Default 0.01. */
  lr?: number;
  /** Default 0.05. */
  weightDecay?: number;
  /** Seed of the shuffle and the initial weights. Default 0. */
  seed?: number;
  onProgress?: ((done: number, total: number) => void) | undefined;
  signal?: AbortSignal | undefined;
}

export const PROBE_DEFAULTS = { steps: 1000, batchSize: 1024, lr: 0.01, weightDecay: 0.05, seed: 0 } as const;

/** A variance below this fraction of the squared mean is only the rounding of a constant. */
const CONSTANT = 1e-11;

/** Number of steps queued before waiting for one. */
const QUEUED = 32;

export interface ProbeResult {
  /** Fraction of the test set that is classified correctly. */
  accuracy: number;
  trainAccuracy: number;
}

/** Trains a linear classifier on `train` and measures it on `test`. */
export async function linearProbe(train: LabelledFeatures, test: LabelledFeatures, options: ProbeOptions = {}): Promise<ProbeResult> {
  checkOptions(options);
  const { onProgress, signal, ...settings } = { ...PROBE_DEFAULTS, ...options };
  checkInteger('steps', settings.steps, 1, 1e9);
  checkInteger('batchSize', settings.batchSize, 1, 1 << 20);
  checkInteger('seed', settings.seed, 0, Number.MAX_SAFE_INTEGER);
  checkNumber('lr', settings.lr, 0, Infinity);
  const { classes } = checkLabelled(train, test);
  const rows = shuffled(train, settings.seed);
  const source = new RandomSource(onCpu('float32'), settings.seed);
  const probe = source.linear('probe', classes, train.features.shape[1] as number);
  const data = upload(rows);
  const scaling = await Scaling.of(data.features);
  const optimizer = new AdamW([{ parameters: source.parameters, lr: settings.lr }], { weightDecay: settings.weightDecay }, 'float32');
  try {
    const fitted = fit({ ...settings, data, scaling, probe, optimizer, onProgress, signal });
    await fitted.finally(() => optimizer.finish({ average: false }));
    return { accuracy: await accuracyOf(probe, scaling, test), trainAccuracy: await accuracyOf(probe, scaling, rows) };
  } finally {
    for (const tensor of [data.features, data.labels, ...source.parameters.map((p) => p.tensor)]) tensor.dispose();
    scaling.dispose();
    await native.synchronize();
  }
}

interface Fit {
  data: { features: Tensor; labels: Tensor };
  scaling: Scaling;
  probe: Linear;
  optimizer: AdamW;
  steps: number;
  batchSize: number;
  onProgress: ProbeOptions['onProgress'];
  signal: AbortSignal | undefined;
}

async function fit({ data, scaling, probe, optimizer, steps, batchSize, onProgress, signal }: Fit): Promise<void> {
  const count = data.labels.dim(0);
  const batches = Math.ceil(count / batchSize);
  for (let step = 0; step < steps; step++) {
    throwIfAborted(signal);
    const begin = (step % batches) * batchSize;
    const end = Math.min(count, begin + batchSize);
    tidy(() => {
      const x = scaling.apply(data.features.slice(begin, end));
      const tape = new Tape(optimizer.tensors);
      const { loss } = tape.record(() => crossEntropy(linear(x, probe), data.labels.slice(begin, end)));
      optimizer.step(tape.backward([{ loss, scale: 1 }]), step + 1, learningRate(step, { steps, warmup: 0 }));
    });
    if ((step + 1) % QUEUED !== 0 && step + 1 !== steps) continue;
    await native.synchronize();
    onProgress?.(step + 1, steps);
  }
}

async function accuracyOf(probe: Linear, scaling: Scaling, test: LabelledFeatures): Promise<number> {
  const rows = PROBE_DEFAULTS.batchSize;
  let correct = 0;
  for (let begin = 0; begin < test.labels.length; begin += rows) {
    const counted = tidy(() => {
      const { features, labels } = upload(test, begin, Math.min(test.labels.length, begin + rows));
      return crossEntropy(linear(scaling.apply(features), probe), labels).correct;
    });
    correct += (await counted.read()).get(0);
    counted.dispose();
  }
  return correct / test.labels.length;
}

/** Uploads rows [begin, end). */
function upload({ features, labels }: LabelledFeatures, begin = 0, end = labels.length): { features: Tensor; labels: Tensor } {
  const width = features.shape[1] as number;
  const data = contiguous(features, 'features').data.subarray(begin * width, end * width);
  return {
    features: Tensor.from({ data, shape: [end - begin, width] }),
    labels: Tensor.from({ data: labels.subarray(begin, end), shape: [end - begin] }),
  };
}

/** Shuffles the rows, because data sets are often sorted by class. */
function shuffled({ features, labels }: LabelledFeatures, seed: number): LabelledFeatures {
  const [count, width] = features.shape as [number, number];
  const from = contiguous(features, 'features').data as Float32Array;
  const order = permutation(count, 'probe', seed);
  const to = new Float32Array(count * width);
  order.forEach((index, i) => to.set(from.subarray(index * width, (index + 1) * width), i * width));
  return { features: ndarray(to, [count, width]), labels: Int32Array.from(order, (index) => labels[index] as number) };
}

/** x → (x − μ) / σ with the moments of a set; a dimension that is constant in the set becomes 0. */
class Scaling {
  private constructor(
    private readonly minusMean: Tensor, // [1,D]
    private readonly inverse: Tensor, // [D]
  ) {}

  /** The scaling for the rows of x [N,D]. */
  static async of(x: Tensor): Promise<Scaling> {
    const count = x.dim(0);
    const minusMean = tidy(() => meanOfRows(x, -1 / count).reshape([1, x.dim(1)]));
    const variance = tidy(() => {
      const centred = shift(x, minusMean);
      return meanOfRows(scaleAdd(zerosLike(x), centred, { gate: centred }), 1 / count);
    });
    const [means, { data: spread }] = (await Promise.all([minusMean.read(), variance.read()])) as NdArray<Float32Array>[] as [
      NdArray,
      NdArray,
    ];
    variance.dispose();
    const inverse = Float32Array.from(spread as Float32Array, (v, d) => (v > CONSTANT * means.get(0, d) ** 2 ? 1 / Math.sqrt(v) : 0));
    return new Scaling(minusMean, Tensor.from({ data: inverse, shape: [inverse.length] }));
  }

  apply(x: Tensor): Tensor {
    return scaleAdd(zerosLike(x), shift(x, this.minusMean), { scale: this.inverse });
  }

  dispose(): void {
    this.minusMean.dispose();
    this.inverse.dispose();
  }
}

/** Sum of the rows of x [N,D] times `factor`: [D]. */
function meanOfRows(x: Tensor, factor: number): Tensor {
  return tensorOf(native.add(undefined, tensorOf(native.sumRows(x.handle, 1)).handle, undefined, 0, factor));
}

/** x + b for every row, b [1,D]. */
function shift(x: Tensor, b: Tensor): Tensor {
  return assemble(x.reshape([x.dim(0), 1, x.dim(1)]), { position: b }).reshape(x.shape);
}

function zerosLike(x: Tensor): Tensor {
  return tensorOf(native.constantParameter(x.shape, 0));
}
