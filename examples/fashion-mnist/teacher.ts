/** The teacher: a small vision transformer, trained to classify. */
import { onCpu } from '../../lib/device.js';
import type { Dataset } from '../../lib/sources/dataset.js';
import { batches } from '../../lib/train/loader.js';
import { VisionEncoder } from '../../lib/encoder/vision-encoder.js';
import { crossEntropy } from '../../lib/losses/cross-entropy.js';
import { native } from '../../lib/native.js';
import { cast, linear, reshape, sliceTokens, type Linear } from '../../lib/ops.js';
import { RandomSource } from '../../lib/parameters.js';
import { Tape } from '../../lib/tape.js';
import { Tensor, tidy } from '../../lib/tensor.js';
import { AdamW } from '../../lib/train/optimizer.js';
import { learningRate } from '../../lib/train/schedule.js';

export interface TeacherOptions {
  /** config.json of the encoder. */
  encoder: Record<string, unknown>;
  classes: number;
  steps: number;
  batch: number;
  lr: number;
  warmup: number;
  seed: number;
}

/** An encoder, and a linear layer on the mean of its patch tokens. */
export class Classifier {
  readonly encoder: VisionEncoder;
  readonly source: RandomSource;
  private readonly head: Linear;
  private readonly mean: Tensor; // [C, N*C]

  constructor({ encoder, classes, seed }: TeacherOptions) {
    this.encoder = VisionEncoder.random(encoder, { seed, dtype: 'bfloat16' });
    this.source = new RandomSource(onCpu('bfloat16'), seed + 1);
    this.head = this.source.linear('head', classes, this.encoder.config.width);
    const { rows, cols } = this.encoder.encoder.trainedGrid;
    this.mean = meanOfGroups(rows * cols, classes);
  }

  /** uint8 [B,H,W,3] → [B,C]. The mean of the tokens' logits is the logits of the mean token. */
  logits(pixels: Tensor): Tensor {
    const { encoder } = this.encoder;
    const { last } = encoder.forward(pixels);
    const all = linear(sliceTokens(last, encoder.prefix, last.dim(1)), this.head); // [B,N,C]
    return linear(reshape(all, [all.dim(0), all.dim(1) * all.dim(2)]), { weight: this.mean });
  }

  /** Share of the pictures that are classified right. */
  async accuracy(data: Dataset): Promise<number> {
    let correct = 0;
    for await (const { pixels, labels } of batches(data, { batchSize: 128, size: this.size, crop: 'center', epochs: 1 })) {
      const counted = tidy(() => crossEntropy(this.logits(Tensor.from(pixels)), labelsOf(labels)).correct);
      correct += (await counted.read()).get(0);
      counted.dispose();
    }
    return correct / data.length;
  }

  get size(): readonly [number, number] {
    return this.encoder.config.imageSize;
  }

  async dispose(): Promise<void> {
    for (const tensor of [this.mean, ...this.source.parameters.map((p) => p.tensor)]) tensor.dispose();
    await this.encoder.dispose();
  }
}

/** Trains a classifier with cross-entropy and AdamW. The caller disposes of it. */
export async function trainTeacher(data: Dataset, options: TeacherOptions): Promise<Classifier> {
  const { steps, batch, lr, warmup, seed } = options;
  const classifier = new Classifier(options);
  const parameters = [...classifier.encoder.parameters, ...classifier.source.parameters];
  const optimizer = new AdamW([{ parameters, lr }], {}, 'bfloat16');
  for await (const { pixels, labels, step } of batches(data, { batchSize: batch, size: classifier.size, scale: [1, 1], seed })) {
    classifier.encoder.encoder.invalidate();
    tidy(() => {
      const tape = new Tape(optimizer.tensors);
      const { loss } = tape.record(() => crossEntropy(classifier.logits(Tensor.from(pixels)), labelsOf(labels)));
      optimizer.step(tape.backward([{ loss, scale: 1 }]), step + 1, learningRate(step, { steps, warmup }));
    });
    await native.synchronize();
    if (step + 1 === steps) break;
  }
  optimizer.finish({ average: false });
  classifier.encoder.encoder.invalidate();
  await native.synchronize();
  return classifier;
}

function labelsOf(labels: Int32Array | undefined): Tensor {
  return Tensor.from({ data: labels as Int32Array, shape: [(labels as Int32Array).length] });
}

/** The matrix that takes `groups` vectors of `width`, one behind the other, to their mean: [width, groups * width]. */
function meanOfGroups(groups: number, width: number): Tensor {
  const data = new Float32Array(width * groups * width);
  for (let c = 0; c < width; c++) for (let g = 0; g < groups; g++) data[(c * groups + g) * width + c] = 1 / groups;
  return cast(Tensor.from({ data, shape: [width, groups * width] }), 'bfloat16');
}
