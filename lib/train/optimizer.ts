/**
 * AdamW over all trained parameters in one queued operation: clipping by the global norm, decoupled weight decay on matrices, moving average. The arithmetic
 * is in native/ops/optimizer.h.
 */
import { checkNumber } from '../check.js';
import { native, type FloatType, type TensorHandle } from '../native.js';
import type { Parameter } from '../parameters.js';
import { keep, Tensor, tensorOf } from '../tensor.js';
import { TrainedParameter } from './parameters.js';

export interface AdamWOptions {
  /** Default [0.9, 0.95]. */
  betas?: readonly [number, number];
  /** Default 1e-8. */
  eps?: number;
  /** Decoupled, on matrices only. Default 0.05. */
  weightDecay?: number;
  /** Largest global gradient norm; 0 disables clipping. Default 1. */
  clipNorm?: number;
  /**
   * Weight of the old value in the moving average of the parameters; 0 disables the average. The first steps use (1 + step) / (10 + step) if that is smaller,
   * so the average forgets the start. Default 0.
   */
  ema?: number;
}

/** Parameters with the same learning rate. */
export interface ParameterGroup {
  parameters: readonly Parameter[];
  lr: number;
}

const DEFAULTS = { betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0.05, clipNorm: 1, ema: 0 } as const;

export class AdamW {
  private readonly options: Required<AdamWOptions>;
  private readonly trained: readonly TrainedParameter[];
  private latest: Tensor[] = [];

  /**
   * Takes over the parameters until {@link finish}; until then their tensors are plain instead of packed.
   * @param dtype the model's type of computation.
   */
  constructor(groups: readonly ParameterGroup[], options: AdamWOptions, dtype: FloatType) {
    this.options = { ...DEFAULTS, ...options };
    const { betas, eps, weightDecay, clipNorm, ema } = this.options;
    for (const { lr } of groups) checkNumber('lr', lr, 0, Infinity);
    checkNumber('betas[0]', betas[0], 0, 1);
    checkNumber('betas[1]', betas[1], 0, 1);
    checkNumber('eps', eps, 0, Infinity);
    checkNumber('weightDecay', weightDecay, 0, Infinity);
    checkNumber('clipNorm', clipNorm, 0, Infinity);
    checkNumber('ema', ema, 0, 1);
    this.trained = groups.flatMap(({ parameters, lr }) =>
      parameters.map((p) => new TrainedParameter(p, { lr, weightDecay: p.matrix ? weightDecay : 0 }, dtype, ema > 0)),
    );
  }

  get averaged(): boolean {
    return this.options.ema > 0;
  }

  /** The tensors that a tape must watch. */
  get tensors(): Tensor[] {
    return this.trained.map((t) => t.parameter.tensor);
  }

  /**
   * Queues a step; call it inside tidy(). Changes nothing if the gradient is not finite.
   * @param gradients of {@link tensors}; parameters without one stay unchanged.
   * @param step counts the steps that changed something, from 1.
   * @param lrScale multiplies every learning rate, for the schedule.
   * @returns the gradient's global norm before clipping, [1].
   */
  step(gradients: ReadonlyMap<Tensor, Tensor>, step: number, lrScale = 1): Tensor {
    for (const g of this.latest) g.dispose();
    this.latest = this.trained.map(({ parameter }) => {
      const gradient = gradients.get(parameter.tensor);
      return gradient ? keep(gradient) : new Tensor(native.constantParameter(parameter.tensor.shape, 0));
    });
    const updates = this.trained.flatMap((t) => {
      const gradient = gradients.get(t.parameter.tensor);
      return gradient ? [t.update(gradient, lrScale)] : [];
    });
    const norm = tensorOf(native.globalNorm(updates.map((u) => u.grad)));
    const { betas, eps, clipNorm, ema } = this.options;
    const old = Math.min(ema, (1 + step) / (10 + step));
    native.adamw(updates, norm.handle, { beta1: betas[0], beta2: betas[1], eps, ema: old, clip: clipNorm, step });
    return norm;
  }

  /** The trained parameters, with the gradients of the last step before clipping. */
  get entries(): readonly { trained: TrainedParameter; gradient: Tensor | undefined }[] {
    return this.trained.map((trained, i) => ({ trained, gradient: this.latest[i] }));
  }

  /** Everything that a step depends on and changes, by name: float32, with the parameters' shapes. */
  state(): Map<string, TensorHandle> {
    return new Map(this.trained.flatMap((t) => t.state()));
  }

  /** Restores {@link state} through `read`. The optimizer owns the tensors returned by `read`. */
  restore(read: (name: string, shape: readonly number[]) => TensorHandle): void {
    for (const t of this.trained) t.restore(read);
  }

  /** Runs `work` while the model has the averaged weights, if there are any. No step may be queued meanwhile. */
  async withAverage<T>(work: () => Promise<T>): Promise<T> {
    for (const t of this.trained) t.useAverage();
    try {
      return await work();
    } finally {
      for (const t of this.trained) t.useCurrent();
    }
  }

  /** Returns the parameters to their model, packed again, with their new or their averaged values. */
  finish({ average }: { average: boolean }): void {
    for (const t of this.trained) t.finish(average);
    this.dispose();
  }

  /** Frees the state of a training that ends without {@link finish}. The model is unusable afterwards. */
  dispose(): void {
    for (const t of [...this.trained, ...this.latest]) t.dispose();
  }
}
