/** ONNX Runtime's CPU provider: several equivalent graphs, of which the fastest counts. */
import { cpuInfo } from '../../lib/device.js';
import { time, type Effort, type Work } from '../harness.js';
import type { Measured } from './compare.js';
import { onnxModel, type FloatArray, type Graph } from './onnx.js';

/** The parts of onnxruntime-node used here. Its own types exist only after installing it. */
export interface OnnxRuntime {
  Tensor: new (type: 'float32', data: Float32Array, shape: readonly number[]) => unknown;
  InferenceSession: { create(model: Uint8Array, options: object): Promise<Session> };
}
interface Session {
  run(feeds: Record<string, unknown>): Promise<Record<string, { data: Float32Array }>>;
  release(): Promise<void>;
}

/** Default options, except for the number of threads, which equals ours. */
export const sessionOptions = (): object => ({
  executionProviders: ['cpu'],
  graphOptimizationLevel: 'all',
  intraOpNumThreads: cpuInfo().threads,
  interOpNumThreads: 1,
});

/**
 * Time of the fastest graph; all have one output and the same inputs. Also returns the largest difference of any output from `expected`.
 */
export async function timeGraphs(
  runtime: OnnxRuntime,
  graphs: Iterable<Graph>,
  feeds: Record<string, FloatArray>,
  effort: Effort,
  expected: Float32Array,
): Promise<Omit<Measured, 'oursMs'>> {
  const best = { theirsMs: Infinity, difference: 0 };
  for (const graph of graphs) {
    const { ms, difference } = await timeGraph(runtime, graph, feeds, effort, expected);
    best.theirsMs = Math.min(best.theirsMs, ms);
    best.difference = Math.max(best.difference, difference);
  }
  return best;
}

async function timeGraph(
  runtime: OnnxRuntime,
  graph: Graph,
  feeds: Record<string, FloatArray>,
  effort: Effort,
  expected: Float32Array,
): Promise<{ ms: number; difference: number }> {
  const session = await runtime.InferenceSession.create(onnxModel(graph), sessionOptions());
  try {
    const tensors = Object.fromEntries(
      Object.entries(feeds).map(([name, { data, shape }]) => [name, new runtime.Tensor('float32', data, shape)]),
    );
    const [out] = Object.values(await session.run(tensors));
    const work: Work = () => session.run(tensors);
    return { ms: (await time(work, effort)).latency.p50, difference: relativeL2(expected, out!.data) };
  } finally {
    await session.release();
  }
}

export function relativeL2(actual: Float32Array, expected: Float32Array): number {
  if (actual.length !== expected.length) return Infinity;
  let [difference, norm] = [0, 0];
  for (const [i, value] of expected.entries()) {
    difference += ((actual[i] as number) - value) ** 2;
    norm += value ** 2;
  }
  return Math.sqrt(difference / norm);
}
