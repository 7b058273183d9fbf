/** Training: L = λ_flow L_flow + λ_dist L_dist over the whole tokenizer, one queued step at a time. */
import type { NdArray } from 'ndarray';
import { UniFlowError } from '../errors.js';
import type { Encoder } from '../encoder/encoder.js';
import { VisionEncoder } from '../encoder/vision-encoder.js';
import { DEFAULT_BETA, distillationLoss } from '../losses/distillation.js';
import { flowLoss } from '../losses/flow.js';
import { native, type LayerWeights } from '../native.js';
import { reshape, unfold } from '../ops.js';
import { Tape, unrecorded } from '../tape.js';
import { keep, Tensor, tidy } from '../tensor.js';
import type { UniFlow } from '../uniflow.js';
import { byName, TrainedParameter } from './parameters.js';

export interface OptimizerOptions {
  /** Default 1e-4. */
  lr?: number;
  /** Of the encoder. Default: `lr`. */
  encoderLr?: number;
  /** Default [0.9, 0.95]. */
  betas?: readonly [number, number];
  /** Default 1e-8. */
  eps?: number;
  /** Decoupled, on matrices only. Default 0.05. */
  weightDecay?: number;
  /** Largest global gradient norm; 0: no clipping. Default 1. */
  clipNorm?: number;
  /** Weight of the old value in the moving average of the parameters; 0: none is kept. Default 0. */
  ema?: number;
}

export interface TrainerOptions {
  /** The frozen encoder that the student is held near; needed unless lambdaDistillation is 0. */
  teacher?: VisionEncoder | UniFlow;
  optimizer?: OptimizerOptions;
  /** Default 1. */
  lambdaFlow?: number;
  /** Default 1. */
  lambdaDistillation?: number;
  /** How strongly misalignment raises a layer's weight. Default 2. */
  beta?: number;
  /** How the distillation weights its layers. Default 'adaptive', the paper's. */
  layerWeights?: LayerWeights;
  /** Trains the decoder and the projections only. Default false. */
  freezeEncoder?: boolean;
  /** Of noise and times that are not given. Default 0. */
  seed?: number;
  /** After so many steps in a row with a gradient that is not finite, step() throws. Default 10. */
  maxSkipped?: number;
}

export interface TrainingBatch {
  /** uint8 [B,H,W,3], or float32 [B,3,H,W] normalised. */
  pixels: NdArray;
  /** float32 [B,N,P]; default: drawn. */
  noise?: NdArray;
  /** float32 [B,N] in [0, 1]; default: uniform, one for each patch. */
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
  /** The gradient was not finite, and nothing was changed. */
  skipped: boolean;
}

const DEFAULTS = { lr: 1e-4, betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0.05, clipNorm: 1, ema: 0 } as const;

export class Trainer {
  private readonly trained: TrainedParameter[];
  private readonly teacher: Encoder | undefined;
  private readonly optimizer: Required<OptimizerOptions>;
  private readonly options: TrainerOptions;
  private gradientsOfLastStep: Tensor[] = [];
  private steps = 0;
  private skippedInARow = 0;

  constructor(
    private readonly uniflow: UniFlow,
    options: TrainerOptions,
  ) {
    this.options = options;
    this.optimizer = { ...DEFAULTS, encoderLr: options.optimizer?.lr ?? DEFAULTS.lr, ...options.optimizer };
    this.teacher = this.checkTeacher(options);
    const { encoderLr, lr, weightDecay, ema } = this.optimizer;
    const ofEncoder = new Set(uniflow.encoderParameters);
    this.trained = uniflow.parameters
      .filter((p) => !(options.freezeEncoder && ofEncoder.has(p)))
      .map((p) => new TrainedParameter(p, { lr: ofEncoder.has(p) ? encoderLr : lr, weightDecay }, uniflow.dtype, ema > 0));
    uniflow.encoder.invalidate();
  }

  private checkTeacher({ teacher, lambdaDistillation = 1 }: TrainerOptions): Encoder | undefined {
    if (lambdaDistillation === 0) return undefined;
    if (!teacher) throw UniFlowError.expected('BAD_INPUT', 'teacher', 'an encoder, as lambdaDistillation is not 0', 'none');
    const encoder = teacher.encoder;
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

  /** One step of AdamW on one batch. `lrScale` multiplies every learning rate: the schedule's part. */
  async step(batch: TrainingBatch, { lrScale = 1 } = {}): Promise<StepResult> {
    for (const g of this.gradientsOfLastStep) g.dispose();
    const inputs = this.inputsOf(batch);
    const queued = tidy(() => this.queueStep(inputs, lrScale));
    for (const t of Object.values(inputs)) t.dispose();
    this.uniflow.encoder.invalidate();
    return this.resultOf(queued);
  }

  /** Pixels, data patches [M,P], noise [M,P], times [M] on the device. */
  private inputsOf({ pixels, noise, time }: TrainingBatch): { pixels: Tensor; noise: Tensor; time: Tensor } {
    const uploaded = Tensor.from(pixels);
    const { rows, cols } = this.uniflow.encoder.gridOf(uploaded);
    const [batch, patches, values] = [uploaded.dim(0), rows * cols, 3 * this.uniflow.config.patch ** 2];
    const { seed = 0 } = this.options;
    const ids = Uint32Array.from({ length: batch }, (_, i) => this.steps * batch + i);
    const upload = (array: NdArray, name: string, shape: number[]): Tensor => {
      if (array.size !== shape.reduce((a, b) => a * b, 1))
        throw UniFlowError.expected('BAD_INPUT', name, `an ndarray [${shape.join(', ')}]`, `[${array.shape.join(', ')}]`);
      return Tensor.from(array);
    };
    return {
      pixels: uploaded,
      noise: noise ? upload(noise, 'noise', [batch, patches, values]) : new Tensor(native.noise(seed, ids, patches, values)),
      time: time ? upload(time, 'time', [batch, patches]) : new Tensor(native.uniform(seed + 1, ids, patches)),
    };
  }

  private queueStep({ pixels, noise, time }: { pixels: Tensor; noise: Tensor; time: Tensor }, lrScale: number) {
    const { lambdaFlow = 1, lambdaDistillation = 1 } = this.options;
    const tape = new Tape(this.trained.map((t) => t.parameter.tensor));
    const { flow, distillation } = tape.record(() => this.losses(pixels, noise, time));
    const found = tape.backward([
      { loss: flow, scale: lambdaFlow },
      ...(distillation ? [{ loss: distillation.loss, scale: lambdaDistillation }] : []),
    ]);
    const updates = this.trained.flatMap((t) => {
      const grad = found.get(t.parameter.tensor);
      return grad ? [t.update(grad, lrScale)] : [];
    });
    this.gradientsOfLastStep = this.trained.map((t) => {
      const grad = found.get(t.parameter.tensor);
      return grad ? keep(grad) : new Tensor(native.constantParameter(t.master.shape, 0));
    });
    const norm = new Tensor(native.globalNorm(updates.map((u) => u.grad)));
    const { betas, eps, clipNorm, ema } = this.optimizer;
    native.adamw(updates, norm.handle, { beta1: betas[0], beta2: betas[1], eps, ema, clip: clipNorm, step: this.steps + 1 });
    return { flow, distillation, norm };
  }

  private losses(pixels: Tensor, noise: Tensor, time: Tensor) {
    const { encoder, decoder, dtype } = this.uniflow;
    const { beta = DEFAULT_BETA, layerWeights = 'adaptive' } = this.options;
    const { last, states } = encoder.forward(pixels, { states: true });
    const teacher = this.teacher && unrecorded(() => (this.teacher as Encoder).forward(pixels, { states: true }).states);
    const distillation =
      teacher && distillationLoss(states.slice(1), teacher.slice(1), { beta, skip: encoder.prefix, weights: layerWeights });
    const condition = decoder.condition(this.uniflow.toLatents(last), encoder.gridOf(pixels));
    const [rows, width] = [condition.dim(0) * condition.dim(1), condition.dim(2)];
    const values = 3 * this.uniflow.config.patch ** 2;
    const data = unfold(pixels, this.uniflow.config.patch, this.uniflow.normalisation, 'float32').reshape([rows, values]);
    const flow = flowLoss(
      decoder.head,
      data,
      noise.reshape([rows, values]),
      time.reshape([rows]),
      reshape(condition, [rows, width]),
      dtype,
    );
    return { flow, distillation };
  }

  private async resultOf({ flow, distillation, norm }: ReturnType<Trainer['queueStep']>): Promise<StepResult> {
    const tensors = [flow, norm, ...(distillation ? [distillation.loss, distillation.alpha, distillation.weight] : [])];
    const values = await Promise.all(tensors.map(async (t) => [...((await t.read()).data as Float32Array)])).finally(() => {
      for (const t of tensors) t.dispose();
    });
    const [[flowLoss], [gradNorm], [distilled = 0] = [], alpha = [], weight = []] = values as [
      [number],
      [number],
      [number]?,
      number[]?,
      number[]?,
    ];
    const { lambdaFlow = 1, lambdaDistillation = 1, maxSkipped = 10 } = this.options;
    const skipped = !Number.isFinite(gradNorm);
    this.skippedInARow = skipped ? this.skippedInARow + 1 : 0;
    if (!skipped) this.steps++;
    if (this.skippedInARow >= maxSkipped)
      throw new UniFlowError('INTERNAL', `${maxSkipped} steps in a row had a gradient that is not finite: lower the learning rate`, {
        subject: 'gradient',
      });
    return {
      loss: lambdaFlow * flowLoss + lambdaDistillation * distilled,
      flow: flowLoss,
      distillation: distilled,
      alpha,
      weight,
      gradNorm,
      skipped,
    };
  }

  /** Gradients of the last step before clipping, by checkpoint name. */
  async gradients(): Promise<Map<string, NdArray>> {
    const all = await Promise.all(this.trained.map((t, i) => byName(t.parameter, (this.gradientsOfLastStep[i] as Tensor).handle)));
    return new Map(all.flat());
  }

  /** Current values of the trained parameters, by checkpoint name. */
  async parameters(): Promise<Map<string, NdArray>> {
    const all = await Promise.all(this.trained.map((t) => byName(t.parameter, t.master.handle)));
    return new Map(all.flat());
  }

  /** Ends the training: the model is as loaded models are again, with the new weights or their moving average. */
  async finish({ average = this.optimizer.ema > 0 } = {}): Promise<void> {
    for (const t of this.trained) t.finish(average);
    this.uniflow.encoder.invalidate();
    this.dispose();
    await native.synchronize();
  }

  private dispose(): void {
    for (const t of [...this.trained, ...this.gradientsOfLastStep]) t.dispose();
  }
}
