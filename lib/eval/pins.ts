/** The pins of an evaluation: the same pins give the same numbers. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { UniFlowError } from '../errors.js';
import { valueBytes } from '../io/checkpoint.js';
import type { Parameter } from '../parameters.js';

const sha256 = z.string().regex(/^[0-9a-f]{64}$/);
const size = z.tuple([z.number(), z.number()]);

/** Weights: their origin and their hash. */
const weights = z.object({ name: z.string(), sha256 });
export type WeightsPin = z.infer<typeof weights>;

/** `sha256` is {@link Dataset.hash}; `split` says which part of the data at `path` was used. */
const data = z.object({ path: z.string(), split: z.string(), images: z.number(), sha256 });
export type DataPin = z.infer<typeof data>;

/** `size` is the height and width to which images are resized for it. */
const extractor = weights.extend({
  kind: z.enum(['encoder', 'inception']),
  pool: z.enum(['mean', 'class', 'output']),
  size,
  dtype: z.enum(['float32', 'bfloat16', 'int8']),
});
export type ExtractorPin = z.infer<typeof extractor>;

/** How images are decoded from latents. */
const sampling = z.object({ steps: z.number(), schedule: z.string(), guidance: z.number(), seed: z.number() });
export type SamplingPin = z.infer<typeof sampling>;

/** Features of images: `size` is the height and width of the crop; `reconstruction` is set if a model made the images. */
export const featurePins = z.object({
  extractor,
  data,
  crop: z.string(),
  size,
  reconstruction: z.object({ model: weights, dtype: z.enum(['float32', 'bfloat16', 'int8']), sampling }).optional(),
  version: z.string(),
});
export type FeaturePins = z.infer<typeof featurePins>;

/** Hash of a file, as printed by `sha256sum`; of several files, hashed in sequence. */
export async function fileHash(...paths: readonly string[]): Promise<string> {
  const hash = createHash('sha256');
  for (const path of paths) {
    try {
      for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(chunk as Buffer);
    } catch (cause) {
      throw new UniFlowError('NOT_FOUND', `${path}: cannot be read: ${(cause as Error).message}`, { subject: path, cause });
    }
  }
  return hash.digest('hex');
}

/** The weights of a model folder: the hash of its model.safetensors (as shown on the hub), or of its shards in order. */
export async function weightsOf(name: string, folder: string): Promise<WeightsPin> {
  const all = (await readdir(folder)).filter((file) => file.endsWith('.safetensors')).sort();
  const files = all.includes('model.safetensors') ? ['model.safetensors'] : all;
  return { name, sha256: await fileHash(...files.map((file) => join(folder, file))) };
}

/** Weights that exist only in memory: the hash of all parameters' names and float32 values. */
export async function parametersPin(parameters: readonly Parameter[]): Promise<WeightsPin> {
  const hash = createHash('sha256');
  for (const { tensor, parts } of parameters) {
    hash
      .update(`${parts.map(({ name, shape }) => `${name} [${shape.join()}]`).join()}\n`)
      .update(await valueBytes(tensor.handle, 'float32'));
  }
  return { name: 'in memory', sha256: hash.digest('hex') };
}
