/** Times rows with tinybench and relates them to their roofline bounds. */
import { Bench, type Statistics } from 'tinybench';
import type { measurePeak } from '../lib/device.js';
import { native, type FloatType, type TensorHandle } from '../lib/native.js';
import type { Cost } from './costs.js';
import { Inputs } from './inputs.js';

export type Peaks = Awaited<ReturnType<typeof measurePeak>>;

/** One call of the measured work. A handle is awaited and disposed of; a promise is awaited. */
export type Work = () => TensorHandle | Promise<unknown>;

/** Additional figures: name with unit → value. */
export type Figures = Record<string, number>;

export interface Row {
  family: string;
  name: string;
  shape: string;
  /** Dtype of the arithmetic; uint8 rows compute in float32 if they count FLOPs. */
  dtype: FloatType | 'uint8' | 'int8';
  cost: Cost;
  /** Images per call, for rows with a meaningful image rate. */
  images?: number;
  setup(inputs: Inputs): Work | Promise<Work>;
  /** Starts observing the measured calls; the returned function stops it. */
  watch?: () => () => Figures | Promise<Figures>;
}

export interface Result {
  family: string;
  name: string;
  shape: string;
  dtype: Row['dtype'];
  flops?: number;
  bytes?: number;
  bound: 'compute' | 'memory';
  floorMs: number;
  minMs: number;
  medianMs: number;
  p99Ms: number;
  /** floorMs / medianMs; above 1 if operands stayed in the caches. */
  ofFloor: number;
  /** FLOP/s if compute-bound, bytes/s if memory-bound. */
  rate: number;
  samples: number;
  /** Short calls are timed in groups; a sample is their mean. */
  callsPerSample: number;
  figures: Figures;
}

/** A row that cannot run here, with the reason. */
export interface Failure extends Pick<Row, 'family' | 'name' | 'shape' | 'dtype'> {
  failed: string;
}

/** Minimum duration and number of samples of a measurement. */
export interface Effort {
  warmupMs: number;
  measureMs: number;
  samples: number;
}
export const THOROUGH: Effort = { warmupMs: 200, measureMs: 1000, samples: 5 };
export const QUICK: Effort = { warmupMs: 20, measureMs: 100, samples: 3 };

/** A shorter sample would include the overhead of the queue. */
const MIN_SAMPLE_MS = 2;
const MAX_CALLS_PER_SAMPLE = 64;

/** {@link measureRow}, but returns a failure for rows that cannot run. */
export async function tryRow(row: Row, effort: Effort, peaks: Peaks): Promise<Result | Failure> {
  try {
    return await measureRow(row, effort, peaks);
  } catch (error) {
    const { family, name, shape, dtype } = row;
    return { family, name, shape, dtype, failed: (error as Error).message };
  }
}

export async function measureRow(row: Row, effort: Effort, peaks: Peaks): Promise<Result> {
  const inputs = new Inputs();
  try {
    const work = await row.setup(inputs);
    await native.synchronize();
    const timing = await time(work, effort, row.watch);
    return resultOf(row, timing, peaks);
  } finally {
    await inputs.release();
  }
}

export interface Timing {
  latency: Statistics;
  callsPerSample: number;
  figures: Figures;
}

export async function time(work: Work, effort: Effort, watch?: Row['watch']): Promise<Timing> {
  const estimate = await warmUp(work, effort.warmupMs);
  const callsPerSample = Math.min(MAX_CALLS_PER_SAMPLE, Math.max(1, Math.ceil(MIN_SAMPLE_MS / estimate)));
  const watched = watch?.();
  const latency = await sample(work, callsPerSample, effort);
  return { latency, callsPerSample, figures: (await watched?.()) ?? {} };
}

/** Calls the work at least once. @returns the fastest time per call. */
async function warmUp(work: Work, milliseconds: number): Promise<number> {
  const end = performance.now() + milliseconds;
  let fastest = Infinity;
  do fastest = Math.min(fastest, await timeCalls(work, 1));
  while (performance.now() < end);
  return fastest;
}

async function sample(work: Work, calls: number, { measureMs, samples }: Effort): Promise<Statistics> {
  const bench = new Bench({ time: measureMs, iterations: samples, warmup: false, throws: true });
  const iteration = async (): Promise<{ overriddenDuration: number; overriddenIterationCost: number }> => {
    const mean = await timeCalls(work, calls);
    return { overriddenDuration: mean, overriddenIterationCost: mean * calls };
  };
  const [task] = await bench.add('row', iteration, { async: true }).run();
  if (task?.result.state !== 'completed') throw new Error(`The benchmark ended as '${String(task?.result.state)}'`);
  return task.result.latency;
}

/** Milliseconds per call, from queueing the first until the last has finished; rejects if one fails. */
async function timeCalls(work: Work, calls: number): Promise<number> {
  const handles: TensorHandle[] = [];
  const begin = performance.now();
  for (let i = 0; i < calls; i++) {
    const started = work();
    if (started instanceof Promise) await started;
    else handles.push(started);
  }
  if (handles.length > 0) await native.synchronize(handles);
  const taken = performance.now() - begin;
  for (const handle of handles) handle.dispose();
  return taken / calls;
}

function resultOf({ family, name, shape, dtype, cost, images }: Row, { latency, callsPerSample, figures }: Timing, peaks: Peaks): Result {
  const computeMs = (1000 * (cost.flops ?? 0)) / peaks[dtype === 'uint8' ? 'float32' : dtype];
  const memoryMs = (1000 * (cost.bytes ?? 0)) / peaks.copy;
  const bound = computeMs >= memoryMs ? 'compute' : 'memory';
  const floorMs = Math.max(computeMs, memoryMs);
  const medianMs = latency.p50;
  return {
    ...{ family, name, shape, dtype, ...cost, bound, floorMs, medianMs },
    minMs: latency.min,
    p99Ms: latency.p99,
    ofFloor: floorMs / medianMs,
    rate: ((bound === 'compute' ? cost.flops : cost.bytes) as number) / (medianMs / 1000),
    samples: latency.samplesCount,
    callsPerSample,
    figures: { ...(images ? { 'images/s': (1000 * images) / medianMs } : {}), ...figures },
  };
}
