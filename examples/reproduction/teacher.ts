/** The teacher: a small vision transformer, trained as a classifier. */
import { stat } from 'node:fs/promises';
import { onCpu } from '../../lib/device.js';
import { VisionEncoder } from '../../lib/encoder/vision-encoder.js';
import { crossEntropy } from '../../lib/losses/cross-entropy.js';
import { native } from '../../lib/native.js';
import { cast, linear, reshape, sliceTokens, type Linear } from '../../lib/ops.js';
import { RandomSource } from '../../lib/parameters.js';
import { lookAtNeighbours } from '../../lib/start/neighbours.js';
import { Weights } from '../../lib/start/weights.js';
import { Tape } from '../../lib/tape.js';
import { Tensor, tidy } from '../../lib/tensor.js';
import { AdamW } from '../../lib/train/optimizer.js';
import { permutation, uniforms } from '../../lib/train/random.js';
import { learningRate } from '../../lib/train/schedule.js';
import { loadState, saveState, type Resumable } from '../../lib/train/state.js';
import { augment, paste, type Labelled } from './images.js';

/** Options for training a teacher. */
export interface TeacherTraining {
  steps: number;
  batch: number;
  lr: number;
  warmup: number;
  seed: number;
  /** Images are randomly shifted by up to this many pixels in each direction, and mirrored. */
  shift: number;
  flip: boolean;
  /** Fraction of the steps in which a box of each image is replaced by another image (Yun et al. 2019, "CutMix"). */
  cutmix: number;
  /** Weight of the old value in the moving average of the weights; 0 disables it. */
  ema: number;
}

export interface TeacherOptions extends TeacherTraining {
  /** config.json of the encoder. */
  encoder: Record<string, unknown>;
  classes: number;
}

/** Batch size for inference. */
const BATCH = 128;

/** An encoder, and a linear layer on the mean of its patch tokens. */
export class Classifier {
  readonly encoder: VisionEncoder;
  readonly source: RandomSource;
  private readonly head: Linear;
  private readonly mean: Tensor; // [C, N*C]

  constructor({ encoder, classes, seed }: Pick<TeacherOptions, 'encoder' | 'classes' | 'seed'>) {
    this.encoder = VisionEncoder.random(encoder, { seed, device: 'cpu', dtype: 'bfloat16' });
    this.source = new RandomSource(onCpu('bfloat16'), seed + 1);
    this.head = this.source.linear('head', classes, this.encoder.config.width);
    const { rows, cols } = this.encoder.encoder.trainedGrid;
    this.mean = meanOfGroups(rows * cols, classes);
  }

  /** Makes rotary heads initially look at neighbours, like a convolution, because a small transformer learns this slowly. */
  async lookAround(): Promise<void> {
    const { heads, layers, rope } = this.encoder.config;
    if (!rope) return;
    const weights = new Weights(this.encoder);
    for (let i = 0; i < layers; i++) await lookAtNeighbours(weights, `encoder.layers.${i}`, { heads, rope });
  }

  /** uint8 [B,H,W,3] → [B,C]. The mean of the tokens' logits equals the logits of the mean token. */
  logits(pixels: Tensor): Tensor {
    const { encoder } = this.encoder;
    const { last } = encoder.forward(pixels);
    const all = linear(sliceTokens(last, encoder.prefix, last.dim(1)), this.head); // [B,N,C]
    return linear(reshape(all, [all.dim(0), all.dim(1) * all.dim(2)]), { weight: this.mean });
  }

  /** Fraction of correctly classified images. */
  async accuracy(images: Labelled): Promise<number> {
    let correct = 0;
    for (let begin = 0; begin < images.count; begin += BATCH) {
      const indices = Array.from({ length: Math.min(BATCH, images.count - begin) }, (_, i) => begin + i);
      const counted = tidy(() => crossEntropy(this.logits(Tensor.from(images.pixels(indices))), labelsOf(images, indices)).correct);
      correct += (await counted.read()).get(0);
      counted.dispose();
    }
    return correct / images.count;
  }

  async dispose(): Promise<void> {
    for (const tensor of [this.mean, ...this.source.parameters.map((p) => p.tensor)]) tensor.dispose();
    await this.encoder.dispose();
  }
}

export interface Progress {
  /** Checkpoint file: resumed from if it exists, and rewritten every `every` steps. */
  state: string;
  every: number;
  /** Called after every step, with its number from 1. */
  onStep?: (step: number) => void;
}

/** Trains a classifier with cross-entropy and AdamW, or resumes an interrupted training. The caller disposes of it. */
export async function trainTeacher(images: Labelled, options: TeacherOptions, progress?: Progress): Promise<Classifier> {
  const classifier = new Classifier(options);
  await classifier.lookAround();
  const training = new Training(classifier, images, options);
  const begun = progress && (await stat(progress.state).catch(() => undefined));
  if (begun) await loadState(progress.state, training, {});
  while (training.done < options.steps) {
    await training.step();
    if (progress && training.done % progress.every === 0) await saveState(progress.state, training, {});
    progress?.onStep?.(training.done);
  }
  await training.finish();
  return classifier;
}

class Training implements Resumable {
  private readonly optimizer: AdamW;
  /** Number of completed steps. */
  done = 0;

  constructor(
    private readonly classifier: Classifier,
    private readonly images: Labelled,
    private readonly options: TeacherOptions,
  ) {
    const parameters = [...classifier.encoder.parameters, ...classifier.source.parameters];
    this.optimizer = new AdamW([{ parameters, lr: options.lr }], { ema: options.ema }, 'bfloat16');
    classifier.encoder.encoder.invalidate();
  }

  async step(): Promise<void> {
    const { classifier, images, optimizer, options } = this;
    const { pixels, parts } = batchOf(images, this.done, options);
    tidy(() => {
      const tape = new Tape(optimizer.tensors);
      const losses = tape.record(() => {
        const logits = classifier.logits(Tensor.from(pixels));
        return parts.map(({ indices, share }) => ({ loss: crossEntropy(logits, labelsOf(images, indices)).loss, scale: share }));
      });
      optimizer.step(tape.backward(losses), this.done + 1, learningRate(this.done, options));
    });
    await native.synchronize();
    classifier.encoder.encoder.invalidate();
    this.done++;
  }

  state(): ReturnType<Resumable['state']> {
    return { tensors: this.optimizer.state(), position: { iteration: this.done, steps: this.done, skippedInARow: 0 } };
  }

  restore(...[read, { steps }]: Parameters<Resumable['restore']>): void {
    this.optimizer.restore(read);
    this.done = steps;
    this.classifier.encoder.encoder.invalidate();
  }

  async finish(): Promise<void> {
    this.optimizer.finish({ average: this.options.ema > 0 });
    this.classifier.encoder.encoder.invalidate();
    await native.synchronize();
  }
}

/** Pixels of a step, and the images that provide their labels, with weights. Depends only on the options and the step. */
function batchOf(
  images: Labelled,
  step: number,
  options: TeacherOptions,
): { pixels: ReturnType<Labelled['pixels']>; parts: { indices: readonly number[]; share: number }[] } {
  const { batch, seed, cutmix } = options;
  const perEpoch = Math.floor(images.count / batch);
  const order = permutation(images.count, seed, Math.floor(step / perEpoch));
  const begin = (step % perEpoch) * batch;
  const indices = [...order.subarray(begin, begin + batch)];
  const pixels = augment(images.pixels(indices), options, uniforms(3 * batch, seed, 'images', step));
  const draws = uniforms(4, seed, 'cutmix', step);
  if ((draws[0] as number) >= cutmix) return { pixels, parts: [{ indices, share: 1 }] };
  const pasted = paste(pixels, draws.subarray(1)); // each box is filled from the previous image
  const before = [indices.at(-1) as number, ...indices.slice(0, -1)];
  return { pixels, parts: [{ indices, share: 1 - pasted }, { indices: before, share: pasted }] }; // prettier-ignore
}

function labelsOf({ labels }: Labelled, indices: readonly number[]): Tensor {
  return Tensor.from({ data: Int32Array.from(indices, (i) => labels[i] as number), shape: [indices.length] });
}

/** The matrix that maps the concatenation of `groups` vectors of `width` to their mean: [width, groups * width]. */
function meanOfGroups(groups: number, width: number): Tensor {
  const data = new Float32Array(width * groups * width);
  for (let c = 0; c < width; c++) for (let g = 0; g < groups; g++) data[(c * groups + g) * width + c] = 1 / groups;
  return cast(Tensor.from({ data, shape: [width, groups * width] }), 'bfloat16');
}
