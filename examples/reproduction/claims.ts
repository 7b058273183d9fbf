/** Checks the paper's claims against the numbers. */
import { adaptiveId, BETAS, LAMBDAS, type Plan } from './plan.js';
import type { Quality, Results, RunResult } from './reproduce.js';

export interface Claim {
  text: string;
  seen: boolean;
  /** The numbers behind the decision. */
  because: string;
}

export interface Statistic {
  mean: number;
  /** Standard deviation over the seeds, with divisor N − 1; 0 for a single seed. */
  std: number;
}

export function statistic(values: readonly number[]): Statistic {
  const mean = values.reduce((sum, v) => sum + v, 0) / values.length;
  const squares = values.reduce((sum, v) => sum + (v - mean) ** 2, 0);
  return { mean, std: values.length > 1 ? Math.sqrt(squares / (values.length - 1)) : 0 };
}

/** Runs of a variant with the default number of global blocks, in the order of their seeds. */
export function runsOf(results: Results, plan: Plan, variant: string): RunResult[] {
  return results.runs.filter((run) => run.variant === variant && run.globalBlocks === plan.globalBlocks);
}

/** Accuracy of a linear probe on the original teacher's tokens: the reference for the students' probes. */
export function teacherProbe({ runs }: Results): number {
  return runs.find((run) => run.understanding)?.understanding?.teacher ?? NaN;
}

export const tokensOf = (run: RunResult): number => run.understanding?.tokens ?? NaN;
export const pcaOf = ({ runs }: Results): RunResult['pca'] => runs[0]?.pca ?? { psnr: NaN, ssim: NaN };

/** Tolerances: loss of accuracy in points, and of PSNR in dB. */
const POINTS = 0.01;
const DECIBELS = 1;
/** One step is sufficient if more steps gain less than this. */
const STEP_DECIBELS = 0.5;
/** Seams count as removed if at most this fraction of the seams without global blocks remains. */
const SEAMS_LEFT = 0.5;

/** The claims whose variants are in the plan. */
export function claimsOf(results: Results, plan: Plan): Claim[] {
  const where = (ids: readonly string[], claim: () => Claim): Claim[] =>
    ids.every((id) => plan.variants.some((variant) => variant.id === id)) ? [claim()] : [];
  const adaptive = (beta: number): string[] => LAMBDAS.map((lambda) => adaptiveId(beta, lambda));
  const uniform = (lambda: number): string => `uniform-${lambda}`;
  const hierarchical = (lambda: number): string => adaptiveId(0, lambda);
  const comparisons = [
    { other: uniform, name: 'uniform distillation' },
    { other: hierarchical, name: 'hierarchical weights (β = 0)' },
  ];
  return [
    ...where(['finetune'], () => beatsPca(results, plan)),
    keepsAccuracy(results, plan),
    ...where(['finetune', 'frozen'], () => nearFineTuning(results, plan)),
    ...comparisons.flatMap(({ other, name }) =>
      BETAS.flatMap((beta) => where([...adaptive(beta), ...LAMBDAS.map(other)], () => beats(results, plan, { beta, other, name }))),
    ),
    ...['reparam', 'layers'].flatMap((id) => where([id], () => beatsFrozen(results, plan, id))),
    betterWithBlocks(results, plan),
    noSeams(results, plan),
    oneStep(results, plan),
  ];
}

const meanOf = (results: Results, plan: Plan, variant: string, of: (run: RunResult) => number): number =>
  statistic(runsOf(results, plan, variant).map(of)).mean;
const psnrOf = (run: RunResult): number => run.psnr;

function beatsPca(results: Results, plan: Plan): Claim {
  const [own, pca] = [meanOf(results, plan, 'finetune', psnrOf), pcaOf(results).psnr];
  return {
    text: 'The runs are long enough to say something: fine-tuning for the pixels alone beats the PCA of its size.',
    seen: own > pca,
    because: `${own.toFixed(2)} dB against ${pca.toFixed(2)} dB`,
  };
}

function keepsAccuracy(results: Results, plan: Plan): Claim {
  const [own, teacher] = [meanOf(results, plan, plan.paper, tokensOf), teacherProbe(results)];
  return {
    text: "Adaptive distillation keeps the teacher's accuracy (linear probe, within 1 point).",
    seen: own >= teacher - POINTS,
    because: `${points(own)} after, ${points(teacher)} before`,
  };
}

function nearFineTuning(results: Results, plan: Plan): Claim {
  const [own, free, frozen] = [plan.paper, 'finetune', 'frozen'].map((id) => meanOf(results, plan, id, psnrOf)) as [number, number, number];
  return {
    text: 'Its PSNR comes near that of unconstrained fine-tuning (within 1 dB).',
    seen: own >= free - DECIBELS,
    because: `${own.toFixed(2)} dB against ${free.toFixed(2)} dB; a frozen encoder reaches ${frozen.toFixed(2)} dB`,
  };
}

/** Compares pairs with the same seed and λ: not worse in either metric on average, and better in one by more than the standard error. */
function beats(
  results: Results,
  plan: Plan,
  { beta, other, name }: { beta: number; other: (lambda: number) => string; name: string },
): Claim {
  const differences = (of: (run: RunResult) => number): number[] =>
    LAMBDAS.flatMap((lambda) => {
      const compared = runsOf(results, plan, other(lambda));
      return runsOf(results, plan, adaptiveId(beta, lambda)).map((run, i) => of(run) - of(compared[i] as RunResult));
    });
  const [accuracy, psnr] = [statistic(differences(tokensOf)), statistic(differences(psnrOf))];
  const pairs = differences(psnrOf).length;
  const better = ({ mean, std }: Statistic): boolean => mean > std / Math.sqrt(pairs);
  return {
    text: `With β = ${beta} it beats ${name} (not worse in accuracy or PSNR, and better in one by more than the standard error).`,
    seen: accuracy.mean >= 0 && psnr.mean >= 0 && (better(accuracy) || better(psnr)),
    because: `accuracy ${signed(100 * accuracy.mean)} ± ${(100 * accuracy.std).toFixed(2)} points, PSNR ${signed(psnr.mean)} ± ${psnr.std.toFixed(2)} dB (mean and deviation of ${pairs} paired differences)`,
  };
}

/** Compares with a variant that leaves the teacher's tokens unchanged to the bit. */
function beatsFrozen(results: Results, plan: Plan, id: string): Claim {
  const [own, other] = [plan.paper, id].map((variant) => statistic(runsOf(results, plan, variant).map(psnrOf))) as [Statistic, Statistic];
  const accuracy = meanOf(results, plan, plan.paper, tokensOf);
  return {
    text: `It reconstructs better than a baseline that keeps the tokens as they are: ${plan.variants.find((variant) => variant.id === id)?.name}.`,
    seen: own.mean > other.mean + Math.hypot(own.std, other.std) / Math.sqrt(plan.seeds),
    because: `${own.mean.toFixed(2)} ± ${own.std.toFixed(2)} dB against ${other.mean.toFixed(2)} ± ${other.std.toFixed(2)} dB, for ${signed(100 * (accuracy - teacherProbe(results)))} points of accuracy`,
  };
}

/** Statistic over the runs of the paper's variant with this number of global blocks K. */
export function withBlocks({ runs }: Results, plan: Plan, globalBlocks: number, of: (run: RunResult) => number): Statistic {
  return statistic(runs.filter((run) => run.variant === plan.paper && run.globalBlocks === globalBlocks).map(of));
}

/** The paper's criterion. */
function betterWithBlocks(results: Results, plan: Plan): Claim {
  const [none = 0, ...some] = plan.seamBlocks;
  const quality = (blocks: number): [Statistic, Statistic] => [
    withBlocks(results, plan, blocks, psnrOf),
    withBlocks(results, plan, blocks, (run) => run.fid),
  ];
  const [psnr, fid] = quality(none);
  const margin = (a: Statistic, b: Statistic): number => Math.hypot(a.std, b.std) / Math.sqrt(plan.seeds);
  return {
    text: 'Global blocks raise PSNR and lower FID (every K > 0 against K = 0, by more than the standard error).',
    seen: some.every((blocks) => {
      const [p, f] = quality(blocks);
      return p.mean - psnr.mean > margin(p, psnr) && fid.mean - f.mean > margin(f, fid);
    }),
    because: plan.seamBlocks
      .map((blocks) => `K = ${blocks}: ${quality(blocks)[0].mean.toFixed(2)} dB, FID ${quality(blocks)[1].mean.toFixed(3)}`)
      .join('; '),
  };
}

function noSeams(results: Results, plan: Plan): Claim {
  const seams = (blocks: number): number => withBlocks(results, plan, blocks, (run) => run.seams).mean;
  const [none = NaN, ...some] = plan.seamBlocks.map(seams);
  return {
    text: 'Global blocks remove the grid seams (every K > 0 leaves at most half of the excess over 1 that K = 0 has).',
    seen: none > 1 && some.every((ratio) => Math.abs(ratio - 1) <= SEAMS_LEFT * (none - 1)),
    because: plan.seamBlocks.map((blocks) => `K = ${blocks}: ${seams(blocks).toFixed(3)}`).join(', '),
  };
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

/** Quality of the paper's variant with this number of Euler steps. */
export function samplingOf(results: Results, plan: Plan, steps: number, of: keyof Quality): Statistic {
  return statistic(runsOf(results, plan, plan.paper).map((run) => run.sampling?.[steps]?.[of] ?? NaN));
}

/** Mean misalignment α after each layer, on the test images. */
export function alphaOf(runs: readonly RunResult[]): number[] {
  return (runs[0]?.layers ?? []).map((_, layer) => statistic(runs.map((run) => 1 - (run.layers[layer] as number))).mean);
}

const points = (share: number): string => `${(100 * share).toFixed(2)} %`;
const signed = (value: number): string => `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(2)}`;
