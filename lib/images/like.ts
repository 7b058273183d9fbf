/** Converts everything that users have images in to the two decodable forms: encoded bytes or a path, and pixels. */
import sharp, { type Sharp } from 'sharp';
import { describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import { isPixels, type ImageSource, type RgbImage } from '../sources/item.js';

/** An image: a path, a `file:` URL, bytes, pixels, the results of `fetch` and forms, or a sharp pipeline. */
export type ImageLike = ImageSource | RgbImage | ArrayBuffer | Blob | Response | ReadableStream<Uint8Array> | Sharp;

/**
 * Returns a function that reads the image, any number of times. Bytes and pixels are copied before this returns, so the caller may change them. Streams and
 * responses are read once and kept.
 * @throws {UniFlowError} `BAD_INPUT` for anything else. Reading rejects with `NETWORK` for an unsuccessful response.
 */
export function readerOf(image: ImageLike, subject: string): () => Promise<ImageSource | RgbImage> {
  if (typeof image === 'string' || image instanceof URL) return () => Promise.resolve(image);
  if (image instanceof Uint8Array || is(image, 'ArrayBuffer')) {
    const own = copyOf(image as Uint8Array | ArrayBuffer);
    return () => Promise.resolve(own);
  }
  if (typeof image === 'object' && image !== null) {
    if (is(image, 'Response')) return once(() => bodyOf(image as Response, subject));
    if (is(image, 'Blob') || is(image, 'File')) return async () => new Uint8Array(await (image as Blob).arrayBuffer());
    if (is(image, 'ReadableStream')) return once(async () => new Uint8Array(await new Response(image as ReadableStream).arrayBuffer()));
    if (isSharp(image)) return once(() => pixelsOf(image, subject));
    if (isPixels(image as RgbImage)) {
      const { data, width, height } = image as RgbImage;
      const own = { data: Uint8Array.prototype.slice.call(data), width, height };
      return () => Promise.resolve(own);
    }
  }
  const expected = 'a path, a file: URL, bytes, pixels { data, width, height }, a Blob, a Response, a ReadableStream or a sharp image';
  throw UniFlowError.expected('BAD_INPUT', subject, expected, describe(image));
}

/** Checks the tag, because objects of another realm are not instances of our classes. */
function is(value: unknown, tag: string): boolean {
  return Object.prototype.toString.call(value) === `[object ${tag}]`;
}

function isSharp(value: object): value is Sharp {
  return value instanceof sharp || ('toBuffer' in value && 'toColourspace' in value && 'clone' in value);
}

function once<T>(read: () => Promise<T>): () => Promise<T> {
  let result: Promise<T> | undefined;
  return () => (result ??= read());
}

async function bodyOf(response: Response, subject: string): Promise<Uint8Array> {
  if (!response.ok) throw UniFlowError.expected('NETWORK', subject, 'a response with an image', `HTTP ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

/** The output of the pipeline, over white where it is transparent. */
async function pixelsOf(image: Sharp, subject: string): Promise<RgbImage> {
  try {
    const rgb = image.clone().flatten({ background: '#ffffff' }).toColourspace('srgb').raw({ depth: 'uchar' });
    const { data, info } = await rgb.toBuffer({ resolveWithObject: true });
    return { data, width: info.width, height: info.height };
  } catch (cause) {
    throw new UniFlowError('BAD_INPUT', `${subject}: ${(cause as Error).message}`, { subject, cause });
  }
}

/** Empty for bytes of a transferred buffer; decoding them reports that. */
function copyOf(bytes: Uint8Array | ArrayBuffer): Uint8Array {
  return bytes.byteLength > 0 ? new Uint8Array(bytes).slice() : new Uint8Array();
}
