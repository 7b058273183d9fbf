/** Embeddings: one vector per image, from any model with an encoder. */
import type { NdArray } from 'ndarray';
import { checkOptions, describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import { checkBatchSize } from '../gather.js';
import { batchesOf, type ImageInput, type InputOptions } from '../images/input.js';
import type { Preprocessing } from '../io/preprocess.js';
import { sliceTokens } from '../ops.js';
import { gridOf, type Tensor } from '../tensor.js';
import type { Encoder } from './encoder.js';
import type { PoolingHead } from './head.js';
import { flat, meanOfTokens, POOLS, unitLength, type Pool } from './pooling.js';

export interface EmbedOptions extends InputOptions {
  /** Default: {@link VisionEncoder.defaultPool}; for a UniFlow model, `mean`. */
  pool?: Pool | undefined;
  /** Divides each vector by its length, so that the dot product of two is their cosine similarity. Default true. */
  normalize?: boolean | undefined;
  /** Images computed together. Default: as many as make up about 4,096 tokens. */
  batchSize?: number | undefined;
}

const OPTIONS: readonly (keyof EmbedOptions)[] = ['pool', 'normalize', 'size', 'batchSize', 'signal'];

/** A model that images can be embedded with. */
export interface Embedder {
  readonly encoder: Encoder;
  readonly device: string;
  readonly preprocessing: Preprocessing;
  readonly defaultPool: Pool;
  readonly head?: PoolingHead | undefined;
}

/** Images → float32 [B,E]. */
export async function embedImages(model: Embedder, images: ImageInput, options: EmbedOptions): Promise<NdArray<Float32Array>> {
  checkOptions(options, OPTIONS);
  const { normalize = true, size, batchSize, signal } = options;
  if (typeof normalize !== 'boolean') throw UniFlowError.expected('BAD_INPUT', 'normalize', 'true or false', describe(normalize));
  const { encoder, device, preprocessing } = model;
  const { patch } = encoder.config;
  const batches = batchesOf(images, preprocessing, patch, device, { size, signal });
  try {
    const pooled = await poolingOf(model, options.pool);
    const { rows, cols } = gridOf(batches.size, patch);
    const [vectors] = await encoder.running({
      ...{ device, count: batches.count, batchSize: checkBatchSize(batchSize, rows * cols, device), signal },
      load: async (begin, end) => [await batches.load(begin, end)],
      forward: ([pixels]) => {
        const vector = pooled(encoder.forward(pixels as Tensor).last);
        return [normalize ? unitLength(vector) : vector];
      },
    });
    return vectors as NdArray<Float32Array>;
  } finally {
    batches.dispose();
  }
}

/**
 * The last hidden state [B,S,D] → float32 [B,E].
 * @throws UniFlowError `BAD_INPUT` for an unknown pool, `UNSUPPORTED` for one that the model lacks.
 */
async function poolingOf({ encoder, head, defaultPool }: Embedder, pool: Pool = defaultPool): Promise<(last: Tensor) => Tensor> {
  if (!Object.hasOwn(POOLS, pool)) throw UniFlowError.expected('BAD_INPUT', 'pool', Object.keys(POOLS).join(', '), describe(pool));
  const { prefix, hasClassToken, config } = encoder;
  const others = [...(hasClassToken ? ["'cls'"] : []), "'mean'"].join(' or ');
  const lacking = (part: string): UniFlowError =>
    UniFlowError.expected('UNSUPPORTED', 'pool', `${others}, as this ${config.family} model has no ${part}`, `'${pool}'`);
  switch (pool) {
    case 'mean':
      return (last) => meanOfTokens(sliceTokens(last, prefix, last.dim(1)));
    case 'cls':
      if (!hasClassToken) throw lacking('class token');
      return (last) => flat(sliceTokens(last, 0, 1));
    case 'head': {
      if (!head) throw lacking('pooling head');
      const { apply } = await head.load();
      return (last) => flat(apply(last));
    }
  }
}
