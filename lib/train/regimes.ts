/** What happens to the encoder in training: the paper's method, and what it is compared with. */
import type { FreshOptions } from '../uniflow.js';
import type { TrainerOptions } from './trainer.js';

/**
 * - `adaptive`: fine-tuned, every layer held near the teacher, deeper and worse-aligned layers harder (the paper's);
 * - `uniform`: fine-tuned, every layer held equally;
 * - `last`: fine-tuned, the last layer held only;
 * - `finetune`: fine-tuned for the pixels alone, without distillation;
 * - `frozen`: not trained; projection and decoder learn on top of it;
 * - `layers`: not trained; the same on top of the sum of its last layers ({@link latentSourceOf});
 * - `reparam`: not trained; a second patch embedding learns to feed the latents through the same blocks, and the tokens stay the teacher's.
 */
export const regimes = {
  adaptive: { layerWeights: 'adaptive' },
  uniform: { layerWeights: 'uniform' },
  last: { layerWeights: 'last' },
  finetune: { lambdaDistillation: 0 },
  frozen: { lambdaDistillation: 0, freezeEncoder: true },
  layers: { lambdaDistillation: 0, freezeEncoder: true },
  reparam: { lambdaDistillation: 0, freezeEncoder: true },
} as const satisfies Record<string, Partial<TrainerOptions>>;

export type Regime = keyof typeof regimes;

/** Layers that the regime `layers` adds up, where there are as many. */
const SUMMED_LAYERS = 4;

/** Where the latents of a new tokenizer come from. @param layers of its encoder. */
export function latentSourceOf(regime: Regime, layers: number): Required<Pick<FreshOptions, 'latentLayers' | 'latentEmbedding'>> {
  return { latentLayers: regime === 'layers' ? Math.min(SUMMED_LAYERS, layers) : 1, latentEmbedding: regime === 'reparam' };
}
