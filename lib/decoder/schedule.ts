/** Time grids for the Euler integration. */
import { UniFlowError } from '../errors.js';

/** linear: t_k = k/steps. pow_p: 1 - t_k = ((steps-k)/steps)^(1/p). */
export type Schedule = 'linear' | `pow_${number}`;

/** Start times t_0 = 0 < t_1 < … and step lengths, which sum to 1. */
export function timeGrid(steps: number, schedule: Schedule = 'linear'): { time: Float32Array; step: Float32Array } {
  if (!Number.isInteger(steps) || steps < 1 || steps > 10_000)
    throw UniFlowError.expected('BAD_INPUT', 'steps', 'an integer from 1 to 10000', String(steps));
  const power = schedule === 'linear' ? 1 : Number(/^pow_(\d+(?:\.\d+)?|\.\d+)$/.exec(String(schedule))?.[1]);
  if (!(power > 1e-3 && power < 1e3))
    throw UniFlowError.expected('BAD_INPUT', 'schedule', "'linear' or 'pow_P' with P from 0.001 to 1000", `'${String(schedule)}'`);
  const t = Array.from({ length: steps + 1 }, (_, k) => 1 - ((steps - k) / steps) ** (1 / power));
  return {
    time: Float32Array.from(t.slice(0, -1)),
    step: Float32Array.from(t.slice(1), (next, k) => next - (t[k] as number)),
  };
}
