/** Arrays in requests and responses: base64 in JSON, or a safetensors file. */
import ndarray, { type NdArray } from 'ndarray';
import { z } from 'zod';
import { UniFlowError } from '../errors.js';
import { safetensorsHeader } from '../io/files.js';
import type { Grid } from '../tensor.js';
import { checkJson, grid as gridSchema, type TensorJson } from './schemas.js';

const safetensorsHeaderSchema = z.object({
  __metadata__: z.object({ grid: z.string().optional(), ids: z.string().optional() }).optional(),
  latents: z.object({ dtype: z.literal('F32'), shape: z.array(z.int().min(1)), data_offsets: z.tuple([z.int().min(0), z.int().min(0)]) }),
});

/** Latents of a request: a batch of one shape. */
export interface Latents {
  latents: NdArray<Float32Array>;
  grid?: Grid | undefined;
  ids?: readonly string[] | undefined;
}

/** Decodes base64, standard or URL-safe, with or without padding. */
export function fromBase64(text: string, subject: string): Buffer {
  const bytes = Buffer.from(text, 'base64');
  const digits = text.length - (/={1,2}$/.exec(text)?.[0].length ?? 0);
  if (bytes.length !== Math.floor((digits * 3) / 4) || digits % 4 === 1)
    throw UniFlowError.expected('BAD_INPUT', subject, 'base64', `'${text.slice(0, 40)}${text.length > 40 ? '...' : ''}'`);
  return bytes;
}

/** Whether a text is a `data:` URL (RFC 2397), which contains its bytes. */
export function isDataUrl(text: string): boolean {
  return /^data:/i.test(text);
}

/** The bytes of a `data:` URL. @throws {UniFlowError} `BAD_INPUT` naming `subject`. */
export function fromDataUrl(url: string, subject: string): Buffer {
  const comma = url.indexOf(',');
  if (comma < 0) throw UniFlowError.expected('BAD_INPUT', subject, 'data:TYPE;base64,BYTES', `'${url.slice(0, 40)}'`);
  const data = url.slice(comma + 1);
  const unescaped = data.replace(/%([\da-f]{2})/gi, (_, hex: string) => String.fromCharCode(parseInt(hex, 16)));
  return /;base64$/i.test(url.slice(0, comma)) ? fromBase64(unescaped, subject) : Buffer.from(unescaped, 'latin1');
}

export function tensorJson(rows: readonly Float32Array[], row: readonly number[]): TensorJson {
  return { shape: [rows.length, ...row], dtype: 'float32', data: Buffer.concat(rows.map(bytesOf)).toString('base64') };
}

export function tensorOfJson({ shape, data }: TensorJson, subject: string): NdArray<Float32Array> {
  return floats(fromBase64(data, `${subject}.data`), shape, `${subject}.data`);
}

function floats(bytes: Uint8Array, shape: readonly number[], subject: string): NdArray<Float32Array> {
  const expected = shape.reduce((a, b) => a * b, 4);
  if (bytes.length !== expected)
    throw UniFlowError.expected('BAD_INPUT', subject, `${expected} bytes for [${shape.join(', ')}]`, String(bytes.length));
  const aligned = Uint8Array.prototype.slice.call(bytes);
  return ndarray(new Float32Array(aligned.buffer), [...shape]);
}

function bytesOf({ buffer, byteOffset, byteLength }: Float32Array): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}

/** A safetensors file with the same metadata as one of `uniflow encode`. */
export function safetensorsFile(
  arrays: Readonly<Record<string, { rows: readonly Float32Array[]; row: readonly number[] }>>,
  metadata: Record<string, string>,
): Buffer {
  const entries = Object.entries(arrays).map(([name, { rows, row }]) => [name, { dtype: 'F32', shape: [rows.length, ...row] }] as const);
  return Buffer.concat([safetensorsHeader(entries, metadata), ...Object.values(arrays).flatMap(({ rows }) => rows.map(bytesOf))]);
}

/** Parses the latents of such a file. @throws UniFlowError `BAD_INPUT` naming `subject`. */
export function latentsOfSafetensors(bytes: Buffer, subject: string): Latents {
  const wrong = (actual: string, cause?: unknown): UniFlowError =>
    UniFlowError.expected('BAD_INPUT', subject, "a safetensors file with a tensor 'latents' in F32", actual, cause);
  const length = bytes.length < 8 ? Infinity : Number(bytes.readBigUInt64LE());
  if (8 + length > bytes.length) throw wrong(`${bytes.length} bytes without a header`);
  try {
    const text = bytes.toString('utf8', 8, 8 + length);
    checkJson(text, subject);
    const header = safetensorsHeaderSchema.parse(JSON.parse(text));
    const { shape, data_offsets: offsets } = header.latents;
    const { grid, ids } = header.__metadata__ ?? {};
    const [rows, cols] = (grid ?? '').split('x').map(Number);
    return {
      latents: floats(bytes.subarray(8 + length + offsets[0], 8 + length + offsets[1]), shape, subject),
      grid: grid === undefined ? undefined : gridSchema.parse({ rows, cols }),
      ids: ids === undefined ? undefined : z.array(z.string()).parse(JSON.parse(ids)),
    };
  } catch (error) {
    throw error instanceof UniFlowError ? error : wrong('another one', error);
  }
}
