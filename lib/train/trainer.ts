/** Training: L = λ_flow L_flow + λ_dist L_dist over the whole tokenizer, one queued step at a time. */
import type { NdArray } from 'ndarray';
import { checkInteger, checkNumber } from '../check.js';
import { UniFlowError } from '../errors.js';
import type { Encoder } from '../encoder/encoder.js';
import type { VisionEncoder } from '../encoder/vision-encoder.js';
import { DEFAULT_BETA, distillationLoss } from '../losses/distillation.js';
import { native, type LayerWeights, type TensorHandle } from '../native.js';
import type { Parameter } from '../parameters.js';
import { Tape, unrecorded } from '../tape.js';
import { onDevice, Tensor, tensorOf, tidy } from '../tensor.js';
import type { UniFlow } from '../uniflow.js';
import { AdamW, type AdamWOptions } from './optimizer.js';
import { byName, pack, unpack } from './parameters.js';
import { drawTimes, type TimeSampling } from './schedule.js';

export interface OptimizerOptions extends AdamWOptions {
  /** Default 1e-4. */
  lr?: number;
  /** Learning rate of the encoder. Default: `lr`. */
  encoderLr?: number;
}

export interface TrainerOptions {
  /** The frozen encoder that the student is kept close to; required unless lambdaDistillation is 0. */
  teacher?: VisionEncoder | UniFlow;
  optimizer?: OptimizerOptions;
  /** Default 1. */
  lambdaFlow?: number;
  /** Default 1. */
  lambdaDistillation?: number;
  /** Strength with which misalignment raises a layer's weight. Default 2. */
  beta?: number;
  /** Weighting of the layers in the distillation. Default 'adaptive', the paper's. */
  layerWeights?: LayerWeights;
  /** Trains only the decoder and the projections. Default false. */
  freezeEncoder?: boolean;
  /** Distribution for drawing times that are not given. Default 'uniform'. */
  time?: TimeSampling;
  /** Number of parts that a batch is split into and computed sequentially, to save memory; it must divide the batch. Default 1. */
  accumulate?: number;
  /**
   * Keeps only each block's input and recomputes the rest for the gradient, which needs less memory and a third more work. Default false.
   */
  recompute?: boolean;
  /** Seed of noise and times that are not given. Default 0. */
  seed?: number;
  /** step() throws after this many consecutive steps with a non-finite gradient. Default 10. */
  maxSkipped?: number;
}

export interface TrainingBatch {
  /** uint8 [B,H,W,3], or float32 [B,3,H,W] normalised. */
  pixels: NdArray;
  /** float32 [B,N,P]; drawn by default. */
  noise?: NdArray;
  /** float32 [B,N] in [0, 1]; by default drawn for each patch. */
  time?: NdArray;
}

export interface StepResult {
  loss: number;
  flow: number;
  distillation: number;
  /** Misalignment and weight of each layer; empty without distillation. */
  alpha: number[];
  weight: number[];
  /** Global norm before clipping. */
  gradNorm: number;
  /** Whether the gradient was not finite, so that nothing was changed. */
  skipped: boolean;
}

/** Position of a training. Together with the tensors of {@link Trainer.state}, it determines the next step. */
export interface TrainerPosition {
  /** Number of calls of step(), which determines the drawn noise and times. */
  iteration: number;
  /** Number of those that changed the weights. */
  steps: number;
  skippedInARow: number;
}

interface Inputs {
  pixels: Tensor;
  noise: Tensor; // [B,N,P]
  time: Tensor; // [B,N]
}

/** Losses of one part of a batch, each [1] or [L]. */
type Losses = ReturnType<Trainer['losses']>;

export class Trainer {
  private readonly optimizer: AdamW;
  private readonly teacher: Encoder | undefined;
  /** Frozen parameters that gradients pass through on the way to the latents' patch embedding. */
  private readonly passed: readonly Parameter[];
  private position: TrainerPosition = { iteration: 0, steps: 0, skippedInARow: 0 };

  constructor(
    private readonly uniflow: UniFlow,
    private readonly options: TrainerOptions,
  ) {
    const { lr = 1e-4, encoderLr = lr, ...adamw } = options.optimizer ?? {};
    checkNumber('beta', options.beta ?? DEFAULT_BETA, -Infinity, Infinity);
    checkInteger('accumulate', options.accumulate ?? 1, 1, 65536);
    for (const narrow of ['float8', 'int8'])
      if (uniflow.parameters.some(({ tensor }) => tensor.dtype === narrow))
        throw UniFlowError.expected('UNSUPPORTED', 'uniflow', 'a model in float32 or bfloat16, which training needs', `${narrow} weights`);
    this.teacher = this.checkTeacher(options);
    const ofEncoder = new Set(uniflow.encoderParameters);
    const decoder = { parameters: uniflow.parameters.filter((p) => !ofEncoder.has(p)), lr };
    const encoder = { parameters: uniflow.encoderParameters, lr: encoderLr };
    this.optimizer = onDevice(
      uniflow.device,
      () => new AdamW(options.freezeEncoder ? [decoder] : [encoder, decoder], adamw, uniflow.dtype),
    );
    this.passed = options.freezeEncoder && uniflow.config.latentEmbedding ? uniflow.encoderParameters : [];
    onDevice(uniflow.device, () => this.passed.forEach((parameter) => unpack(parameter, uniflow.dtype)));
    uniflow.encoder.invalidate();
  }

  private checkTeacher({ teacher, lambdaDistillation = 1 }: TrainerOptions): Encoder | undefined {
    if (lambdaDistillation === 0) return undefined;
    if (!teacher) throw UniFlowError.expected('BAD_INPUT', 'teacher', 'an encoder, as lambdaDistillation is not 0', 'none');
    if (teacher.precision === 'int8')
      throw UniFlowError.expected('UNSUPPORTED', 'teacher', 'an encoder in float32 or bfloat16', 'int8 weights');
    const encoder = teacher.encoder;
    if (teacher.device !== this.uniflow.device)
      throw UniFlowError.expected(
        'BAD_INPUT',
        'teacher',
        `an encoder on ${this.uniflow.device}, as the student`,
        `one on ${teacher.device}`,
      );
    const { width, layers, patch } = this.uniflow.config.encoder;
    if (encoder.config.width !== width || encoder.config.layers !== layers || encoder.config.patch !== patch)
      throw UniFlowError.expected(
        'BAD_INPUT',
        'teacher',
        `${layers} layers of width ${width} and patch ${patch}`,
        `${encoder.config.layers} of ${encoder.config.width} and ${encoder.config.patch}`,
      );
    return encoder;
  }

  /** Runs one AdamW step on one batch. `lrScale` multiplies every learning rate, for a schedule. */
  async step(batch: TrainingBatch, { lrScale = 1 } = {}): Promise<StepResult> {
    const queued = onDevice(this.uniflow.device, () => tidy(() => this.queueStep(this.inputsOf(batch), lrScale)));
    this.uniflow.encoder.invalidate();
    try {
      return await this.resultOf(queued);
    } catch (error) {
      this.teacher?.invalidate(); // a table cached by the teacher may have failed
      throw error;
    }
  }

  private inputsOf({ pixels, noise, time }: TrainingBatch): Inputs {
    const uploaded = Tensor.from(pixels);
    const { rows, cols } = this.uniflow.encoder.gridOf(uploaded);
    const [batch, patches, values] = [uploaded.dim(0), rows * cols, 3 * this.uniflow.config.patch ** 2];
    const { seed = 0, accumulate = 1, time: sampling = 'uniform' } = this.options;
    if (batch % accumulate !== 0)
      throw UniFlowError.expected('BAD_INPUT', 'pixels', `a multiple of ${accumulate} images (accumulate)`, String(batch));
    const ids = Uint32Array.from({ length: batch }, (_, i) => this.position.iteration * batch + i);
    const upload = (array: NdArray, name: string, shape: number[]): Tensor => {
      if (array.size !== shape.reduce((a, b) => a * b, 1))
        throw UniFlowError.expected('BAD_INPUT', name, `an ndarray [${shape.join(', ')}]`, `[${array.shape.join(', ')}]`);
      return tidy(() => Tensor.from(array, name).reshape(shape));
    };
    return {
      pixels: uploaded,
      noise: noise ? upload(noise, 'noise', [batch, patches, values]) : tensorOf(native.noise(seed, ids, patches, values)),
      time: time ? upload(time, 'time', [batch, patches]) : tensorOf(drawTimes(sampling, seed + 1, ids, patches)),
    };
  }

  private queueStep(inputs: Inputs, lrScale: number): { losses: Losses[]; norm: Tensor } {
    const parts = this.options.accumulate ?? 1;
    const size = inputs.pixels.dim(0) / parts;
    const losses: Losses[] = [];
    const sum = new Map<Tensor, Tensor>();
    for (let begin = 0; begin < parts * size; begin += size) {
      const slice = (t: Tensor): Tensor => t.slice(begin, begin + size);
      const part = tidy(() => this.differentiate(slice(inputs.pixels), slice(inputs.noise), slice(inputs.time), 1 / parts));
      losses.push(part.losses);
      for (const { of, gradient } of part.gradients) {
        const before = sum.get(of);
        sum.set(of, before ? tensorOf(native.add(before.handle, gradient.handle, undefined, 0, 1)) : gradient);
        before?.dispose();
      }
    }
    return { losses, norm: this.optimizer.step(sum, this.position.steps + 1, lrScale) };
  }

  /** Losses of images, and the gradients of their sum times `share`. */
  private differentiate(pixels: Tensor, noise: Tensor, time: Tensor, share: number) {
    const { lambdaFlow = 1, lambdaDistillation = 1 } = this.options;
    const tape = new Tape(this.optimizer.tensors);
    const losses = tape.record(() => this.losses(pixels, noise, time));
    const found = tape.backward([
      { loss: losses.flow, scale: share * lambdaFlow },
      ...(losses.distillation ? [{ loss: losses.distillation.loss, scale: share * lambdaDistillation }] : []),
    ]);
    return {
      losses,
      gradients: this.optimizer.tensors.flatMap((of) => (found.has(of) ? [{ of, gradient: found.get(of) as Tensor }] : [])),
    };
  }

  private losses(pixels: Tensor, noise: Tensor, time: Tensor) {
    const { encoder } = this.uniflow;
    const { beta = DEFAULT_BETA, layerWeights = 'adaptive', recompute = false } = this.options;
    const { latents, states } = this.teacher
      ? this.uniflow.forward(pixels, { states: true, recompute })
      : { latents: this.uniflow.latents(pixels, { recompute }), states: [] };
    const teacher = this.teacher && unrecorded(() => (this.teacher as Encoder).forward(pixels, { states: true }).states);
    const distillation =
      teacher && distillationLoss(states.slice(1), teacher.slice(1), { beta, skip: encoder.prefix, weights: layerWeights });
    const flow = this.uniflow.flowLoss(pixels, latents, noise, time, { recompute });
    return { flow, distillation };
  }

  private async resultOf({ losses, norm }: { losses: Losses[]; norm: Tensor }): Promise<StepResult> {
    const read = async (tensors: Tensor[]): Promise<number[]> => meanOf(await Promise.all(tensors.map(numbers)));
    const distilled = losses.flatMap((l) => (l.distillation ? [l.distillation] : []));
    const [[flow = 0], [distillation = 0], alpha, weight, [gradNorm = 0]] = await Promise.all([
      read(losses.map((l) => l.flow)),
      read(distilled.map((d) => d.loss)),
      read(distilled.map((d) => d.alpha)),
      read(distilled.map((d) => d.weight)),
      numbers(norm),
    ]);
    const { lambdaFlow = 1, lambdaDistillation = 1 } = this.options;
    const skipped = !Number.isFinite(gradNorm);
    this.count(skipped);
    return { loss: lambdaFlow * flow + lambdaDistillation * distillation, flow, distillation, alpha, weight, gradNorm, skipped };
  }

  private count(skipped: boolean): void {
    const { iteration, steps, skippedInARow } = this.position;
    this.position = { iteration: iteration + 1, steps: steps + (skipped ? 0 : 1), skippedInARow: skipped ? skippedInARow + 1 : 0 };
    const { maxSkipped = 10 } = this.options;
    if (this.position.skippedInARow >= maxSkipped)
      throw new UniFlowError('INTERNAL', `${maxSkipped} steps in a row had a gradient that is not finite: lower the learning rate`, {
        subject: 'gradient',
      });
  }

  /** Gradients of the last step before clipping, by checkpoint name. */
  async gradients(): Promise<Map<string, NdArray>> {
    const read = this.optimizer.entries.flatMap(({ trained, gradient }) => (gradient ? [byName(trained.parameter, gradient.handle)] : []));
    return new Map((await Promise.all(read)).flat());
  }

  /** Current values of the trained parameters, by checkpoint name. */
  async parameters(): Promise<Map<string, NdArray>> {
    const all = await Promise.all(this.optimizer.entries.map(({ trained }) => byName(trained.parameter, trained.master.handle)));
    return new Map(all.flat());
  }

  /** @internal The tensors that the next step depends on, and the position of the training. */
  state(): { tensors: Map<string, TensorHandle>; position: TrainerPosition } {
    return { tensors: this.optimizer.state(), position: { ...this.position } };
  }

  /** @internal Resumes bit-exactly from {@link state}. */
  restore(read: (name: string, shape: readonly number[]) => TensorHandle, position: TrainerPosition): void {
    onDevice(this.uniflow.device, () => this.optimizer.restore(read));
    this.position = { ...position };
    this.uniflow.encoder.invalidate();
  }

  /** Runs `work` on the model with the weights that finish() would produce. No step may be running. */
  async evaluating<T>(work: () => Promise<T>): Promise<T> {
    this.uniflow.encoder.invalidate();
    try {
      return await this.optimizer.withAverage(work);
    } finally {
      this.uniflow.encoder.invalidate();
    }
  }

  /** Ends the training: the model behaves like a loaded one again, with the new weights or their moving average. */
  async finish({ average = this.optimizer.averaged } = {}): Promise<void> {
    this.optimizer.finish({ average });
    onDevice(this.uniflow.device, () => this.passed.forEach((parameter) => pack(parameter, this.uniflow.dtype)));
    this.uniflow.encoder.invalidate();
    await onDevice(this.uniflow.device, () => native.synchronize());
  }

  /** Frees the optimizer's state if a training ends without {@link finish}. The model must then be disposed of as well. */
  dispose(): void {
    this.optimizer.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}

async function numbers(tensor: Tensor): Promise<number[]> {
  try {
    return [...((await tensor.read()).data as Float32Array)];
  } finally {
    tensor.dispose();
  }
}

/** Element-wise mean. */
function meanOf(lists: number[][]): number[] {
  return (lists[0] ?? []).map((_, i) => lists.reduce((sum, list) => sum + (list[i] as number), 0) / lists.length);
}
