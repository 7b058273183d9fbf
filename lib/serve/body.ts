/** Parses request bodies: multipart, one file, or JSON, into the same form. */
import type { MultipartFile } from '@fastify/multipart';
import type { FastifyRequest } from 'fastify';
import type { z } from 'zod';
import { UniFlowError } from '../errors.js';
import type { Settings } from './options.js';
import { Refusal } from './problem.js';
import type { Budget, Remote } from './remote.js';
import { parse, type RequestSchemas } from './schemas.js';
import { fromBase64, fromDataUrl, isDataUrl, latentsOfSafetensors, tensorOfJson, type Latents } from './tensors.js';

/** Maximum size of the options in a multipart body. */
const MAX_FIELD_BYTES = 65536;

/** The bytes of a request part, with an id: the name of the file, or its number. */
export interface NamedBytes {
  id: string;
  /** Its position in the request, for errors. */
  subject: string;
  bytes: Buffer;
}

/** An image that was sent, or one that must be fetched. */
export type SentImage = NamedBytes | { id: string; subject: string; url: string };

interface Files {
  files: NamedBytes[];
  options: unknown;
}

export async function readImages<O>(
  request: FastifyRequest,
  schema: { options: z.ZodType<O>; body: RequestSchemas['encode']['body'] },
  settings: Settings,
): Promise<{ images: SentImage[]; options: O }> {
  const sent = await readFiles(request, settings);
  if (sent) return { images: sent.files, options: parse(schema.options, sent.options ?? {}, 'options') };
  checkCount((request.body as { images?: unknown } | null)?.images, settings);
  const body = parse(schema.body, request.body, 'body');
  const options = parse(schema.options, body.options ?? {}, 'options');
  const images = body.images.map((image, i): SentImage => {
    const subject = `images[${i}]`;
    const text = typeof image === 'string' ? image : image.url;
    if (isDataUrl(text)) return { id: String(i), subject, bytes: fromDataUrl(text, subject) };
    if (typeof image === 'string') return { id: String(i), subject, bytes: fromBase64(text, subject) };
    return { id: text, subject, url: text };
  });
  return { images, options };
}

export async function readLatents<O>(
  request: FastifyRequest,
  schema: { options: z.ZodType<O>; body: RequestSchemas['decode']['body'] },
  settings: Settings,
): Promise<{ latents: Latents[]; options: O }> {
  const sent = await readFiles(request, settings);
  const options = (value: unknown): O => parse(schema.options, value ?? {}, 'options');
  if (sent)
    return { latents: sent.files.map(({ bytes, subject }) => latentsOfSafetensors(bytes, subject)), options: options(sent.options) };
  const { latents, grid, ids, ...body } = parse(schema.body, request.body, 'body');
  return { latents: [{ latents: tensorOfJson(latents, 'latents'), grid, ids }], options: options(body.options) };
}

/** Too many images have their own status, whatever else is wrong. */
function checkCount(images: unknown, { maxImages }: Settings): void {
  if (Array.isArray(images) && images.length > maxImages) throw Refusal.of(413, 'images', `at most ${maxImages}`, String(images.length));
}

/** The files of a multipart or plain body; undefined for JSON. */
async function readFiles(request: FastifyRequest, settings: Settings): Promise<Files | undefined> {
  if (request.isMultipart()) return readMultipart(request, settings).catch(refuseMalformed);
  if (!Buffer.isBuffer(request.body)) return undefined;
  const { options } = request.query as { options?: string };
  return { files: [{ id: '0', subject: 'body', bytes: request.body }], options: jsonOf(options) };
}

async function readMultipart(request: FastifyRequest, { maxBody, maxImages }: Settings): Promise<Files> {
  const tooLarge = (actual: string): Refusal => Refusal.of(413, 'body', `at most ${maxBody} bytes`, actual);
  const declared = Number(request.headers['content-length'] ?? 0);
  if (declared > maxBody) throw tooLarge(String(declared));
  const files: NamedBytes[] = [];
  let options: unknown;
  let left = maxBody;
  const limits = { fileSize: maxBody, files: maxImages, fields: 1, fieldSize: MAX_FIELD_BYTES };
  for await (const part of request.parts({ limits })) {
    if (part.type === 'file') {
      const file = await readFile(part, files.length);
      files.push(file);
      left -= file.bytes.length;
      if (left < 0) throw tooLarge('more');
    } else if (part.fieldname === 'options') options = jsonOf(part.value);
    else throw Refusal.of(422, part.fieldname, "files, and a field 'options'", 'another field');
  }
  if (files.length === 0) throw Refusal.of(422, 'body', 'at least one file', 'none');
  return { files, options };
}

/** The parser throws plain errors if the body does not match its type, and uses 406 where this service uses 400. */
function refuseMalformed(error: Error & { statusCode?: number }): never {
  if (error instanceof UniFlowError || (error.statusCode !== undefined && error.statusCode !== 406)) throw error;
  throw Refusal.of(400, 'body', 'multipart/form-data', error.message);
}

async function readFile(part: MultipartFile, i: number): Promise<NamedBytes> {
  const bytes = await part.toBuffer();
  const name = part.filename ? ` (${part.filename})` : '';
  return { id: part.filename || String(i), subject: `file ${i}${name}`, bytes };
}

function jsonOf(value: unknown): unknown {
  if (typeof value !== 'string') return value; // parts with a JSON content type are already parsed
  try {
    return JSON.parse(value);
  } catch {
    throw Refusal.of(400, 'options', 'a JSON object', `'${value.slice(0, 80)}'`);
  }
}

/** The bytes of an image, fetched if it is a URL. */
export async function bytesOf(image: SentImage, remote: Remote, budget: Budget, signal: AbortSignal): Promise<Uint8Array> {
  return 'bytes' in image ? image.bytes : remote.fetch(image.url, image.subject, budget, signal);
}
