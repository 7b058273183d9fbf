/** Conversion to and from the stored types: float32, float16 or bfloat16, and uint16 for codes; little-endian. */
import { describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import type { SafetensorsEntry } from '../io/files.js';
import { native } from '../native.js';

/** Storage type of latents and tokens. */
export type StoreType = 'float32' | 'float16' | 'bfloat16';

/** Type of an array's elements in files; codes are always uint16. */
export type ElementType = StoreType | 'uint16';

interface Element {
  bytes: 2 | 4;
  safetensors: SafetensorsEntry['dtype'];
  npy: '<f4' | '<f2' | '<u2';
}

/** Size and dtype names of each storage type. NumPy has no bfloat16, so its bits are stored as uint16. */
export const STORE: Record<StoreType, Element> = {
  float32: { bytes: 4, safetensors: 'F32', npy: '<f4' },
  float16: { bytes: 2, safetensors: 'F16', npy: '<f2' },
  bfloat16: { bytes: 2, safetensors: 'BF16', npy: '<u2' },
};

export const ELEMENTS: Record<ElementType, Element> = { ...STORE, uint16: { bytes: 2, safetensors: 'U16', npy: '<u2' } };

export function checkStore(store: unknown): asserts store is StoreType {
  if (!Object.hasOwn(STORE, store as string))
    throw UniFlowError.expected('BAD_INPUT', 'store', Object.keys(STORE).join(', '), describe(store));
}

/** @throws {UniFlowError} `UNSUPPORTED` for values out of float16's range. */
export async function toStored(values: Float32Array | Uint16Array, type: ElementType): Promise<Uint8Array> {
  if (type === 'float32' || type === 'uint16') return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const bits = new Uint16Array(values.length);
  await native.store(values as Float32Array, type, bits);
  return new Uint8Array(bits.buffer);
}

export async function fromStored(bytes: Uint8Array, type: StoreType): Promise<Float32Array>;
export async function fromStored(bytes: Uint8Array, type: ElementType): Promise<Float32Array | Uint16Array>;
export async function fromStored(bytes: Uint8Array, type: ElementType): Promise<Float32Array | Uint16Array> {
  const own = new Uint8Array(bytes).buffer; // copied for alignment: a view into another buffer may be unaligned
  if (type === 'float32') return new Float32Array(own);
  const bits = new Uint16Array(own);
  if (type === 'uint16') return bits;
  const values = new Float32Array(bits.length);
  await native.restore(bits, type, values);
  return values;
}
