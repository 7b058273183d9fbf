/** An image and its location, in a form that other machines can read as well. read.ts reads it. */
import { fileURLToPath } from 'node:url';

/** An image to decode: the path of a file, a `file:` URL, or the bytes of a file. */
export type ImageSource = string | URL | Buffer | Uint8Array;

/** A decoded image: 8-bit sRGB, rows from top to bottom, `height * width * 3` bytes. */
export interface RgbImage {
  data: Uint8Array;
  width: number;
  height: number;
}

/** Whether the image is already decoded. */
export function isPixels(image: ImageSource | RgbImage): image is RgbImage {
  return typeof image === 'object' && image !== null && 'data' in image;
}

/** A byte range of a file: an entry of an archive. */
export interface FilePart {
  path: string;
  offset: number;
  size: number;
}

/** One image of a Parquet file. */
export interface ParquetCell {
  parquet: string;
  column: string;
  row: number;
}

/** An image to download. */
export interface Remote {
  url: string;
}

/** A missing image, with the reason. */
export interface Unusable {
  error: string;
}

/** Location of an image. Paths, parts, cells and URLs are plain JSON; pixels and functions stay in this process. */
export type ItemImage = ImageSource | FilePart | Remote | ParquetCell | Unusable | RgbImage | (() => Promise<ImageSource | RgbImage>);

/** An image with the id that is returned with its latents. */
export interface Item {
  id: string;
  image: ItemImage;
  /** Class as stated by the source. */
  label?: string | undefined;
}

export type Items = AsyncGenerator<Item, void, undefined>;

/** A skipped file and the reason. */
export interface Skipped {
  path: string;
  reason: string;
  /** Whether the file is, or may be, an image. */
  lost: boolean;
}

/** Options for reading sources. */
export interface Reading {
  signal?: AbortSignal | undefined;
  /** For a data set: reads labels, and rejects if the source cannot be read to the end. */
  strict?: boolean | undefined;
  /** Also accepts named pipes as images, for commands that read each only once. */
  pipes?: boolean | undefined;
  skip: (skipped: Skipped) => void;
}

/** Path of the file that contains the image; undefined for other kinds of images. */
export function fileOf(image: ItemImage): string | undefined {
  if (typeof image === 'string') return image;
  if (image instanceof URL) return pathOf(image);
  if (typeof image !== 'object' || image instanceof Uint8Array) return undefined;
  return 'path' in image ? image.path : 'parquet' in image ? image.parquet : undefined;
}

function pathOf(url: URL): string | undefined {
  try {
    return fileURLToPath(url);
  } catch {
    return undefined; // not a file; reading it reports the reason
  }
}
