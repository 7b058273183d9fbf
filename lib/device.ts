/** The device that models run on, and its settings. */
import { checkOptions, describe } from './check.js';
import { UniFlowError } from './errors.js';
import { native, type CpuInfo, type FloatType } from './native.js';
import { onDevice } from './tensor.js';

export interface DeviceOptions {
  /** `'auto'` (the default) is the first GPU that works, else the CPU; {@link devices} says why. */
  device?: 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;
  /** Storage and products; accumulation is always float32. Default: float32. */
  dtype?: FloatType;
  /** Stores the weights of the encoder's blocks as e4m3 and multiplies them in it: faster, less exact. Inference in bfloat16 on GPUs from sm_89. */
  float8?: boolean;
}

/** Where a model is and what it computes with. */
export interface Placement {
  device: string;
  dtype: FloatType;
  float8: boolean;
}

/** @internal */
export const onCpu = (dtype: FloatType): Placement => ({ device: 'cpu', dtype, float8: false });

/** @throws UniFlowError `UNSUPPORTED` with the reasons where the device is not there. */
export function checkDevice(options: DeviceOptions): Placement {
  checkOptions(options);
  const { device = 'auto', dtype = 'float32', float8 = false } = options;
  if (typeof device !== 'string' || !/^(auto|cpu|cuda(:\d+)?)$/.test(device))
    throw UniFlowError.expected('BAD_INPUT', 'device', "'auto', 'cpu', 'cuda' or 'cuda:N'", `'${device}'`);
  checkFloatType(dtype);
  if (typeof float8 !== 'boolean') throw UniFlowError.expected('BAD_INPUT', 'float8', 'true or false', describe(float8));
  if (float8 && dtype !== 'bfloat16') throw UniFlowError.expected('BAD_INPUT', 'dtype', "'bfloat16', with float8 weights", `'${dtype}'`);
  const chosen = device === 'auto' ? firstDevice() : native.openDevice(device);
  if (float8 && chosen === 'cpu') throw UniFlowError.expected('UNSUPPORTED', 'float8', 'a GPU', `device '${chosen}'`);
  return { device: chosen, dtype, float8 };
}

function firstDevice(): string {
  for (const { name, available } of native.devices().filter(({ name }) => name !== 'cpu')) {
    try {
      if (available) return native.openDevice(name);
    } catch {
      // the next one; devices() says what is there
    }
  }
  return 'cpu';
}

export function checkFloatType(dtype: unknown): void {
  if (dtype !== 'float32' && dtype !== 'bfloat16')
    throw UniFlowError.expected('BAD_INPUT', 'dtype', "'float32' or 'bfloat16'", describe(dtype));
}

export interface DeviceInfo {
  name: string;
  available: boolean;
  description: string;
}

/** The devices of this machine; where there is no GPU, why. */
export function devices(): DeviceInfo[] {
  const { threads } = native.cpuInfo();
  return native.devices().map((d) => (d.name === 'cpu' ? { ...d, description: `${threads} threads, ${d.description}` } : d));
}

/** What the CPU can do and what was chosen for it. */
export function cpuInfo(): CpuInfo {
  return native.cpuInfo();
}

/** Size of the team of threads that computes; the default is the number of cores that the process may use; UNIFLOW_THREADS, or else OMP_NUM_THREADS, sets another. */
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

/** Native memory by device, of those that were used, and the number of tensor handles that JavaScript holds. */
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

/** The yardsticks of the benchmarks: FLOP/s of the best product and bytes copied (read + written) a second, on the CPU with the current threads. */
export async function measurePeak(device = 'cpu'): Promise<{ bfloat16: number; float32: number; copy: number }> {
  const into = new Float64Array(3);
  await onDevice(device, () => native.measurePeak(into));
  return { bfloat16: into[0] as number, float32: into[1] as number, copy: into[2] as number };
}
