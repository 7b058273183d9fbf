/** Training regimes of the encoder: the paper's method, and those it is compared with. */
import type { FreshOptions } from '../uniflow.js';
import type { TrainerOptions } from './trainer.js';

/**
 * - `adaptive`: fine-tuned, with all layers distilled; deeper and worse-aligned layers have larger weights (the paper's method);
 * - `uniform`: fine-tuned, with all layers distilled equally;
 * - `last`: fine-tuned, with only the last layer distilled;
 * - `finetune`: fine-tuned for reconstruction only, without distillation;
 * - `frozen`: not trained; projection and decoder learn on top of it;
 * - `layers`: not trained; as `frozen`, on top of the sum of its last layers ({@link latentSourceOf});
 * - `reparam`: not trained; a second patch embedding learns to feed the latents through the same blocks, so the tokens equal the teacher's.
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

/** Number of layers summed by the regime `layers`, if the encoder has as many. */
const SUMMED_LAYERS = 4;

/** The source of a new tokenizer's latents. @param layers number of the encoder's layers. */
export function latentSourceOf(regime: Regime, layers: number): Required<Pick<FreshOptions, 'latentLayers' | 'latentEmbedding'>> {
  return { latentLayers: regime === 'layers' ? Math.min(SUMMED_LAYERS, layers) : 1, latentEmbedding: regime === 'reparam' };
}
