/** Times rows with tinybench and relates them to their floors. */
import { Bench, type Statistics } from 'tinybench';
import type { measurePeak } from '../lib/device.js';
import { native, type FloatType, type TensorHandle } from '../lib/native.js';
import type { Cost } from './costs.js';
import { Inputs } from './inputs.js';

export type Peaks = Awaited<ReturnType<typeof measurePeak>>;

/** One call of what is measured. A handle is waited for and disposed of; a promise is awaited. */
export type Work = () => TensorHandle | Promise<unknown>;

/** Figures beside the time: name with unit → value. */
export type Figures = Record<string, number>;

export interface Row {
  family: string;
  name: string;
  shape: string;
  /** Of the arithmetic; uint8 rows compute in float32 where they count FLOPs. */
  dtype: FloatType | 'uint8';
  cost: Cost;
  /** Pictures per call, where a rate of pictures says something. */
  images?: number;
  setup(inputs: Inputs): Work | Promise<Work>;
  /** Begins to observe the measured calls; what it returns ends that. */
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
  /** floorMs / medianMs; above 1 where operands stayed in the caches. */
  ofFloor: number;
  /** FLOP/s where compute is the bound, bytes/s where memory is. */
  rate: number;
  samples: number;
  /** Short calls are timed several at a time; a sample is their mean. */
  callsPerSample: number;
  figures: Figures;
}

/** A row that cannot run here, and why. */
export interface Failure extends Pick<Row, 'family' | 'name' | 'shape' | 'dtype'> {
  failed: string;
}

/** How long to measure: at least so many milliseconds, and so many samples. */
export interface Effort {
  warmupMs: number;
  measureMs: number;
  samples: number;
}
export const THOROUGH: Effort = { warmupMs: 200, measureMs: 1000, samples: 5 };
export const QUICK: Effort = { warmupMs: 20, measureMs: 100, samples: 3 };

/** A sample shorter than this would measure the way through the queue as well. */
const MIN_SAMPLE_MS = 2;
const MAX_CALLS_PER_SAMPLE = 64;

/** {@link measureRow}, where a row that cannot run is a result like another. */
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

/** Calls at least once, and says how long a call takes when all is warm. */
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

/** Milliseconds per call, from queueing the first until the last has run; rejects where one failed. */
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
