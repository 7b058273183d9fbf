/** Numbers as files hold them: float32, float16 or bfloat16, little-endian. */
import ndarray from 'ndarray';
import { describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import { valueBytes } from '../io/checkpoint.js';
import type { SafetensorsEntry } from '../io/files.js';
import { Tensor } from '../tensor.js';

/** How latents and tokens are stored. */
export type StoreType = 'float32' | 'float16' | 'bfloat16';

/** Bytes of an element, and what the formats call it. NumPy has no bfloat16: there, its bits are uint16. */
export const STORE: Record<StoreType, { bytes: 2 | 4; safetensors: SafetensorsEntry['dtype']; npy: '<f4' | '<f2' | '<u2' }> = {
  float32: { bytes: 4, safetensors: 'F32', npy: '<f4' },
  float16: { bytes: 2, safetensors: 'F16', npy: '<f2' },
  bfloat16: { bytes: 2, safetensors: 'BF16', npy: '<u2' },
};

export function checkStore(store: unknown): asserts store is StoreType {
  if (!Object.hasOwn(STORE, store as string))
    throw UniFlowError.expected('BAD_INPUT', 'store', Object.keys(STORE).join(', '), describe(store));
}

/** @throws {UniFlowError} `UNSUPPORTED` for numbers that float16 cannot hold. */
export async function toStored(values: Float32Array, store: StoreType): Promise<Uint8Array> {
  if (store === 'float32') return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  if (store === 'float16') return halves(values);
  const tensor = Tensor.from({ data: values, shape: [values.length] });
  try {
    return await valueBytes(tensor.handle, 'bfloat16');
  } finally {
    tensor.dispose();
  }
}

export async function fromStored(bytes: Uint8Array, store: StoreType): Promise<Float32Array> {
  const own = new Uint8Array(bytes).buffer; // aligned, which a part of another buffer may not be
  if (store === 'float32') return new Float32Array(own);
  const bits = new Uint16Array(own);
  if (store === 'float16') return wholes(bits);
  const tensor = Tensor.from(ndarray(bits, [bits.length]));
  try {
    return (await tensor.read()).data as Float32Array;
  } finally {
    tensor.dispose();
  }
}

const SMALLEST_NORMAL = 0x38800000; // 2^-14
const TOO_LARGE = 0x477ff000; // 65520 is the first number that rounds to infinity

/**
 * Rounded to nearest, halves to even. A loop in JavaScript, for there is no such operation natively: a few ns an element, which is nothing
 * beside what it takes to compute one.
 */
function halves(values: Float32Array): Uint8Array {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  const out = new Uint16Array(values.length);
  const shifted = new Float32Array(1);
  const shiftedBits = new Uint32Array(shifted.buffer);
  for (let i = 0; i < out.length; i++) {
    const x = bits[i] as number;
    const magnitude = x & 0x7fffffff;
    let half: number;
    if (magnitude >= TOO_LARGE) {
      throw UniFlowError.expected(
        'UNSUPPORTED',
        'store',
        'numbers below 65520 for float16 (bfloat16 holds larger ones)',
        String(values[i]),
      );
    } else if (magnitude < SMALLEST_NORMAL) {
      // Added to 0.5, the last bit counts 2^-24, as in a subnormal half: the addition rounds.
      shifted[0] = Math.abs(values[i] as number) + 0.5;
      half = (shiftedBits[0] as number) - 0x3f000000;
    } else {
      half = (magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13;
    }
    out[i] = ((x >>> 16) & 0x8000) | half;
  }
  return new Uint8Array(out.buffer);
}

function wholes(halves: Uint16Array): Float32Array {
  const out = new Float32Array(halves.length);
  const bits = new Uint32Array(out.buffer);
  for (let i = 0; i < out.length; i++) {
    const half = halves[i] as number;
    const magnitude = half & 0x7fff;
    if (magnitude < 0x400) out[i] = (half & 0x8000 ? -magnitude : magnitude) * 2 ** -24;
    else bits[i] = ((half & 0x8000) << 16) | ((magnitude << 13) + 0x38000000);
  }
  return out;
}
