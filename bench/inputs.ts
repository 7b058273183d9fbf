/** Operands of a row, created at random on the device and released afterwards. */
import type { DeviceOptions } from '../lib/device.js';
import { native, type FloatType, type TensorHandle, type WeightType } from '../lib/native.js';
import { deviceInUse } from '../lib/tensor.js';

const SEED = 1;

/** Device options for a row's models. */
export const onBench = (): DeviceOptions => ({ device: deviceInUse() as NonNullable<DeviceOptions['device']> });

export class Inputs {
  private readonly releases: (() => unknown)[] = [];
  private stream = 0;

  /** Activations: truncated normal with standard deviation 1. */
  tensor(shape: readonly number[], dtype: FloatType): TensorHandle {
    return this.keep(native.randomParameter(shape, dtype, false, SEED, this.stream++, 1));
  }

  /** A linear layer's weight, with standard deviation 0.02. */
  weight(outputs: number, inputs: number, dtype: WeightType): TensorHandle {
    return this.keep(native.randomParameter([outputs, inputs], dtype, true, SEED, this.stream++, 0.02));
  }

  /** A bias, scale or table: float32. */
  vector(...shape: number[]): TensorHandle {
    return this.tensor(shape, 'float32');
  }

  pixels(batch: number, height: number, width: number): TensorHandle {
    return this.keep(native.fromHost(noisePixels(batch * height * width), [batch, height, width, 3]));
  }

  keep(handle: TensorHandle): TensorHandle {
    this.onRelease(() => handle.dispose());
    return handle;
  }

  onRelease(release: () => unknown): void {
    this.releases.push(release);
  }

  async release(): Promise<void> {
    for (const release of this.releases.reverse()) await release();
    await native.synchronize();
  }
}

/** RGB noise, the same in every run: the high bits of a multiplicative generator. */
export function noisePixels(pixels: number): Uint8Array {
  const bytes = new Uint8Array(3 * pixels);
  let state = SEED;
  for (let i = 0; i < bytes.length; i++) {
    state = Math.imul(state, 1664525) + 1013904223;
    bytes[i] = state >>> 24;
  }
  return bytes;
}
