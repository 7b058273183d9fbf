/** What happens to the encoder in training: the paper's method, and what it is compared with. */
import type { TrainerOptions } from './trainer.js';

/**
 * - `adaptive`: fine-tuned, every layer held near the teacher, deeper and worse-aligned layers harder (the paper's);
 * - `uniform`: fine-tuned, every layer held equally;
 * - `last`: fine-tuned, the last layer held only;
 * - `finetune`: fine-tuned for the pixels alone, without distillation;
 * - `frozen`: not trained; projection and decoder learn on top of it.
 */
export const regimes = {
  adaptive: { layerWeights: 'adaptive' },
  uniform: { layerWeights: 'uniform' },
  last: { layerWeights: 'last' },
  finetune: { lambdaDistillation: 0 },
  frozen: { lambdaDistillation: 0, freezeEncoder: true },
} as const satisfies Record<string, Partial<TrainerOptions>>;

export type Regime = keyof typeof regimes;
