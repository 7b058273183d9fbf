/** Where a picture is, as data that another machine understands as well, and how it is read from there. */
import { refuseEndless } from './files.js';
import { readEntry } from './tar.js';
import { UniFlowError } from '../errors.js';
import type { ImageSource, RgbImage } from '../images/decode.js';
import { download, type DownloadOptions } from './url.js';
import type { ParquetCell } from './parquet.js';

/** A part of a file, in bytes: what lies in an archive. */
export interface FilePart {
  path: string;
  offset: number;
  size: number;
}

/** A picture to download. */
export interface Remote {
  url: string;
}

/** What is known to be no picture, and why. */
export interface Unusable {
  error: string;
}

/** Where a picture is. Paths, parts, cells and URLs are plain JSON; pictures and functions only go where the process goes. */
export type Picture = ImageSource | FilePart | Remote | ParquetCell | Unusable | RgbImage | (() => Promise<ImageSource | RgbImage>);

/** A picture with the name that comes back with its latents. */
export interface Item {
  id: string;
  image: Picture;
}

/** The path of the file that has the picture; undefined where there is none, or the picture is not named by it. */
export function fileOf(picture: Picture): string | undefined {
  if (typeof picture === 'string') return picture;
  if (typeof picture !== 'object' || picture instanceof URL || picture instanceof Uint8Array) return undefined;
  return 'path' in picture ? picture.path : 'parquet' in picture ? picture.parquet : undefined;
}

/** What {@link decodeImage} takes, or pixels. Paths are left to it. */
export async function readPicture(picture: Picture, options: DownloadOptions): Promise<ImageSource | RgbImage> {
  if (typeof picture === 'function') return picture();
  if (typeof picture === 'string') await refuseEndless(picture);
  if (typeof picture === 'string' || picture instanceof URL || picture instanceof Uint8Array || 'data' in picture) return picture;
  if ('error' in picture) throw new UniFlowError('BAD_INPUT', picture.error);
  if ('url' in picture) return download(picture.url, options);
  if ('parquet' in picture) return (await import('./parquet.js')).readCell(picture);
  return readEntry(picture.path, picture);
}
