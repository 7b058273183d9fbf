/** Reads an image from the location in its item. */
import { throwIfAborted, UniFlowError } from '../errors.js';
import { refuseEndless } from './files.js';
import type { ImageSource, ItemImage, RgbImage } from './item.js';
import { loadParquet } from './load-parquet.js';
import { readEntry } from './tar.js';
import { download, type DownloadOptions } from './url.js';

/** Input of the decoder: a path, a file URL, bytes, or pixels. */
export async function readItemImage(image: ItemImage, options: DownloadOptions): Promise<ImageSource | RgbImage> {
  throwIfAborted(options.signal);
  if (typeof image === 'function') return image();
  if (typeof image === 'string') await refuseEndless(image);
  if (typeof image === 'string' || image instanceof URL || image instanceof Uint8Array || 'data' in image) return image;
  if ('error' in image) throw new UniFlowError('BAD_INPUT', image.error);
  if ('url' in image) return download(image.url, options);
  if ('parquet' in image) return (await loadParquet()).readCell(image);
  return readEntry(image.path, image);
}
