/** Trainings and measurements of the reproductions: one plan per data set, sized for at most three hours on two cores. */
import type { TrainConfig } from '../../lib/train/config.js';
import type { Regime } from '../../lib/train/regimes.js';
import type { TeacherTraining } from './teacher.js';

/** One way to train a tokenizer. */
export interface Variant {
  /** A name for files, and a name for readers. */
  id: string;
  name: string;
  regime: Regime;
  beta?: number;
  lambdaDistillation?: number;
}

export interface Plan {
  /** Title for use in sentences. */
  title: string;
  /** Description of the images, for the report. */
  about: string;
  /** File names in the data folder, in any form that openDataset accepts. */
  files: { train: string; test: string };
  /** The report is docs/NAME.md, .svg and .json. */
  report: string;
  classes: number;
  patch: number;
  /** config.json of the teacher: an InternViT, the family of the published checkpoints. */
  encoder: Record<string, unknown>;
  teacher: TeacherTraining;
  /** Training settings shared by all runs. */
  adaptation: Omit<TrainConfig, 'encoder' | 'data' | 'regime' | 'beta' | 'lambdaDistillation' | 'globalBlocks' | 'seed'>;
  variants: readonly Variant[];
  /** The variant with the paper's settings, on which seams and sampling steps are measured. */
  paper: string;
  /** Number of global blocks K of all runs except the comparison of seams. */
  globalBlocks: number;
  seamBlocks: readonly number[];
  samplingSteps: readonly number[];
  seeds: number;
  /** Numbers of images, always the first ones: of the test set, of the training set for the probe, and of the test set for the seams. */
  images: { test: number; probe: number; seams: number };
}

/** Compared distillation weights, and strengths of its adaptation. */
export const LAMBDAS = [0.1, 1] as const;
export const BETAS = [2, 10, 50] as const;

function distilled(id: string, name: string, regime: Regime, beta?: number): Variant[] {
  return LAMBDAS.map((lambdaDistillation) => ({
    ...{ id: `${id}-${lambdaDistillation}`, name: `${name}, λ = ${lambdaDistillation}`, regime, lambdaDistillation },
    ...(beta === undefined ? {} : { beta }),
  }));
}

/** Id of the adaptive variant with this β. β = 0 is the hierarchical variant, whose weights depend only on depth. */
export const adaptiveId = (beta: number, lambda: number): string => `adaptive${beta}-${lambda}`;

const variants: readonly Variant[] = [
  { id: 'frozen', name: 'frozen encoder', regime: 'frozen' },
  { id: 'layers', name: 'frozen, sum of the last 4 layers', regime: 'layers' },
  { id: 'reparam', name: 'frozen, second patch embedding (reparam)', regime: 'reparam' },
  { id: 'finetune', name: 'fine-tuning, no distillation', regime: 'finetune' },
  { id: 'last-1', name: 'last layer only, λ = 1', regime: 'last', lambdaDistillation: 1 },
  ...distilled('uniform', 'uniform', 'uniform'),
  ...distilled('adaptive0', 'hierarchical (β = 0)', 'adaptive', 0),
  ...BETAS.flatMap((beta) => distilled(`adaptive${beta}`, `adaptive, β = ${beta}`, 'adaptive', beta)),
];

export type PlanName = 'fashion-mnist' | 'cifar10';

const shared = {
  variants,
  ...{ paper: adaptiveId(2, 1), patch: 4, classes: 10, globalBlocks: 2, seamBlocks: [0, 2, 6], samplingSteps: [1, 2, 4, 10], seeds: 3 },
};

/** Training settings shared by both data sets. */
const adaptation: Omit<Plan['adaptation'], 'steps' | 'lr' | 'encoderLr'> = {
  ...{ latentChannels: 8, flowBlocks: 3, dtype: 'bfloat16', start: 'linear' },
  ...{ batch: 32, warmup: 50, ema: 0.99, weightDecay: 0, betas: [0.9, 0.99] },
  ...{ scale: [1, 1], time: { zero: 0.75, mean: -1, std: 1 } },
};

export const plans: Record<PlanName, Plan> = {
  'fashion-mnist': {
    ...{ ...shared, title: 'Fashion-MNIST', report: 'reproduction' },
    about: "70,000 real images of clothes, grey, 28×28: Debian's `dataset-fashion-mnist`",
    files: { train: 'train-images-idx3-ubyte.gz', test: 't10k-images-idx3-ubyte.gz' },
    encoder: {
      ...{ model_type: 'intern_vit_6b', image_size: 28, patch_size: 4 },
      ...{ hidden_size: 64, intermediate_size: 256, num_attention_heads: 4, num_hidden_layers: 4 },
    },
    teacher: { steps: 4000, batch: 64, lr: 4e-3, warmup: 100, seed: 0, shift: 0, flip: true, cutmix: 0, ema: 0 },
    adaptation: { ...adaptation, steps: 1200, lr: 2e-3, encoderLr: 1e-3 },
    images: { test: 5000, probe: 10000, seams: 1000 },
  },
  cifar10: {
    ...{ ...shared, title: 'CIFAR-10', report: 'reproduction-cifar10' },
    about: '60,000 real colour images of animals and vehicles, 32×32',
    files: { train: 'train-*.parquet', test: 'test-*.parquet' },
    encoder: {
      ...{ model_type: 'intern_vit_6b', image_size: 32, patch_size: 4, position_embedding_type: 'rope' },
      ...{ hidden_size: 128, intermediate_size: 512, num_attention_heads: 8, num_hidden_layers: 6 },
    },
    teacher: { steps: 16000, batch: 64, lr: 2e-3, warmup: 500, seed: 0, shift: 4, flip: true, cutmix: 0, ema: 0.999 },
    adaptation: { ...adaptation, steps: 700, lr: 1e-3, encoderLr: 5e-4 },
    images: { test: 5000, probe: 10000, seams: 1000 },
  },
};

/** A shortened plan of about ten minutes: a weaker teacher, one seed, few steps. The numbers mean little. */
export function quick(plan: Plan): Plan {
  return {
    ...{ ...plan, seeds: 1, images: { test: 1000, probe: 2000, seams: 200 } },
    teacher: { ...plan.teacher, steps: 600 },
    adaptation: { ...plan.adaptation, steps: 100 },
  };
}
