/** Detects the kind of a file by its name, or by its first bytes if the name is inconclusive. */
import { open } from 'node:fs/promises';
import { basename } from 'node:path';

/** Kinds of files that hold images. A file of unknown kind is treated as an image; reading it reports the error. */
export type Format = 'stdin' | 'tar' | 'tar.gz' | 'parquet' | 'idx' | 'list' | 'jsonl' | 'image';

const FORMATS: readonly (readonly [Exclude<Format, 'image' | 'stdin'>, RegExp])[] = [
  ['tar', /\.tar$/i],
  ['tar.gz', /\.(tar\.gz|tgz)$/i],
  ['parquet', /\.parquet$/i],
  ['idx', /images[-.]idx3[-.]ubyte(\.gz)?$/],
  ['list', /\.(txt|csv|tsv)$/i],
  ['jsonl', /\.(jsonl|ndjson)$/i],
];

export function formatOf(path: string): Format {
  return FORMATS.find(([, pattern]) => pattern.test(path))?.[0] ?? 'image';
}

/** Whether a file of this format holds many images with ids of their own. */
export function isArchive(path: string): boolean {
  return ['tar', 'tar.gz', 'parquet'].includes(formatOf(path));
}

/**
 * Extensions of decodable formats, then of recognised formats without a decoder: images in those fail with an error that names the format.
 */
const IMAGE = /\.(jpe?g|jpe|jfif|pjpe?g|a?png|webp|avif|tiff?|gif|bmp|dib)$/i;
const UNDECODABLE = /\.(hei[cf]s?|hif|jxl|jp2|j2k|jpx|psd|tga|exr|hdr|p[bgnp]m|dng|cr[23]|nef|arw|raf|orf|rw2)$/i;
/** Extensions of files that are not images, so that they need not be opened. */
const OTHER =
  /\.(txt|md|csv|tsv|jsonl?|ndjson|xml|ya?ml|html?|pdf|log|ini|toml|db|py|js|ts|sh|svg|ico|npy|npz|pt|pth|bin|pkl|safetensors|onnx|parquet|arrow|tar|t?gz|zip|7z|rar|mp[34]|mov|avi|mkv|webm|wav|flac)$/i;

/** Whether a file name is that of an image, including formats that cannot be decoded. */
export function isImageName(name: string): boolean {
  return IMAGE.test(name) || UNDECODABLE.test(name);
}

/** Whether an unreadable file may have contained images. */
export function mayBeImages(path: string): boolean {
  return isArchive(path) || !OTHER.test(path);
}

/** Signatures of the decodable formats, as Latin-1. Files without one are not passed to a decoder. */
const BEGINNING = /^(\xff\xd8|\x89PNG|RIFF.{4}WEBP|GIF8|II[*+]\0|MM\0[*+]|.{4}ftyp|BM.{4}\0\0\0\0)/s;
const BEGINNING_BYTES = 16;

export function beginsAsImage(bytes: Uint8Array): boolean {
  return BEGINNING.test(Buffer.from(bytes.subarray(0, BEGINNING_BYTES)).toString('latin1'));
}

/** Whether a file is an image: by its name, or by its first bytes if the name is inconclusive. */
export async function isImageFile(path: string): Promise<boolean> {
  if (isImageName(path)) return true;
  if (OTHER.test(path)) return false;
  const file = await open(path).catch(() => undefined);
  try {
    const { buffer, bytesRead } = (await file?.read(Buffer.alloc(BEGINNING_BYTES), 0, BEGINNING_BYTES, 0)) ?? { bytesRead: 0 };
    return buffer !== undefined && beginsAsImage(buffer.subarray(0, bytesRead));
  } catch {
    return false;
  } finally {
    await file?.close();
  }
}

/** A file's base name without its last extension. */
export function stemOf(path: string): string {
  return basename(path).replace(/\.[^.]*$/, '');
}

/** The kind of a file for counting: `.txt`, or `no extension`. */
export function kindOf(path: string): string {
  return /\.(tar\.gz|[^./]+)$/i.exec(basename(path))?.[0].toLowerCase() ?? 'no extension';
}
