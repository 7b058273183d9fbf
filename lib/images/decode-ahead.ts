/** Decodes images ahead of the caller, a bounded number at a time. A broken image does not affect the others. */
import pLimit from 'p-limit';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { MissingPackageError } from '../optional.js';
import { prefetch, untilAborted } from '../prefetch.js';
import type { ImageSource, Item, RgbImage } from '../sources/item.js';
import { readItemImage } from '../sources/read.js';
import type { DownloadOptions } from '../sources/url.js';
import { DECODERS } from './decode.js';

/** An image that could not be read. */
export interface DecodeFailure {
  id: string;
  error: UniFlowError;
}

export interface DecodeAhead<T extends Item, R> {
  /** Number of further items in progress while one is used. */
  count: number;
  /** Decodes an image that has been read, as for openImage. */
  prepare: (image: ImageSource | RgbImage, item: T) => Promise<R>;
  download?: Omit<DownloadOptions, 'signal'> | undefined;
  signal?: AbortSignal | undefined;
}

/** One limit for the whole process, because an image of 64 megapixels is 192 MB. */
const decoding = pLimit(DECODERS);
/** Errors of exhausted system resources, which are not the fault of an image. */
const EXHAUSTED = new Set(['EMFILE', 'ENFILE', 'ENOMEM', 'OUT_OF_MEMORY']);

/**
 * Yields the result of `prepare` for each item, in order; for an unreadable one, the failure.
 * @throws {UniFlowError} `ABORTED`; an error if the system is out of memory or files, or if the images need a package that is not installed; and
 * whatever the items throw.
 */
export async function* decodeAhead<T extends Item, R extends object>(
  items: Iterable<T> | AsyncIterable<T>,
  options: DecodeAhead<T, R>,
): AsyncGenerator<R | DecodeFailure, void, undefined> {
  yield* prefetch(untilAborted(items, options.signal), options.count, (item) => decodeItem(item, options));
}

async function decodeItem<T extends Item, R>(item: T, { prepare, download, signal }: DecodeAhead<T, R>): Promise<R | DecodeFailure> {
  throwIfAborted(signal);
  try {
    const image = await readItemImage(item.image, { ...download, signal });
    return await decoding(() => {
      throwIfAborted(signal);
      return prepare(image, item);
    });
  } catch (error) {
    throwIfAborted(signal);
    if (isFatal(error)) throw error;
    return { id: item.id, error: named(error, item.id) };
  }
}

/** Whether all further images would fail in the same way. */
function isFatal(error: unknown): boolean {
  const { code, cause } = error as NodeJS.ErrnoException;
  const codes = [code, (cause as NodeJS.ErrnoException | undefined)?.code];
  return error instanceof MissingPackageError || codes.some((c) => EXHAUSTED.has(c ?? ''));
}

/** Images that are not files of their own are named by their id. */
function named(error: unknown, id: string): UniFlowError {
  if (!(error instanceof UniFlowError)) return new UniFlowError('BAD_INPUT', (error as Error).message, { cause: error });
  if (error.subject !== '<buffer>') return error;
  return new UniFlowError(error.code, error.message.replace('<buffer>', id), { ...error, subject: id, cause: error.cause });
}
