/** The parameters that training moves: float32 masters, what the kernels compute with, and the optimizer's state. */
import type { NdArray } from 'ndarray';
import ndarray from 'ndarray';
import { native, type FloatType, type NativeOptimizedParameter, type TensorHandle } from '../native.js';
import type { Parameter } from '../parameters.js';
import { Tensor } from '../tensor.js';

/** Learning rate and decay of a part of the model. */
export interface Group {
  lr: number;
  weightDecay: number;
}

/**
 * One parameter under training. Its model's tensor is, meanwhile, plain: the float32 master itself, or for a matrix of a
 * bfloat16 model a bfloat16 copy that every step renews.
 */
export class TrainedParameter {
  readonly master: Tensor;
  private readonly m: Tensor;
  private readonly v: Tensor;
  readonly average: Tensor | undefined;
  readonly matrix: boolean;

  constructor(
    readonly parameter: Parameter,
    readonly group: Group,
    private readonly dtype: FloatType,
    averaged: boolean,
  ) {
    const { tensor } = parameter;
    this.matrix = tensor.packed;
    this.master = new Tensor(native.copyParameter(tensor.handle, 'float32'));
    const zeros = (): Tensor => new Tensor(native.constantParameter(tensor.shape, 0));
    [this.m, this.v] = [zeros(), zeros()];
    this.average = averaged ? new Tensor(native.copyParameter(tensor.handle, 'float32')) : undefined;
    tensor.assign(this.copied ? native.copyParameter(tensor.handle, dtype) : this.master.handle.share());
  }

  private get copied(): boolean {
    return this.matrix && this.dtype !== 'float32';
  }

  /** For one AdamW step with this gradient. */
  update(grad: Tensor, lrScale: number): NativeOptimizedParameter {
    return {
      parameter: this.master.handle,
      grad: grad.handle,
      m: this.m.handle,
      v: this.v.handle,
      average: this.average?.handle,
      compute: this.copied ? this.parameter.tensor.handle : undefined,
      lr: this.group.lr * lrScale,
      weightDecay: this.matrix ? this.group.weightDecay : 0,
    };
  }

  /** Gives the model its parameter back, as inference reads it fastest. */
  finish(averaged: boolean): void {
    const value = averaged && this.average ? this.average : this.master;
    const { tensor } = this.parameter;
    tensor.assign(this.matrix ? native.packLinear(value.handle, this.dtype) : native.copyParameter(value.handle, 'float32'));
  }

  dispose(): void {
    for (const t of [this.master, this.m, this.v, this.average]) t?.dispose();
  }
}

/** A value shaped as the whole parameter, cut into the checkpoint's tensors. */
export async function byName(parameter: Parameter, value: TensorHandle): Promise<[string, NdArray][]> {
  const { data } = await new Tensor(value).read();
  let at = 0;
  return parameter.parts.flatMap(({ name, shape, absent }): [string, NdArray][] => {
    const size = shape.reduce((a, b) => a * b, 1);
    const part = (data as Float32Array).subarray(at, (at += size));
    return absent ? [] : [[name, ndarray(part, [...shape])]];
  });
}
