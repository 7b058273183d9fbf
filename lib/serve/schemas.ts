/** Schemas of requests and responses. They are used for both validation and the OpenAPI document. */
import { z } from 'zod';
import { UniFlowError } from '../errors.js';
import type { Settings } from './options.js';
import { Refusal, Refusals } from './problem.js';

export const IMAGE_TYPES = ['image/png', 'image/jpeg', 'image/webp'] as const;
export type ImageType = (typeof IMAGE_TYPES)[number];

const edge = z.int().min(1).max(16384);
const size = z
  .union([edge, z.tuple([edge, edge])])
  .describe("Height and width that images are brought to: one number for a square. Multiples of the patch. Default: the model's own.");
const base64 = z.string().describe('base64 (RFC 4648), with or without padding');
const bytes = z.string().describe('base64 (RFC 4648), with or without padding, or a data: URL');

export const grid = z.strictObject({ rows: edge, cols: edge }).describe('Patch rows and columns of the images.');

export const tensor = z
  .strictObject({ shape: z.array(z.int().min(1)), dtype: z.literal('float32'), data: base64 })
  .describe('An array in C order: base64 of its elements, little-endian.');
export type TensorJson = z.infer<typeof tensor>;

const ids = z.array(z.string()).describe("The images' names: of the file, the URL, or the number in the request.");

export const encoded = z.strictObject({
  ids,
  grid,
  latents: tensor.describe('[B, N, Z]'),
  tokens: tensor.optional().describe('[B, N, D], where asked for'),
});
export type EncodedJson = z.infer<typeof encoded>;

const image = { id: z.string(), width: edge, height: edge, type: z.enum(IMAGE_TYPES), data: base64.describe('the file, base64') };
const score = z.number().nullable(); // JSON has no infinity, which is the PSNR of identical images

export const decoded = z.strictObject({ images: z.array(z.strictObject(image)) });
export const reconstructed = z.strictObject({
  images: z.array(
    z.strictObject({
      ...image,
      original: base64.optional().describe('the original as a file, if requested'),
      psnr: score.describe('dB'),
      ssim: score,
    }),
  ),
  psnr: score.describe('mean'),
  ssim: score.describe('mean'),
  grid,
});

export const problem = z
  .looseObject({ type: z.string(), title: z.string(), status: z.int(), detail: z.string(), code: z.string() })
  .describe(
    'RFC 9457 problem details. `subject`, `expected` and `actual` say what is wrong, `errors` lists it where it is more than one thing.',
  );

/** Schemas of requests, which include the service's limits. */
export function requestSchemas({ maxImages, maxSteps }: Pick<Settings, 'maxImages' | 'maxSteps'>) {
  const sampling = {
    steps: z.int().min(1).max(maxSteps).optional().describe("Euler steps. Default: the model's."),
    schedule: z
      .union([z.literal('linear'), z.templateLiteral(['pow_', z.number()])])
      .optional()
      .describe("Where the steps are. Default: 'linear'."),
    guidance: z.number().optional().describe('Classifier-free guidance. Default: 1, off.'),
    seed: z.int().min(0).optional().describe('Of the noise. Default: 0.'),
    format: z.enum(IMAGE_TYPES).default('image/png').describe('Of the images in a JSON answer.'),
  };
  const encodeOptions = z.strictObject({
    size: size.optional(),
    tokens: z.boolean().default(false).describe('The semantic tokens as well.'),
  });
  const decodeOptions = z.strictObject(sampling);
  const reconstructOptions = z.strictObject({
    size: size.optional(),
    original: z
      .boolean()
      .default(false)
      .describe('The originals as well, resized and cropped as they were encoded; only in a JSON answer.'),
    ...sampling,
  });
  const image = z.union([bytes, z.strictObject({ url: z.string() }).describe('Of a host that the service allows, or a data: URL.')]);
  const images = z.array(image).min(1).max(maxImages);
  return {
    encode: { options: encodeOptions, body: z.strictObject({ images, options: z.unknown().optional() }) },
    reconstruct: { options: reconstructOptions, body: z.strictObject({ images, options: z.unknown().optional() }) },
    decode: {
      options: decodeOptions,
      body: z
        .strictObject({
          latents: tensor,
          grid: grid.optional(),
          ids: ids.optional(),
          tokens: z.unknown().optional().describe('not read'),
          options: z.unknown().optional(),
        })
        .describe('An answer of /v1/encode can be sent as it is.'),
    },
  };
}
export type RequestSchemas = ReturnType<typeof requestSchemas>;

/**
 * Maximum number of JSON values, far above a normal request. A body within the size limit could hold millions, which would take gigabytes
 * of memory.
 */
const MAX_VALUES = 2 ** 16;
/** Maximum number of invalid fields reported to a client. */
const MAX_TOLD = 20;

/** Checked before JSON is parsed. @throws Refusal, 413. */
export function checkJson(text: string, subject: string): void {
  let left = MAX_VALUES;
  for (const mark of [',', '[', '{'])
    // every value is preceded by one of these
    for (let at = text.indexOf(mark); at >= 0; at = text.indexOf(mark, at + 1))
      if (--left < 0) throw Refusal.of(413, subject, `at most ${MAX_VALUES} values in JSON`, 'more');
}

/** @throws Refusals, 422, naming the invalid fields. */
export function parse<T>(schema: z.ZodType<T>, value: unknown, name: string): T {
  const parsed = schema.safeParse(value);
  if (parsed.success) return parsed.data;
  throw new Refusals(
    parsed.error.issues.slice(0, MAX_TOLD).map(({ path, message }) => {
      const subject = [name, ...path].join('.');
      return new UniFlowError('BAD_INPUT', `${subject}: ${message}`, { subject, expected: message.replace(/^.*expected /, '') });
    }),
  );
}
