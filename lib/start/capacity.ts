/** How much of the linear codec of its patches a model can be. */
import type { UniFlowConfig } from '../config.js';

/** What startDecoder could keep. */
export interface Kept {
  /** Latent channels that carry a principal component, of `of` channels. */
  channels: number;
  of: number;
  /** Directions of a patch's noise that one step takes away, of `values`. */
  noise: number;
  values: number;
}

/** What a model loses against the PCA of its patches, for people to read. */
export function shortfalls({ channels, of, noise, values }: Kept): string[] {
  return [
    ...(noise < values
      ? [
          `the flow head is too narrow: ${values - noise} of the ${values} directions of a patch's noise stay in the image; ` +
            `a hidden_size of at least ${values + 3} takes all of it away`,
        ]
      : []),
    ...(channels < of
      ? [`${of - channels} of the ${of} latent channels carry nothing: a patch has no more to carry, or the model is too narrow`]
      : []),
  ];
}

/** How much of a linear codec a model of this shape can be. */
export function capacity({ latentChannels, patch, encoder }: UniFlowConfig): Kept {
  const values = 3 * patch ** 2;
  const noise = Math.min(values, encoder.width - 3); // besides: a channel for the reflection, two for the constants
  return { channels: Math.min(latentChannels, noise), of: latentChannels, noise, values };
}
