/** The device that models run on, and its settings. */
import { checkOptions, describe } from './check.js';
import { UniFlowError } from './errors.js';
import { native, type CpuInfo, type FloatType } from './native.js';
import { onDevice } from './tensor.js';

export interface DeviceOptions {
  /** `'auto'` (the default) uses the first GPU that works, else the CPU; {@link devices} gives the reason. */
  device?: 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;
  /**
   * Type of storage and products; accumulation is always float32. Default: float32. `'int8'`, for inference on the CPU: the large layers multiply int8
   * weights with activations quantised row by row; all else is bfloat16 if the CPU multiplies it, otherwise float32.
   */
  dtype?: ModelType;
  /** Stores and multiplies the weights of the encoder's blocks in e4m3: faster, less exact. Inference in bfloat16 on GPUs from sm_89. */
  float8?: boolean;
}

/** Types that a model is loaded in. */
export type ModelType = FloatType | 'int8';

/** Device and number types of a model. */
export interface Placement {
  device: string;
  /** Dtype of the activations, and of the weights that are not in 8 bits. */
  dtype: FloatType;
  float8: boolean;
  int8: boolean;
}

/** @internal */
export const onCpu = (dtype: FloatType): Placement => ({ device: 'cpu', dtype, float8: false, int8: false });

/** @throws UniFlowError `UNSUPPORTED` with the reasons if the device is not available. */
export function checkDevice(options: DeviceOptions): Placement {
  checkOptions(options);
  const { device = 'auto', dtype = 'float32', float8 = false } = options;
  if (typeof device !== 'string' || !/^(auto|cpu|cuda(:\d+)?)$/.test(device))
    throw UniFlowError.expected('BAD_INPUT', 'device', "'auto', 'cpu', 'cuda' or 'cuda:N'", `'${device}'`);
  if (dtype !== 'int8') checkFloatType(dtype, "'float32', 'bfloat16' or 'int8'");
  if (typeof float8 !== 'boolean') throw UniFlowError.expected('BAD_INPUT', 'float8', 'true or false', describe(float8));
  if (float8 && dtype !== 'bfloat16') throw UniFlowError.expected('BAD_INPUT', 'dtype', "'bfloat16', with float8 weights", `'${dtype}'`);
  if (dtype === 'int8') return placeInt8(device);
  const chosen = device === 'auto' ? firstDevice() : native.openDevice(device);
  if (float8 && chosen === 'cpu') throw UniFlowError.expected('UNSUPPORTED', 'float8', 'a GPU', `device '${chosen}'`);
  return { device: chosen, dtype, float8, int8: false };
}

function placeInt8(device: string): Placement {
  if (device === 'auto' || device === 'cpu') return { ...onCpu(native.cpuInfo().nativeBfloat16 ? 'bfloat16' : 'float32'), int8: true };
  throw UniFlowError.expected('UNSUPPORTED', 'dtype', `'bfloat16' on a GPU, with float8: true for 8 bits`, "'int8', which is for the CPU");
}

/** Refuses int8 for random weights: they are for training, and an int8 weight has no gradient. */
export function refuseInt8({ int8 }: Placement): void {
  if (int8)
    throw UniFlowError.expected('UNSUPPORTED', 'dtype', "'float32' or 'bfloat16' for random weights; quantize() makes them int8", "'int8'");
}

function firstDevice(): string {
  for (const { name, available } of native.devices().filter(({ name }) => name !== 'cpu')) {
    try {
      if (available) return native.openDevice(name);
    } catch {
      // try the next one; devices() lists them all
    }
  }
  return 'cpu';
}

export function checkFloatType(dtype: unknown, expected = "'float32' or 'bfloat16'"): asserts dtype is FloatType {
  if (dtype !== 'float32' && dtype !== 'bfloat16') throw UniFlowError.expected('BAD_INPUT', 'dtype', expected, describe(dtype));
}

export interface DeviceInfo {
  name: string;
  available: boolean;
  description: string;
}

/** The devices of this machine; without a GPU, the reason. */
export function devices(): DeviceInfo[] {
  const { threads } = native.cpuInfo();
  return native.devices().map((d) => (d.name === 'cpu' ? { ...d, description: `${threads} threads, ${d.description}` } : d));
}

/** Abilities of the CPU, and the kernels chosen for it. */
export function cpuInfo(): CpuInfo {
  return native.cpuInfo();
}

/** Sets the size of the compute team. Default: UNIFLOW_THREADS, else OMP_NUM_THREADS, else the number of cores available to the process. */
export function setThreads(threads: number): void {
  native.setThreads(threads);
}

export interface MemoryStats {
  /** Bytes in live tensors, weights included. */
  active: number;
  /** Highest `active` since the start or {@link resetPeakMemory}. */
  peak: number;
  /** Freed bytes kept for reuse. */
  pool: number;
}

/** Native memory of each device used so far, and the number of tensor handles held by JavaScript. */
export function memoryStats(): { host: MemoryStats; devices: Record<string, MemoryStats>; handles: number } {
  const { handles, devices } = native.memoryStats();
  const { cpu, ...others } = devices;
  return { host: cpu as MemoryStats, devices: others, handles };
}

export function resetPeakMemory(): void {
  native.resetPeak();
}

/** Returns the pool's memory to the system. */
export function trimMemory(): void {
  native.trimMemory();
}

/**
 * The benchmarks' upper bounds, on the CPU with the current threads: FLOP/s of the fastest product, operations per second of int8 (0 on a GPU), and bytes
 * copied (read + written) per second.
 */
export async function measurePeak(device = 'cpu'): Promise<{ bfloat16: number; float32: number; int8: number; copy: number }> {
  const into = new Float64Array(4);
  await onDevice(device, () => native.measurePeak(into));
  return { bfloat16: into[0] as number, float32: into[1] as number, int8: into[3] as number, copy: into[2] as number };
}
