/** The linear start of a fresh model: see linear.ts for the codec that it becomes, regression.ts for pretrained encoders. */
import { batches, type LoaderOptions } from '../train/loader.js';
import { openDataset, type Dataset } from '../sources/dataset.js';
import type { NdArray } from 'ndarray';
import { patchStatistics, principalComponents } from '../eval/pca.js';
import { checkBatchSize } from '../gather.js';
import { checkSize } from '../images/input.js';
import { gridOf } from '../tensor.js';
import type { UniFlow } from '../uniflow.js';
import { capacity, startDecoder, startEncoder, type Kept } from './linear.js';

import { regressLatents } from './regression.js';

export { capacity, shortfalls, type Kept } from './linear.js';

/** Patches that the statistics are taken of, at most. */
const PATCHES = 2 ** 19;

/** How images become pixels: of {@link LoaderOptions}. Default: whole, as `encode` takes them, at the model's size. */
export type StartOptions = Pick<LoaderOptions, 'size' | 'seed' | 'crop' | 'scale' | 'flip' | 'signal' | 'onDamaged'>;

/**
 * Turns a fresh model into the linear codec of `data`'s patches: the PCA with as many coefficients as there are latent channels, or as near to it as
 * the encoder and the flow head's width allow.
 * @param encoder `'random'`: the encoder is changed to carry the components, where it is an InternViT with latents from its tokens. `'pretrained'`: it is kept, and latents are
 * regressed from its tokens.
 */
export async function linearStart(
  uniflow: UniFlow,
  data: Dataset,
  { encoder, ...options }: Partial<StartOptions> & { encoder: 'random' | 'pretrained' },
): Promise<Kept> {
  const pixels = (): AsyncGenerator<NdArray> => sample(uniflow, data, options);
  const { normalisation, device } = uniflow;
  const components = principalComponents(await patchStatistics(pixels(), { patch: uniflow.config.patch, normalisation, device }));
  const { latentLayers, latentEmbedding, encoder: shape } = uniflow.config;
  const own = encoder === 'random' && shape.family === 'internvit' && latentLayers === 1 && !latentEmbedding;
  const latents = own ? await startEncoder(uniflow, components) : await regressLatents(uniflow, components, pixels());
  await startDecoder(uniflow, components, latents);
  uniflow.encoder.invalidate();
  return capacity(uniflow.config);
}

/** A fresh model, started on the images of a path; disposed of where that fails. */
export async function startedOn(uniflow: UniFlow, photos: string, options: Pick<StartOptions, 'seed' | 'signal'>): Promise<UniFlow> {
  try {
    const data = await openDataset(photos, options.signal ? { signal: options.signal } : {});
    try {
      await linearStart(uniflow, data, { ...options, encoder: 'random' });
    } finally {
      await data.close();
    }
    return uniflow;
  } catch (error) {
    await uniflow.dispose();
    throw error;
  }
}

/** Images in a random order, once each, up to {@link PATCHES}. */
async function* sample(uniflow: UniFlow, data: Dataset, options: Partial<StartOptions>): AsyncGenerator<NdArray> {
  const { patch, imageSize } = uniflow.config;
  const size = checkSize(options.size ?? imageSize, patch);
  const { rows, cols } = gridOf(size, patch);
  const tokens = rows * cols;
  const batchSize = Math.min(data.length, checkBatchSize(undefined, tokens));
  const loader = batches(data, { crop: 'center', ...options, size, batchSize, shuffle: true, dropLast: false, epochs: 1 });
  let left = PATCHES;
  for await (const { pixels } of loader) {
    yield pixels;
    if ((left -= (pixels.shape[0] as number) * tokens) <= 0) return;
  }
}
