/** Formats responses as JSON, a safetensors file or one image, according to the Accept header. */
import type { FastifyReply, FastifyRequest } from 'fastify';
import { type RgbImage } from '../images/decode.js';
import { encodeImage } from '../images/write.js';
import type { Grid } from '../tensor.js';
import type { EncodedImage } from './lanes.js';
import { Refusal } from './problem.js';
import type { EncodedJson, ImageType } from './schemas.js';
import { safetensorsFile, tensorJson } from './tensors.js';

export const JSON_TYPE = 'application/json';
export const SAFETENSORS_TYPE = 'application/octet-stream';

/** Negotiates the response type; the first of `types` if the client has no preference. @throws Refusal 406. */
export function accepted<T extends string>(request: FastifyRequest, types: readonly T[]): T {
  const type = request.accepts().type([...types]);
  if (typeof type === 'string') return type as T;
  throw Refusal.of(406, 'Accept', types.join(', '), `'${String(request.headers.accept)}'`);
}

export interface EncodedAnswer {
  ids: string[];
  grid: Grid;
  rows: readonly EncodedImage[];
  /** Dimensions Z and D. */
  channels: number;
  width: number;
}

export function answerEncoded(reply: FastifyReply, type: string, { ids, grid, rows, channels, width }: EncodedAnswer): unknown {
  const patches = grid.rows * grid.cols;
  const latents = { rows: rows.map((row) => row.latents), row: [patches, channels] };
  const given = rows.flatMap((row) => row.tokens ?? []);
  const tokens = given.length > 0 ? { rows: given, row: [patches, width] } : undefined;
  if (type === SAFETENSORS_TYPE) {
    const metadata = { ids: JSON.stringify(ids), grid: `${grid.rows}x${grid.cols}` };
    return reply.type(type).send(safetensorsFile({ latents, ...(tokens ? { tokens } : {}) }, metadata));
  }
  return {
    ids,
    grid,
    latents: tensorJson(latents.rows, latents.row),
    ...(tokens ? { tokens: tensorJson(tokens.rows, tokens.row) } : {}),
  } satisfies EncodedJson;
}

export interface ImageJson {
  id: string;
  width: number;
  height: number;
  type: ImageType;
  data: string;
}

/** Sends a single image as a file if the client accepts it; otherwise `json` of all images, in the format given in the options. */
export async function answerImages(
  reply: FastifyReply,
  type: typeof JSON_TYPE | ImageType,
  images: readonly RgbImage[],
  { ids, format }: { ids: readonly string[]; format: ImageType },
  json: (images: ImageJson[]) => unknown,
): Promise<unknown> {
  if (type !== JSON_TYPE && images.length === 1) return reply.type(type).send(await fileOf(images[0] as RgbImage, type));
  const chosen = type === JSON_TYPE ? format : type;
  const files = await filesOf(images, chosen);
  return json(images.map(({ width, height }, i) => ({ id: ids[i] as string, width, height, type: chosen, data: files[i] as string })));
}

/** Each image as a file in base64. */
export function filesOf(images: readonly RgbImage[], type: ImageType): Promise<string[]> {
  return Promise.all(images.map(async (image) => (await fileOf(image, type)).toString('base64')));
}

function fileOf(image: RgbImage, type: ImageType): Promise<Buffer> {
  return encodeImage(type.replace('/', '.'), image);
}
