/** An image and where it is, as data that another machine understands as well. read.ts reads it from there. */

/** An image to decode: the path of a file, a `file:` URL, or the bytes of a file. */
export type ImageSource = string | URL | Buffer | Uint8Array;

/** A decoded image: 8-bit sRGB, rows from top to bottom, `height * width * 3` bytes. */
export interface RgbImage {
  data: Uint8Array;
  width: number;
  height: number;
}

/** Whether it is decoded already. */
export function isPixels(image: ImageSource | RgbImage): image is RgbImage {
  return typeof image === 'object' && image !== null && 'data' in image;
}

/** A part of a file, in bytes: an entry of an archive. */
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

/** A place where an image was expected, and why there is none. */
export interface Unusable {
  error: string;
}

/** Where an image is. Paths, parts, cells and URLs are plain JSON; pixels and functions stay in this process. */
export type Picture = ImageSource | FilePart | Remote | ParquetCell | Unusable | RgbImage | (() => Promise<ImageSource | RgbImage>);

/** An image with the name that comes back with its latents. */
export interface Item {
  id: string;
  image: Picture;
  /** Its class as the source states it. */
  label?: string | undefined;
}

export type Items = AsyncGenerator<Item, void, undefined>;

/** A file that is passed over, and why. */
export interface Skipped {
  path: string;
  reason: string;
  /** Whether it is, or may be, an image. */
  lost: boolean;
}

/** How sources are read. */
export interface Reading {
  signal?: AbortSignal | undefined;
  /** For a data set: labels are read, and a source that cannot be read to its end rejects. */
  strict?: boolean | undefined;
  /** Named pipes are images as well, for a command that reads each once. */
  pipes?: boolean | undefined;
  skip: (skipped: Skipped) => void;
}

/** The path of the file that has the image; undefined where there is none, or the image is not named by it. */
export function fileOf(image: Picture): string | undefined {
  if (typeof image === 'string') return image;
  if (typeof image !== 'object' || image instanceof URL || image instanceof Uint8Array) return undefined;
  return 'path' in image ? image.path : 'parquet' in image ? image.parquet : undefined;
}
