/** The linear start of a new model: see linear.ts for the resulting codec, regression.ts for pretrained encoders. */
import { batches, type LoaderOptions } from '../train/loader.js';
import { openDataset, type Dataset } from '../sources/dataset.js';
import type { NdArray } from 'ndarray';
import { patchStatistics, principalComponents } from '../eval/pca.js';
import { checkBatchSize } from '../gather.js';
import { checkSize } from '../images/input.js';
import { gridOf } from '../tensor.js';
import type { UniFlowModel } from '../model.js';
import { capacity, type Kept } from './capacity.js';
import { startDecoder, startEncoder } from './linear.js';
import { regressLatents } from './regression.js';

export { capacity, shortfalls, type Kept } from './capacity.js';

/** Upper bound of the number of patches in the statistics. */
const PATCHES = 2 ** 19;

/** How images become pixels, as in {@link LoaderOptions}. Default: whole images, as `encode` takes them, at the model's size. */
export type StartOptions = Pick<LoaderOptions, 'size' | 'seed' | 'crop' | 'scale' | 'flip' | 'signal' | 'onDamaged'>;

/**
 * Turns a new model into the linear codec of `data`'s patches: the PCA with one coefficient per latent channel, or as close to it as the encoder and the flow
 * head's width allow.
 * @param encoder `'random'`: changes the encoder to carry the components, if it is an InternViT whose latents come from its tokens. `'pretrained'`: keeps it, and computes the latents from its
 * tokens by regression.
 */
export async function linearStart(
  uniflow: UniFlowModel,
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

/** Starts a new model on the images of a path; disposes of it on failure. */
export async function startedOn<M extends UniFlowModel>(
  uniflow: M,
  photos: string,
  options: Pick<StartOptions, 'seed' | 'signal'>,
): Promise<M> {
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

/** Images in random order, each once, up to {@link PATCHES}. */
async function* sample(uniflow: UniFlowModel, data: Dataset, options: Partial<StartOptions>): AsyncGenerator<NdArray> {
  const { patch, imageSize } = uniflow.config;
  const size = checkSize(options.size ?? imageSize, patch);
  const { rows, cols } = gridOf(size, patch);
  const tokens = rows * cols;
  const batchSize = Math.min(data.length, checkBatchSize(undefined, tokens, uniflow.device));
  const loader = batches(data, { crop: 'center', ...options, size, batchSize, shuffle: true, dropLast: false, epochs: 1 });
  let left = PATCHES;
  for await (const { pixels } of loader) {
    yield pixels;
    if ((left -= (pixels.shape[0] as number) * tokens) <= 0) return;
  }
}
