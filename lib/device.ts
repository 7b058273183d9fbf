/** The device that models run on, and its settings. */
import { checkOptions, describe } from './check.js';
import { UniFlowError } from './errors.js';
import { native, type CpuInfo, type FloatType } from './native.js';

export interface DeviceOptions {
  /** `'cpu'` is what this build has. */
  device?: 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;
  /** Storage and products; accumulation is always float32. Default: float32. */
  dtype?: FloatType;
}

/** @returns the dtype to use. */
export function checkDevice(options: DeviceOptions): FloatType {
  checkOptions(options);
  const { device = 'auto', dtype = 'float32' } = options;
  if (typeof device !== 'string' || !/^(auto|cpu|cuda(:\d+)?)$/.test(device))
    throw UniFlowError.expected('BAD_INPUT', 'device', "'auto', 'cpu', 'cuda' or 'cuda:N'", `'${device}'`);
  if (device.startsWith('cuda'))
    throw new UniFlowError('UNSUPPORTED', `device: '${device}' is not available: this build has no CUDA backend; use 'cpu'`, {
      subject: 'device',
    });
  checkFloatType(dtype);
  return dtype;
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

/** The devices of this machine, usable or not. */
export function devices(): DeviceInfo[] {
  const cpu = native.cpuInfo();
  return [{ name: 'cpu', available: true, description: `${cpu.threads} threads, ${cpu.kernels} kernels, ${cpu.linear}` }];
}

/** What the CPU can do and what was chosen for it. */
export function cpuInfo(): CpuInfo {
  return native.cpuInfo();
}

/** Size of the team of threads that computes; the default is the number of cores, or OMP_NUM_THREADS. */
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

/** Native memory by device, and the number of tensor handles that JavaScript holds. */
export function memoryStats(): { host: MemoryStats; devices: Record<string, MemoryStats>; handles: number } {
  const { handles, ...host } = native.memoryStats();
  return { host, devices: {}, handles };
}

export function resetPeakMemory(): void {
  native.resetPeak();
}

/** Returns the pool's memory to the system. */
export function trimMemory(): void {
  native.trimMemory();
}

/** The yardsticks of the benchmarks, measured on this machine with the current threads. */
export async function measurePeak(): Promise<{ bfloat16: number; float32: number; copy: number }> {
  const into = new Float64Array(3);
  await native.measurePeak(into);
  return { bfloat16: into[0] as number, float32: into[1] as number, copy: into[2] as number };
}
