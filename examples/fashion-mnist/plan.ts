/** What the reproduction trains and measures. All sizes are chosen so that a run takes about a minute on two cores. */
import type { TrainConfig } from '../../lib/train/config.js';
import type { Regime } from '../../lib/train/regimes.js';

export interface Plan {
  /** Of the teacher: an InternViT, the family of the published checkpoints. */
  encoder: Record<string, unknown>;
  teacher: { steps: number; batch: number; lr: number; warmup: number; seed: number };
  /** What is the same for all runs. */
  adaptation: Omit<TrainConfig, 'encoder' | 'data' | 'regime' | 'globalBlocks' | 'seed'>;
  regimes: readonly Regime[];
  /** K of all runs but those that the seams are compared over. */
  globalBlocks: number;
  seamBlocks: readonly number[];
  samplingSteps: readonly number[];
  seeds: number;
  /** Pictures: the first so many of the test set, and of the training set for the probe; of the test set for the seams. */
  pictures: { test: number; probe: number; seams: number };
}

export const CLASSES = 10;
export const PATCH = 4;

/** Learning rates, λ and times were chosen on 10,000 pictures held out of the training set; the test set was not looked at. */
export const PLAN: Plan = {
  encoder: {
    ...{ model_type: 'intern_vit_6b', image_size: 28, patch_size: PATCH },
    ...{ hidden_size: 64, intermediate_size: 256, num_attention_heads: 4, num_hidden_layers: 4 },
  },
  teacher: { steps: 4000, batch: 64, lr: 4e-3, warmup: 100, seed: 0 },
  adaptation: {
    ...{ latentChannels: 8, flowBlocks: 3, dtype: 'bfloat16' },
    ...{ steps: 1200, batch: 16, lr: 1e-2, encoderLr: 1e-3, warmup: 50, ema: 0.99, lambdaDistillation: 0.1 },
    ...{ scale: [1, 1], time: { mean: -2, std: 1.5 } },
  },
  regimes: ['frozen', 'finetune', 'uniform', 'last', 'adaptive'],
  globalBlocks: 2,
  seamBlocks: [0, 2, 6],
  samplingSteps: [1, 2, 4, 10],
  seeds: 3,
  pictures: { test: 5000, probe: 10000, seams: 1000 },
};
