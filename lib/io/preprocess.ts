/** From pictures to the pixels that an encoder was trained on: which resize, which crop, which statistics. */
import { z } from 'zod';
import { throwIfAborted, UniFlowError } from '../errors.js';
import type { Family } from '../encoder/config.js';
import type { NativeNormalisation, ResampleFilter } from '../native.js';
import { decodeAhead } from '../images/decode-ahead.js';
import { openImage, type DecodeOptions, type ImageSource, type RgbImage } from '../images/decode.js';
import type { Item } from '../sources/item.js';

/** How pictures become [height, width, 3] bytes. */
export interface Preprocessing {
  /** cover: the published UniFlow centre crop. shortest_edge: resize, then centre crop. stretch: no crop. */
  mode: 'cover' | 'shortest_edge' | 'stretch';
  /** Of 'shortest_edge': its length as a multiple of the crop's. */
  edgeRatio: number;
  filter: ResampleFilter;
  size: readonly [height: number, width: number];
  mean: readonly [number, number, number];
  std: readonly [number, number, number];
}

type Triple = readonly [number, number, number];
const IMAGENET = { mean: [0.485, 0.456, 0.406] as Triple, std: [0.229, 0.224, 0.225] as Triple };
const CLIP = { mean: [0.48145466, 0.4578275, 0.40821073] as Triple, std: [0.26862954, 0.26130258, 0.27577711] as Triple };
const HALF = { mean: [0.5, 0.5, 0.5] as Triple, std: [0.5, 0.5, 0.5] as Triple };

/** What a family's published processor does; a preprocessor_config.json says more. */
export function defaultPreprocessing(family: Family, size: readonly [number, number]): Preprocessing {
  const common = { edgeRatio: 1, filter: 'bicubic' as const, size };
  switch (family) {
    case 'clip':
      return { ...common, ...CLIP, mode: 'shortest_edge' };
    case 'siglip':
      return { ...common, ...HALF, mode: 'stretch' };
    case 'dinov2':
      return { ...common, ...IMAGENET, mode: 'shortest_edge', edgeRatio: 256 / 224 };
    case 'dinov3':
      return { ...common, ...IMAGENET, mode: 'stretch', filter: 'bilinear' };
    case 'internvit':
    case 'internvl':
      return { ...common, ...IMAGENET, mode: 'cover' };
  }
}

const FILTERS: Record<number, ResampleFilter> = { 1: 'lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box' };
const triple = z.tuple([z.number(), z.number(), z.number()]);
const spread = z.number().positive();
const extent = z.union([
  z.number().int().positive(),
  z.object({ shortest_edge: z.number().int().positive() }),
  z.object({ height: z.number().int().positive(), width: z.number().int().positive() }),
]);
const processor = z.object({
  do_resize: z.boolean().default(true),
  size: extent.optional(),
  resample: z.number().int().optional(),
  do_center_crop: z.boolean().default(false),
  crop_size: extent.optional(),
  do_normalize: z.boolean().default(true),
  image_mean: triple.optional(),
  image_std: z.tuple([spread, spread, spread]).optional(),
  rescale_factor: z.number().default(1 / 255),
});

/** Applies a Hugging Face preprocessor_config.json. The result's size is the encoder's: that is what its positions fit. */
export function applyProcessorConfig(base: Preprocessing, json: Record<string, unknown>, subject: string): Preprocessing {
  const parsed = processor.safeParse(json);
  if (!parsed.success)
    throw new UniFlowError(
      'BAD_CHECKPOINT',
      `${subject}: ${parsed.error.issues.map((i) => `${i.path.join('.')}: ${i.message}`).join('; ')}`,
      { subject },
    );
  const c = parsed.data;
  if (Math.abs(c.rescale_factor * 255 - 1) > 1e-6)
    throw UniFlowError.expected('UNSUPPORTED', `${subject} rescale_factor`, '1/255', `${c.rescale_factor}`);
  const filter = c.resample === undefined ? base.filter : FILTERS[c.resample];
  if (!filter) throw UniFlowError.expected('UNSUPPORTED', `${subject} resample`, '1, 2, 3 or 4', `${c.resample}`);
  const mean = c.do_normalize ? (c.image_mean ?? base.mean) : ([0, 0, 0] as Triple);
  const std = c.do_normalize ? (c.image_std ?? base.std) : ([1, 1, 1] as Triple);
  const shortest = typeof c.size === 'number' ? c.size : c.size && 'shortest_edge' in c.size ? c.size.shortest_edge : undefined;
  if (c.do_center_crop && shortest) {
    const crop =
      typeof c.crop_size === 'number'
        ? c.crop_size
        : c.crop_size && 'height' in c.crop_size
          ? Math.max(c.crop_size.height, c.crop_size.width)
          : shortest;
    return { ...base, mode: 'shortest_edge', edgeRatio: Math.max(1, shortest / crop), filter, mean, std };
  }
  return { ...base, mode: c.size === undefined ? base.mode : 'stretch', filter, mean, std };
}

/** The preprocessor_config.json that {@link applyProcessorConfig} reads back. */
export function processorConfig(p: Preprocessing): Record<string, unknown> {
  const [height, width] = p.size;
  const resample = Number(Object.entries(FILTERS).find(([, name]) => name === p.filter)?.[0]);
  const statistics = { do_rescale: true, rescale_factor: 1 / 255, do_normalize: true, image_mean: p.mean, image_std: p.std };
  if (p.mode === 'cover') return { do_resize: true, resample, ...statistics };
  if (p.mode === 'stretch') return { do_resize: true, size: { height, width }, resample, do_center_crop: false, ...statistics };
  const crop = Math.max(height, width);
  return {
    do_resize: true,
    size: { shortest_edge: Math.round(crop * p.edgeRatio) },
    resample,
    do_center_crop: true,
    crop_size: { height, width },
    ...statistics,
  };
}

export function nativeNormalisation(p: { mean: Triple; std: Triple }): NativeNormalisation {
  return { mean: Float32Array.from(p.mean), std: Float32Array.from(p.std) };
}

/** Decodes images into one batch, uint8 [B,H,W,3] in C order. @throws {UniFlowError} where one cannot be read. */
export async function loadPixels(
  items: readonly Item[],
  preprocessing: Preprocessing,
  size: readonly [number, number],
  options: DecodeOptions = {},
): Promise<Uint8Array> {
  const bytes = 3 * size[0] * size[1];
  const batch = new Uint8Array(items.length * bytes);
  const places = items.map((item, i) => ({ ...item, into: batch.subarray(i * bytes, (i + 1) * bytes) }));
  const prepare = async (image: ImageSource | RgbImage, { into }: (typeof places)[number]): Promise<object> => {
    await loadInto(into, image, preprocessing, size, options);
    return {};
  };
  for await (const loaded of decodeAhead(places, { count: items.length, prepare, signal: options.signal }))
    if ('error' in loaded) throw loaded.error;
  return batch;
}

/** Decodes one picture `into` uint8 [H,W,3]. */
export async function loadInto(
  into: Uint8Array,
  source: ImageSource | RgbImage,
  { mode, filter, edgeRatio }: Preprocessing,
  [height, width]: readonly [number, number],
  options: DecodeOptions = {},
): Promise<void> {
  throwIfAborted(options.signal);
  const image = await openImage(source, options);
  await image.resample(into, { width, height, mode, filter, edge: Math.round(Math.max(height, width) * edgeRatio) });
}
