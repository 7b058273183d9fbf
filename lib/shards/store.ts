/** Conversion to and from the stored types: float32, float16 or bfloat16, little-endian. */
import { describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import type { SafetensorsEntry } from '../io/files.js';
import { native } from '../native.js';

/** Storage type of latents and tokens. */
export type StoreType = 'float32' | 'float16' | 'bfloat16';

/** Size and dtype names of each storage type. NumPy has no bfloat16, so its bits are stored as uint16. */
export const STORE: Record<StoreType, { bytes: 2 | 4; safetensors: SafetensorsEntry['dtype']; npy: '<f4' | '<f2' | '<u2' }> = {
  float32: { bytes: 4, safetensors: 'F32', npy: '<f4' },
  float16: { bytes: 2, safetensors: 'F16', npy: '<f2' },
  bfloat16: { bytes: 2, safetensors: 'BF16', npy: '<u2' },
};

export function checkStore(store: unknown): asserts store is StoreType {
  if (!Object.hasOwn(STORE, store as string))
    throw UniFlowError.expected('BAD_INPUT', 'store', Object.keys(STORE).join(', '), describe(store));
}

/** @throws {UniFlowError} `UNSUPPORTED` for values out of float16's range. */
export async function toStored(values: Float32Array, store: StoreType): Promise<Uint8Array> {
  if (store === 'float32') return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const bits = new Uint16Array(values.length);
  await native.store(values, store, bits);
  return new Uint8Array(bits.buffer);
}

export async function fromStored(bytes: Uint8Array, store: StoreType): Promise<Float32Array> {
  const own = new Uint8Array(bytes).buffer; // copied for alignment: a view into another buffer may be unaligned
  if (store === 'float32') return new Float32Array(own);
  const bits = new Uint16Array(own);
  const values = new Float32Array(bits.length);
  await native.restore(bits, store, values);
  return values;
}
