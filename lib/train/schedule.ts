/** Schedules of a training: the learning rate, and the random times of each step. */
import { native, type TensorHandle } from '../native.js';

/**
 * Factor of the learning rates at `step` (from 0) of `steps`: rises linearly over the first `warmup` steps, then falls to `floor` along half a cosine.
 */
export function learningRate(step: number, { steps, warmup, floor = 0 }: { steps: number; warmup: number; floor?: number }): number {
  if (step < warmup) return (step + 1) / warmup;
  const done = Math.min(1, (step - warmup) / Math.max(1, steps - warmup));
  return floor + (1 - floor) * 0.5 * (1 + Math.cos(Math.PI * done));
}

/**
 * Uniform on (0, 1], or sigmoid(mean + std n) with n normal (Esser et al. 2024, "Scaling Rectified Flow Transformers"). For a fraction `zero` of the patches
 * the time is 0, the only one used when decoding in one step. Default of `zero`: 0.
 */
export type TimeSampling = 'uniform' | { zero?: number; mean: number; std: number };

/** Draws a time for each patch of each image, [ids.length, patches] float32: a function of (seed, id, patch). */
export function drawTimes(sampling: TimeSampling, seed: number, ids: Uint32Array, patches: number): TensorHandle {
  if (sampling === 'uniform') return native.uniform(seed, ids, patches);
  return native.logitNormal(seed, ids, patches, sampling.mean, sampling.std, sampling.zero ?? 0);
}
