/** What the paper claims, and whether the numbers say so. */
import type { Plan } from './plan.js';
import type { Quality, Results, RunResult } from './reproduce.js';

export interface Claim {
  text: string;
  seen: boolean;
  /** The numbers that decided. */
  because: string;
}

export interface Statistic {
  mean: number;
  /** Standard deviation over the seeds, divisor N − 1; 0 of one seed. */
  std: number;
}

export function statistic(values: readonly number[]): Statistic {
  const mean = values.reduce((sum, v) => sum + v, 0) / values.length;
  const squares = values.reduce((sum, v) => sum + (v - mean) ** 2, 0);
  return { mean, std: values.length > 1 ? Math.sqrt(squares / (values.length - 1)) : 0 };
}

/** Runs of a regime with the usual number of global blocks, in the order of their seeds. */
export function runsOf(results: Results, plan: Plan, regime: RunResult['regime']): RunResult[] {
  return results.runs.filter((run) => run.regime === regime && run.globalBlocks === plan.globalBlocks);
}

/** Accuracy of a linear probe on the untouched teacher's tokens: what the students' probes are compared with. */
export function teacherProbe({ runs }: Results): number {
  return runs.find((run) => run.understanding)?.understanding?.teacher ?? NaN;
}

export const tokensOf = (run: RunResult): number => run.understanding?.tokens ?? NaN;

/** Points of accuracy that may be lost, dB that may be missing. */
const POINTS = 0.01;
const DECIBELS = 1;
/** One step is enough where more of them gain less than this. */
const STEP_DECIBELS = 0.5;
/** Seams are gone where no more than this share of what is visible without global blocks is left. */
const SEAMS_LEFT = 0.5;

export function claimsOf(results: Results, plan: Plan): Claim[] {
  return [
    keepsAccuracy(results, plan),
    nearFineTuning(results, plan),
    beatsUniform(results, plan),
    noSeams(results, plan),
    oneStep(results, plan),
  ];
}

function keepsAccuracy(results: Results, plan: Plan): Claim {
  const [own, teacher] = [statistic(runsOf(results, plan, 'adaptive').map(tokensOf)).mean, teacherProbe(results)];
  return {
    text: "Adaptive distillation keeps the teacher's accuracy (linear probe, within 1 point).",
    seen: own >= teacher - POINTS,
    because: `${points(own)} after, ${points(teacher)} before`,
  };
}

function nearFineTuning(results: Results, plan: Plan): Claim {
  const psnr = (regime: RunResult['regime']): number => statistic(runsOf(results, plan, regime).map((run) => run.psnr)).mean;
  const [own, free, frozen] = [psnr('adaptive'), psnr('finetune'), psnr('frozen')];
  return {
    text: 'Its PSNR comes near that of unconstrained fine-tuning (within 1 dB).',
    seen: own >= free - DECIBELS,
    because: `${own.toFixed(2)} dB against ${free.toFixed(2)} dB; a frozen encoder reaches ${frozen.toFixed(2)} dB`,
  };
}

/** In pairs of the same seed: not worse in either on average, and better in one by more than the standard error. */
function beatsUniform(results: Results, plan: Plan): Claim {
  const [own, other] = [runsOf(results, plan, 'adaptive'), runsOf(results, plan, 'uniform')];
  const differences = (of: (run: RunResult) => number): Statistic => statistic(own.map((run, i) => of(run) - of(other[i] as RunResult)));
  const [accuracy, psnr] = [differences(tokensOf), differences((run) => run.psnr)];
  const better = ({ mean, std }: Statistic): boolean => mean > std / Math.sqrt(own.length);
  return {
    text: 'It beats uniform distillation on the trade-off (not worse in accuracy or PSNR, and better in one by more than the standard error).',
    seen: accuracy.mean >= 0 && psnr.mean >= 0 && (better(accuracy) || better(psnr)),
    because: `accuracy ${signed(100 * accuracy.mean)} ± ${(100 * accuracy.std).toFixed(2)} points, PSNR ${signed(psnr.mean)} ± ${psnr.std.toFixed(2)} dB (mean and deviation of the paired differences)`,
  };
}

function noSeams(results: Results, plan: Plan): Claim {
  const [none = NaN, ...some] = plan.seamBlocks.map((blocks) => seamsOf(results, blocks).mean);
  return {
    text: `Global blocks remove the grid seams (at most half of what K = 0 has above 1 is left, for every K > 0).`,
    seen: none > 1 && some.every((ratio) => Math.abs(ratio - 1) <= SEAMS_LEFT * (none - 1)),
    because: plan.seamBlocks.map((blocks) => `K = ${blocks}: ${seamsOf(results, blocks).mean.toFixed(3)}`).join(', '),
  };
}

/** Over the seeds. */
export function seamsOf({ runs }: Results, globalBlocks: number): Statistic {
  return statistic(runs.filter((run) => run.regime === 'adaptive' && run.globalBlocks === globalBlocks).map((run) => run.seams));
}

function oneStep(results: Results, plan: Plan): Claim {
  const psnr = plan.samplingSteps.map((steps) => samplingOf(results, plan, steps, 'psnr').mean);
  const [one = NaN] = psnr;
  return {
    text: 'One sampling step is enough (PSNR within 0.5 dB of the best number of steps).',
    seen: one >= Math.max(...psnr) - STEP_DECIBELS,
    because: plan.samplingSteps.map((steps, i) => `${steps}: ${(psnr[i] as number).toFixed(2)} dB`).join(', '),
  };
}

/** Of the adaptive runs with so many Euler steps. */
export function samplingOf(results: Results, plan: Plan, steps: number, of: keyof Quality): Statistic {
  return statistic(runsOf(results, plan, 'adaptive').map((run) => run.sampling?.[steps]?.[of] ?? NaN));
}

const points = (share: number): string => `${(100 * share).toFixed(2)} %`;
const signed = (value: number): string => `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(2)}`;
