/** Pictures in and out: files and bytes to packed RGB, packed RGB to files. */
import { randomUUID } from 'node:crypto';
import { readFile, rename, rm, writeFile } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { extname } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { NdArray } from 'ndarray';
import sharp, { type Metadata, type Sharp } from 'sharp';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { native, type Resampling } from '../native.js';

/** A picture to decode: the path of a file, a `file:` URL, or the bytes of a file. */
export type ImageSource = string | URL | Buffer | Uint8Array;

/** A decoded picture: 8-bit sRGB, rows from top to bottom, `height * width * 3` bytes. */
export interface RgbImage {
  data: Uint8Array;
  width: number;
  height: number;
}

export interface DecodeOptions {
  /** Pictures with more pixels than this are refused before they are decoded. The default is 16383 x 16383. */
  maxPixels?: number;
  signal?: AbortSignal;
}

/** A picture whose size is known; it may not be decoded yet. */
export interface OpenImage {
  readonly width: number;
  readonly height: number;
  /** Writes it, resized, `into` packed RGB [height, width, 3]. Errors are those of {@link decodeImage}. */
  resample(into: Uint8Array, to: Resampling): Promise<void>;
}

/** Pictures to decode at once: some for each core, which the CPU's threads then do together between two operations of a model. */
export const DECODERS = 4 * availableParallelism();

const DEFAULT_MAX_PIXELS = 16383 * 16383;
/** Their bytes fit into an array of 4 GiB. */
const MOST_PIXELS = 2 ** 30;
const FORMATS: readonly string[] = ['jpeg', 'png', 'webp', 'heif', 'tiff', 'gif'];
const FORMATS_TEXT = 'a JPEG, PNG, WebP, AVIF, TIFF or GIF picture';
/** How files of these formats begin, as Latin-1. Others are not given to libvips, which would lay out an SVG only to tell its size. */
const BEGINNING = /^(\xff\xd8|\x89PNG|RIFF.{4}WEBP|GIF8|II[*+]\0|MM\0[*+]|.{4}ftyp)/s;
/** What native.resample takes. */
const MOST_EDGE = 2 ** 20;
const WHITE = '#ffffff';

/**
 * Decodes a picture to packed 8-bit RGB: the first frame, turned upright by its EXIF orientation,
 * transparency over white, grey and CMYK as RGB, 16 bits cut to 8.
 *
 * Pixel values of RGB and grey pictures are those in the file: like Pillow, and unlike most viewers, this does
 * not convert them from an embedded color profile, because published models were trained without that.
 * CMYK has no RGB values of its own and is converted by its profile.
 *
 * A damaged or truncated picture is an error, never a picture with a grey rest.
 *
 * @throws {UniFlowError} `NOT_FOUND`, `BAD_INPUT`, `UNSUPPORTED` or `ABORTED`; the message starts with the path,
 * or with `<buffer>`.
 */
export async function decodeImage(source: ImageSource, options: DecodeOptions = {}): Promise<RgbImage> {
  const jpeg = await plainJpeg(source, options);
  if (!jpeg) return decodeAny(source, options);
  const { width, height } = jpeg;
  const data = Buffer.allocUnsafeSlow(3 * width * height);
  return (await jpeg.decode(data)) ? { data, width, height } : decodeAny(source, options);
}

/**
 * The picture of a file, or decoded pixels, to resize: what {@link decodeImage} and then native.resample give, without the picture in between where
 * that can be.
 */
export async function openImage(source: ImageSource | RgbImage, options: DecodeOptions = {}): Promise<OpenImage> {
  if (isPixels(source)) return openPixels(source);
  let jpeg = await plainJpeg(source, options);
  if (!jpeg) return openPixels(await decodeAny(source, options));
  const { width, height } = jpeg;
  const resample = async (into: Uint8Array, to: Resampling): Promise<void> => {
    const opened = jpeg ?? (await plainJpeg(source, options));
    jpeg = undefined; // for one time
    if (!(await opened?.decode(into, to))) await openPixels(await decodeAny(source, options)).resample(into, to);
  };
  return { width, height, resample };
}

/** Whether it is decoded already. */
export function isPixels(image: ImageSource | RgbImage): image is RgbImage {
  return typeof image === 'object' && image !== null && 'data' in image;
}

function openPixels(image: RgbImage): OpenImage {
  checkLength(image);
  const { data, width, height } = image;
  return { width, height, resample: (into, to) => native.resample(data, width, height, into, to) };
}

interface Jpeg {
  width: number;
  height: number;
  /** Once. @returns false where there is something wrong with the file, which sharp may see past, or can tell. */
  decode(into: Uint8Array, to?: Resampling): Promise<boolean>;
}

/** The quick way for what most pictures are. Undefined: it is something else, or cannot be read. */
async function plainJpeg(source: ImageSource, { maxPixels = DEFAULT_MAX_PIXELS, signal }: DecodeOptions): Promise<Jpeg | undefined> {
  throwIfAborted(signal);
  const opened = await native.openJpeg(source instanceof Uint8Array ? source : pathOf(source), Math.min(maxPixels || 0, MOST_PIXELS));
  throwIfAborted(signal);
  if (!opened) return undefined;
  const { file, width, height } = opened;
  const decode = async (into: Uint8Array, to?: Resampling): Promise<boolean> => {
    throwIfAborted(signal);
    const whole = await native.decodeJpeg(file, into, to);
    throwIfAborted(signal);
    return whole;
  };
  return { width, height, decode };
}

async function decodeAny(source: ImageSource, { maxPixels = DEFAULT_MAX_PIXELS, signal }: DecodeOptions): Promise<RgbImage> {
  const { name, bytes } = await readSource(source, signal);
  const metadata = await readMetadata(name, bytes);
  checkPixels(name, metadata, maxPixels);
  throwIfAborted(signal);
  try {
    const { data, info } = await sharp(bytes, {
      failOn: 'error', // truncated data too, but not a JPEG with harmless bytes between its segments
      limitInputPixels: false, // checked above, with a better message
      ignoreIcc: metadata.space !== 'cmyk',
    })
      .autoOrient()
      .flatten({ background: WHITE })
      .toColourspace('srgb')
      .raw({ depth: 'uchar' })
      .toBuffer({ resolveWithObject: true });
    throwIfAborted(signal);
    return { data, width: info.width, height: info.height };
  } catch (error) {
    if (error instanceof UniFlowError) throw error;
    throw undecodable(name, error);
  }
}

/** Reads the file here rather than in libvips, which caches by path and reports a missing file as a bad one. */
async function readSource(source: ImageSource, signal: AbortSignal | undefined): Promise<{ name: string; bytes: Uint8Array }> {
  throwIfAborted(signal);
  const path = source instanceof Uint8Array ? undefined : pathOf(source);
  const name = path ?? '<buffer>';
  const bytes = source instanceof Uint8Array ? source : await readPath(name, signal);
  if (bytes.length === 0) throw UniFlowError.expected('BAD_INPUT', name, FORMATS_TEXT, '0 bytes');
  return { name, bytes };
}

function pathOf(source: string | URL): string {
  const text = String(source);
  const protocol = /^([a-z]+):/i.exec(text)?.[1]?.toLowerCase();
  if (protocol === 'file') {
    try {
      return fileURLToPath(text);
    } catch (error) {
      throw UniFlowError.expected('BAD_INPUT', text, 'the URL of a local file', 'another URL', error);
    }
  }
  if (source instanceof URL || protocol === 'http' || protocol === 'https' || protocol === 'data') {
    const shown = text.length > 80 ? `${text.slice(0, 80)}...` : text;
    throw new UniFlowError(
      'UNSUPPORTED',
      `${shown}: only local files are read; fetch it first and pass new Uint8Array(await response.arrayBuffer())`,
      { subject: shown },
    );
  }
  return text;
}

async function readPath(path: string, signal?: AbortSignal): Promise<Buffer> {
  try {
    return await readFile(path, { signal });
  } catch (error) {
    throwIfAborted(signal);
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') throw UniFlowError.expected('NOT_FOUND', path, 'a file', 'no such file', error);
    if (code === 'EISDIR') throw UniFlowError.expected('BAD_INPUT', path, 'a file', 'a directory', error);
    throw new UniFlowError('BAD_INPUT', `${path}: cannot be read: ${message}`, { subject: path, cause: error });
  }
}

async function readMetadata(name: string, bytes: Uint8Array): Promise<Metadata> {
  const start = Buffer.from(bytes.subarray(0, 1000)).toString('latin1');
  if (!BEGINNING.test(start))
    throw /<svg/i.test(start) ? UniFlowError.expected('UNSUPPORTED', name, FORMATS_TEXT, 'svg') : unknownFormat(name, bytes);
  let metadata: Metadata;
  try {
    metadata = await sharp(bytes, { limitInputPixels: false }).metadata();
  } catch (error) {
    throw /unsupported image format/.test(String(error)) ? unknownFormat(name, bytes, error) : undecodable(name, error);
  }
  const { format, compression } = metadata;
  if (FORMATS.includes(format) && (format !== 'heif' || compression === 'av1')) return metadata;
  throw UniFlowError.expected('UNSUPPORTED', name, FORMATS_TEXT, compression ? `${format} (${compression})` : format);
}

function unknownFormat(name: string, bytes: Uint8Array, cause?: unknown): UniFlowError {
  const start = JSON.stringify(Buffer.from(bytes.subarray(0, 16)).toString('latin1'));
  return UniFlowError.expected('BAD_INPUT', name, FORMATS_TEXT, `${bytes.length} bytes starting with ${start}`, cause);
}

function checkPixels(name: string, { width, height }: Metadata, maxPixels: number): void {
  if (Math.max(width, height) > MOST_EDGE)
    throw UniFlowError.expected('BAD_INPUT', name, `at most ${MOST_EDGE} pixels a side`, `${width} x ${height}`);
  const pixels = width * height;
  if (pixels <= maxPixels) return;
  const expected = `at most ${maxPixels} pixels (raise the option maxPixels to allow more)`;
  throw UniFlowError.expected('BAD_INPUT', name, expected, `${pixels} (${width} x ${height})`);
}

function undecodable(name: string, cause: unknown): UniFlowError {
  // libvips repeats itself over several lines; the first says it.
  const reason = (cause instanceof Error ? cause.message : String(cause)).split('\n')[0];
  const message = `${name}: the picture is damaged or incomplete: ${reason}`;
  return new UniFlowError('BAD_INPUT', message, { subject: name, cause });
}

/**
 * Writes a picture in the format that the extension names: png, jpg, jpeg or webp. JPEG and WebP are written at
 * quality 95, JPEG without chroma subsampling. The file appears complete or not at all.
 *
 * @throws {UniFlowError} `UNSUPPORTED` for another extension, `BAD_INPUT` for data of the wrong length or a path
 * that cannot be written.
 */
export async function writeImage(path: string, image: RgbImage): Promise<void> {
  const encoded = await encodeImage(path, image);
  const temporary = `${path}.${randomUUID()}.tmp`;
  try {
    await writeFile(temporary, encoded);
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true });
    throw new UniFlowError('BAD_INPUT', `${path}: cannot be written: ${(error as Error).message}`, {
      subject: path,
      cause: error,
    });
  }
}

/** The bytes of the file that {@link writeImage} writes under this name. */
export async function encodeImage(name: string, image: RgbImage): Promise<Buffer> {
  checkLength(image);
  return encoderFor(name)(toSharp(image)).toBuffer();
}

function encoderFor(path: string): (image: Sharp) => Sharp {
  switch (extname(path).toLowerCase()) {
    case '.png':
      return (image) => image.png();
    case '.jpg':
    case '.jpeg':
      return (image) => image.jpeg({ quality: 95, chromaSubsampling: '4:4:4' });
    case '.webp':
      return (image) => image.webp({ quality: 95 });
    default:
      throw UniFlowError.expected('UNSUPPORTED', path, 'a name ending in .png, .jpg, .jpeg or .webp', 'another name');
  }
}

function toSharp({ data, width, height }: RgbImage): Sharp {
  return sharp(data, { raw: { width, height, channels: 3 }, limitInputPixels: false });
}

function checkLength({ data, width, height }: RgbImage): void {
  if (width > 0 && height > 0 && data.length === width * height * 3) return;
  throw UniFlowError.expected('BAD_INPUT', 'image.data', `${width} x ${height} x 3 bytes`, `${data.length}`);
}

/** The pictures in a row from left to right, tops aligned, with a white gap of `gap` pixels between two. */
export function sideBySide(images: readonly RgbImage[], gap = 8): RgbImage {
  images.forEach(checkLength);
  const height = Math.max(0, ...images.map((image) => image.height));
  const width = images.reduce((sum, image) => sum + image.width + gap, -gap);
  if (images.length === 0) throw UniFlowError.expected('BAD_INPUT', 'images', 'at least one picture', 'none');
  const data = new Uint8Array(width * height * 3).fill(255);
  let left = 0;
  for (const image of images) {
    for (let y = 0; y < image.height; ++y) {
      const row = image.data.subarray(y * image.width * 3, (y + 1) * image.width * 3);
      data.set(row, (y * width + left) * 3);
    }
    left += image.width + gap;
  }
  return { data, width, height };
}

/** The pictures of [B,H,W,3] bytes. */
export function picturesOf(images: NdArray): RgbImage[] {
  const [count, height, width] = images.shape as [number, number, number, number];
  const bytes = height * width * 3;
  const data = images.data as unknown as Uint8Array;
  return Array.from({ length: count }, (_, i) => ({ data: data.subarray(i * bytes, (i + 1) * bytes), width, height }));
}
