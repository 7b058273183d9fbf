/** Image input: decodes files and bytes to packed RGB. */
import { readFile } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';
import sharp, { type Metadata } from 'sharp';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { native, type Resampling } from '../native.js';
import { isPixels, type ImageSource, type RgbImage } from '../sources/item.js';
import { beginsAsImage } from '../sources/names.js';
import { decodeBmp, isBmp, readBmpHeader } from './bmp.js';
import { readerOf, type ImageLike } from './like.js';
import { isTiff, tiffHasAlpha } from './tiff.js';

export type { ImageSource, RgbImage };

export interface DecodeOptions {
  /** Images with more pixels are refused before they are decoded. The default is 16383 x 16383. */
  maxPixels?: number;
  signal?: AbortSignal;
}

/** An image of known size that may not be decoded yet. */
export interface OpenImage {
  readonly width: number;
  readonly height: number;
  /** Writes the image, resized, `into` packed RGB [height, width, 3]. Errors are those of {@link decodeImage}. */
  resample(into: Uint8Array, to: Resampling): Promise<void>;
}

/** Number of concurrent decodes: several per core, which the CPU's team batches between two operations of a model. */
export const DECODERS = 4 * availableParallelism();

const DEFAULT_MAX_PIXELS = 16383 * 16383;
/** Their bytes fit in an array of 4 GiB. */
const MOST_PIXELS = 2 ** 30;
const FORMATS: readonly string[] = ['jpeg', 'png', 'webp', 'heif', 'tiff', 'gif'];
const FORMATS_TEXT = 'a JPEG, PNG, WebP, AVIF, TIFF, GIF or BMP image';
/** The limit of native.resample. */
const MOST_EDGE = 2 ** 20;
const WHITE = '#ffffff';

/**
 * Decodes an image to packed 8-bit RGB: the first frame, rotated upright by its EXIF orientation, transparency over white, grey and CMYK converted to RGB, 16
 * bits truncated to 8.
 *
 * Pixel values of RGB and grey images are those in the file. Like Pillow, and unlike most viewers, this ignores an embedded color profile, because published
 * models were trained that way. CMYK has no RGB values of its own and is converted by its profile, or by a common one if it has none. Bands of a TIFF that
 * are neither colour nor transparency are dropped. Float, signed and 12-bit samples, and CIELAB, are `UNSUPPORTED`.
 *
 * A damaged or truncated image is an error, never an image with a grey rest.
 *
 * @throws {UniFlowError} `NOT_FOUND`, `BAD_INPUT`, `UNSUPPORTED` or `ABORTED`; the message starts with the path,
 * or with `<buffer>`.
 */
export async function decodeImage(image: ImageLike, options: DecodeOptions = {}): Promise<RgbImage> {
  const source = image instanceof Uint8Array ? image : await readerOf(image, 'image')();
  if (isPixels(source)) return source;
  const jpeg = await plainJpeg(source, options);
  if (!jpeg) return decodeAny(source, options);
  const { width, height } = jpeg;
  const data = Buffer.allocUnsafeSlow(3 * width * height);
  return (await jpeg.decode(data)) ? { data, width, height } : decodeAny(source, options);
}

/**
 * Opens an image file, or decoded pixels, for resizing. The result equals {@link decodeImage} followed by native.resample; if possible, the full image is not
 * stored in between.
 */
export async function openImage(source: ImageSource | RgbImage, options: DecodeOptions = {}): Promise<OpenImage> {
  if (isPixels(source)) return openPixels(source);
  let jpeg = await plainJpeg(source, options);
  if (!jpeg) return openPixels(await decodeAny(source, options));
  const { width, height } = jpeg;
  const resample = async (into: Uint8Array, to: Resampling): Promise<void> => {
    const opened = jpeg ?? (await plainJpeg(source, options));
    jpeg = undefined; // a handle works only once
    if (!(await opened?.decode(into, to))) await openPixels(await decodeAny(source, options)).resample(into, to);
  };
  return { width, height, resample };
}

function openPixels(image: RgbImage): OpenImage {
  checkLength(image);
  const { data, width, height } = image;
  return { width, height, resample: (into, to) => native.resample(data, width, height, into, to) };
}

interface Jpeg {
  width: number;
  height: number;
  /** Can be called once. @returns false if the file is faulty; sharp may tolerate the fault or report it. */
  decode(into: Uint8Array, to?: Resampling): Promise<boolean>;
}

/** The fast path for most images. Undefined: it is another kind of file, or unreadable. */
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
  if (isBmp(bytes)) {
    const header = readBmpHeader(name, bytes);
    checkPixels(name, header, maxPixels);
    return decodeBmp(name, bytes, header);
  }
  const hasAlpha = isTiff(bytes) ? tiffHasAlpha(name, bytes) : true;
  const metadata = await readMetadata(name, bytes);
  checkPixels(name, metadata, maxPixels);
  throwIfAborted(signal);
  try {
    const image = sharp(bytes, {
      failOn: 'error', // also for truncated data, but not for a JPEG with harmless bytes between its segments
      limitInputPixels: false, // checked above, with a better message
      ignoreIcc: metadata.space !== 'cmyk',
    }).autoOrient();
    const { data, info } = await (hasAlpha ? image.flatten({ background: WHITE }) : image.removeAlpha())
      .toColourspace('srgb')
      .raw({ depth: 'uchar' })
      .toBuffer({ resolveWithObject: true });
    throwIfAborted(signal);
    const { width, height, channels } = info;
    if (channels !== 3 || data.length !== 3 * width * height)
      throw UniFlowError.expected(
        'UNSUPPORTED',
        name,
        'grey, RGB or CMYK, maybe with transparency',
        `${metadata.channels} bands of ${metadata.space}`,
      );
    return { data, width, height };
  } catch (error) {
    if (error instanceof UniFlowError) throw error;
    throw undecodable(name, error);
  }
}

/** Reads the file here rather than in libvips, which caches by path and reports a missing file as a damaged one. */
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
  if (!beginsAsImage(bytes))
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

function checkPixels(name: string, { width, height }: Pick<Metadata, 'width' | 'height'>, maxPixels: number): void {
  if (Math.max(width, height) > MOST_EDGE)
    throw UniFlowError.expected('BAD_INPUT', name, `at most ${MOST_EDGE} pixels a side`, `${width} x ${height}`);
  const pixels = width * height;
  if (pixels <= maxPixels) return;
  const expected = `at most ${maxPixels} pixels (raise the option maxPixels to allow more)`;
  throw UniFlowError.expected('BAD_INPUT', name, expected, `${pixels} (${width} x ${height})`);
}

function undecodable(name: string, cause: unknown): UniFlowError {
  // libvips repeats itself over several lines; the first one suffices.
  const reason = (cause instanceof Error ? cause.message : String(cause)).split('\n')[0];
  if (reason?.endsWith('JPEG data precision 12')) return UniFlowError.expected('UNSUPPORTED', name, 'a JPEG of 8 bits', '12 bits', cause);
  const message = `${name}: the image is damaged or incomplete: ${reason}`;
  return new UniFlowError('BAD_INPUT', message, { subject: name, cause });
}

/** @throws {UniFlowError} `BAD_INPUT` if the length of the data does not match the image's size. */
export function checkLength({ data, width, height }: RgbImage): void {
  if (width > 0 && height > 0 && data.length === width * height * 3) return;
  throw UniFlowError.expected('BAD_INPUT', 'image.data', `${width} x ${height} x 3 bytes`, `${data.length}`);
}
