/** A trained parameter: its float32 master, the tensor used by the kernels, and the optimizer's state. */
import type { NdArray } from 'ndarray';
import ndarray from 'ndarray';
import { native, type FloatType, type NativeOptimizedParameter, type TensorHandle } from '../native.js';
import { assignParameter, type Parameter, type Part } from '../parameters.js';
import { Tensor } from '../tensor.js';

/** Learning rate and decay of a parameter. */
export interface Rates {
  lr: number;
  weightDecay: number;
}

/**
 * One parameter under training. Meanwhile the model's tensor is plain: the float32 master itself or, for a matrix of a bfloat16 model, a bfloat16 copy
 * updated by every step.
 */
export class TrainedParameter {
  readonly master: Tensor;
  private readonly m: Tensor;
  private readonly v: Tensor;
  private readonly average: Tensor | undefined;

  constructor(
    readonly parameter: Parameter,
    private readonly rates: Rates,
    private readonly dtype: FloatType,
    averaged: boolean,
  ) {
    const { tensor } = parameter;
    this.master = new Tensor(native.copyParameter(tensor.handle, 'float32'));
    const zeros = (): Tensor => new Tensor(native.constantParameter(tensor.shape, 0));
    [this.m, this.v] = [zeros(), zeros()];
    this.average = averaged ? new Tensor(native.copyParameter(tensor.handle, 'float32')) : undefined;
    this.useCurrent();
  }

  /** Whether the model computes with a copy in another dtype. */
  private get copied(): boolean {
    return this.parameter.matrix && this.dtype !== 'float32';
  }

  private use(value: Tensor): void {
    this.parameter.tensor.assign(this.copied ? native.copyParameter(value.handle, this.dtype) : value.handle.share());
  }

  useCurrent(): void {
    this.use(this.master);
  }

  useAverage(): void {
    if (this.average) this.use(this.average);
  }

  /** The arguments of one AdamW step with this gradient. */
  update(grad: Tensor, lrScale: number): NativeOptimizedParameter {
    return {
      parameter: this.master.handle,
      grad: grad.handle,
      m: this.m.handle,
      v: this.v.handle,
      average: this.average?.handle,
      compute: this.copied ? this.parameter.tensor.handle : undefined,
      lr: this.rates.lr * lrScale,
      weightDecay: this.rates.weightDecay,
    };
  }

  /** Checkpoint names of the tensors changed by a step: the name of the parameter's first part, and the kind of state. */
  private get stateTensors(): [string, Tensor][] {
    const { name } = this.parameter.parts[0] as Part;
    const all = { master: this.master, m: this.m, v: this.v, average: this.average };
    return Object.entries(all).flatMap(([kind, tensor]) => (tensor ? [[`${name}.${kind}`, tensor]] : []));
  }

  state(): [string, TensorHandle][] {
    return this.stateTensors.map(([name, tensor]) => [name, tensor.handle]);
  }

  restore(read: (name: string, shape: readonly number[]) => TensorHandle): void {
    for (const [name, tensor] of this.stateTensors) tensor.assign(read(name, tensor.shape));
    this.useCurrent();
  }

  /** Returns the parameter to the model, in the layout for fast inference. */
  finish(averaged: boolean): void {
    const value = averaged && this.average ? this.average : this.master;
    assignParameter(this.parameter, value.handle, this.dtype);
  }

  dispose(): void {
    for (const t of [this.master, this.m, this.v, this.average]) t?.dispose();
  }
}

/** Makes a matrix plain that does not change: gradients do not go through packed ones. */
export function unpack({ tensor, matrix }: Parameter, dtype: FloatType): void {
  if (matrix) tensor.assign(native.copyParameter(tensor.handle, dtype));
}

/** Undoes {@link unpack}, to the bit. */
export function pack(parameter: Parameter, dtype: FloatType): void {
  if (!parameter.matrix) return;
  const value = native.copyParameter(parameter.tensor.handle, 'float32');
  assignParameter(parameter, value, dtype);
  value.dispose();
}

/** Splits a value with the shape of the whole parameter into the checkpoint's tensors. */
export async function byName(parameter: Parameter, value: TensorHandle): Promise<[string, NdArray][]> {
  const { data } = await new Tensor(value).read();
  let at = 0;
  return parameter.parts.flatMap(({ name, shape, absent }): [string, NdArray][] => {
    const size = shape.reduce((a, b) => a * b, 1);
    const part = (data as Float32Array).subarray(at, (at += size));
    return absent ? [] : [[name, ndarray(part, [...shape])]];
  });
}
