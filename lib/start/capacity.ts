/** The part of the linear codec of its patches that a model can represent. */
import type { UniFlowConfig } from '../config.js';

/** The capacity used by startDecoder. */
export interface Kept {
  /** Latent channels that carry a principal component, out of `of` channels. */
  channels: number;
  of: number;
  /** Directions of a patch's noise that one step removes, out of `values`. */
  noise: number;
  values: number;
}

/** The loss of a model compared to the PCA of its patches, in words. */
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

/** The part of a linear codec that a model of this shape can represent. */
export function capacity({ latentChannels, patch, encoder }: UniFlowConfig): Kept {
  const values = 3 * patch ** 2;
  const noise = Math.min(values, encoder.width - 3); // the remaining 3 channels: one for the reflection, two for the constants
  return { channels: Math.min(latentChannels, noise), of: latentChannels, noise, values };
}
