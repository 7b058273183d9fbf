/** Hugging Face's processor files: every statement about pixels is honoured or refused, never ignored. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { isObject, problemsOf, withoutNulls } from '../encoder/config-fields.js';
import { UniFlowError } from '../errors.js';
import { pathExists } from './files.js';
import { readJson } from './json.js';
import { CLIP, FILTERS, HALF, IMAGENET, type Preprocessing, type Triple } from './preprocess.js';

export const PREPROCESSOR = 'preprocessor_config.json';
/** The file written by transformers 5, which contains the image processor. */
export const PROCESSOR = 'processor_config.json';

/** Content of a processor file. */
type ProcessorJson = Record<string, unknown>;

/** The texts of a folder's processor files by name, and the resulting preprocessing. */
export interface Processor {
  files: Record<string, string>;
  preprocessing: Preprocessing;
}

/** Preprocessing according to the files in `dir`; without any, `base`, the family's own. */
export async function readProcessor(dir: string, base: Preprocessing): Promise<Processor> {
  const files: Record<string, string> = {};
  const read = async (name: string): Promise<ProcessorJson | undefined> => {
    const path = join(dir, name);
    if (!(await pathExists(path))) return undefined;
    const json = await readJson(path);
    files[name] = await readFile(path, 'utf8');
    return json;
  };
  const [whole, alone] = [await read(PROCESSOR), await read(PREPROCESSOR)];
  const nested = whole?.['image_processor'];
  // in transformers' order; a processor_config.json may describe only text
  if (isObject(nested)) return { files, preprocessing: applyProcessor(base, nested, join(dir, PROCESSOR)) };
  if (alone) return { files, preprocessing: applyProcessor(base, alone, join(dir, PREPROCESSOR)) };
  if (whole?.['image_processor_type']) return { files, preprocessing: applyProcessor(base, whole, join(dir, PROCESSOR)) };
  return { files, preprocessing: base };
}

const cropping = { size: 224, default_to_square: false, do_center_crop: true, crop_size: 224, resample: 3 };
const statistics = ({ mean, std }: { mean: Triple; std: Triple }): ProcessorJson => ({ image_mean: mean, image_std: std });

/** Defaults of transformers' classes. */
const CLASSES: Record<string, ProcessorJson> = {
  CLIP: { ...cropping, ...statistics(CLIP) },
  Bit: { ...cropping, ...statistics(CLIP) },
  DINOv3ViT: { size: 224, resample: 2, ...statistics(IMAGENET) },
  GotOcr2: { size: 384, resample: 3, ...statistics(CLIP) },
  Siglip: { size: { height: 224, width: 224 }, default_to_square: false, resample: 3, ...statistics(HALF) },
  ViT: { size: 224, resample: 2, ...statistics(HALF) },
};

const pixels = z.number().int().positive();
const sides = z.record(z.string(), pixels.nullable()).transform((size) => withoutNulls(size) as Record<string, number>);
const extent = z.union([pixels, z.tuple([pixels, pixels]), sides]);
const channels = (value: z.ZodNumber): z.ZodType<Triple> =>
  z.union([z.tuple([value, value, value]), value.transform((n): Triple => [n, n, n])]);
const fields = z.object({
  do_resize: z.boolean().default(true),
  size: extent.optional(),
  default_to_square: z.boolean().optional(),
  resample: z.number().int().optional(),
  do_center_crop: z.boolean().default(false),
  crop_size: extent.optional(),
  do_rescale: z.boolean().default(true),
  rescale_factor: z.number().default(1 / 255),
  do_normalize: z.boolean().default(true),
  image_mean: channels(z.number()).optional(),
  image_std: channels(z.number().positive()).optional(),
  do_convert_rgb: z.boolean().default(true),
});
type Fields = z.infer<typeof fields>;

/** Fields that do not affect pixels. The limits on tiles apply only with crop_to_patches, which is refused. */
const inert = new Set(
  `_name_or_path auto_map data_format device disable_grouping feature_extractor_type image_processor_type image_seq_length
  input_data_format max_patches min_patches pad_size processor_class return_tensors transformers_version`.split(/\s+/),
);

/** Applies the settings of a processor file. */
export function applyProcessor(base: Preprocessing, json: ProcessorJson, subject: string): Preprocessing {
  const given = withoutNulls(json);
  const all = { ...classDefaults(given, subject), ...given };
  const refuse = (name: string, expected: string, value: unknown): never => {
    throw UniFlowError.expected(
      'UNSUPPORTED',
      `${subject}: ${name}`,
      `${expected} (or pass { pixels } that you have prepared)`,
      shown(value),
    );
  };
  for (const [name, value] of Object.entries(given))
    if (!Object.hasOwn(fields.shape, name) && !inert.has(name) && !name.startsWith('_') && value !== false)
      refuse(name, 'no such step', value);
  const parsed = fields.safeParse(all);
  if (!parsed.success) throw new UniFlowError('BAD_CHECKPOINT', `${subject}: ${problemsOf(parsed.error).join('; ')}`, { subject });
  const c = parsed.data;
  for (const name of ['do_resize', 'do_rescale', 'do_convert_rgb'] as const) if (!c[name]) refuse(name, 'true', false);
  if (Math.abs(c.rescale_factor * 255 - 1) > 1e-6) refuse('rescale_factor', '1/255', c.rescale_factor);
  const filter = c.resample === undefined ? base.filter : FILTERS[c.resample];
  if (!filter) return refuse('resample', '1 (Lanczos), 2 (bilinear), 3 (bicubic) or 4 (box)', c.resample);
  return {
    ...base,
    ...geometry(base, c, refuse),
    filter,
    mean: c.do_normalize ? (c.image_mean ?? base.mean) : [0, 0, 0],
    std: c.do_normalize ? (c.image_std ?? base.std) : [1, 1, 1],
  };
}

function classDefaults(json: ProcessorJson, subject: string): ProcessorJson {
  const type = json['image_processor_type'] ?? json['feature_extractor_type'];
  if (type === undefined) return {};
  const name = shown(type).replace(/(ImageProcessor(Fast|Pil)?|FeatureExtractor)$/, '');
  const defaults = Object.hasOwn(CLASSES, name) ? CLASSES[name] : undefined;
  if (defaults) return defaults;
  const expected = `the image processor of ${Object.keys(CLASSES).join(', ')} (or no file: then the family's own preprocessing is used)`;
  throw UniFlowError.expected('UNSUPPORTED', `${subject}: image_processor_type`, expected, shown(type));
}

/** Resizing and cropping to a single size for all images, because a batch has one shape. */
function geometry(
  base: Preprocessing,
  c: Fields,
  refuse: (name: string, expected: string, value: unknown) => never,
): Pick<Preprocessing, 'mode' | 'edgeRatio' | 'size'> {
  if (c.size === undefined && !c.do_center_crop) return base;
  const crop = c.do_center_crop ? sizeOf(c.crop_size ?? c.size) : undefined;
  if (c.do_center_crop && !crop) return refuse('crop_size', 'a height and width', c.crop_size ?? c.size);
  const edge = shortestEdge(c);
  if (edge !== undefined) {
    if (!crop) return refuse('size', 'a height and width, or a center crop: images of one size', c.size);
    const longest = Math.max(...crop);
    if (edge < longest) return refuse('crop_size', `at most size ${edge}: crops with a border are not supported`, c.crop_size);
    return { mode: 'shortest_edge', edgeRatio: edge / longest, size: crop };
  }
  const size = sizeOf(c.size ?? c.crop_size) ?? refuse('size', 'a shortest edge, or a height and width', c.size);
  if (crop && crop.join() !== size.join()) refuse('crop_size', `the whole of size ${size.join('x')}`, c.crop_size);
  return { mode: c.size === undefined ? base.mode : 'stretch', edgeRatio: 1, size };
}

/** The edge length of a size that keeps the aspect ratio. */
function shortestEdge({ size, default_to_square: square, do_center_crop: crop }: Fields): number | undefined {
  if (typeof size === 'number') return (square ?? !crop) ? undefined : size;
  if (typeof size !== 'object' || Array.isArray(size)) return undefined;
  return Object.keys(size).join() === 'shortest_edge' ? size['shortest_edge'] : undefined;
}

function sizeOf(size: Fields['size']): readonly [height: number, width: number] | undefined {
  if (size === undefined) return undefined;
  if (typeof size === 'number') return [size, size];
  if (Array.isArray(size)) return [size[0], size[1]];
  const { height, width, shortest_edge: edge, ...others } = size;
  if (Object.keys(others).length > 0) return undefined;
  if (height !== undefined && width !== undefined) return [height, width];
  return edge === undefined ? undefined : [edge, edge];
}

function shown(value: unknown): string {
  return typeof value === 'string' ? value : JSON.stringify(value);
}
