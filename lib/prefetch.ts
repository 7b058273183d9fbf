/** Work on what comes next, while the caller uses what came before. */
import { aborted, throwIfAborted } from './errors.js';

/**
 * Results of `work` in the order of `items`. While one is used, the work on up to `count` further ones is under way. Leaving the loop, or an
 * error, waits for all of it.
 */
export async function* prefetch<T, R>(
  items: Iterable<T> | AsyncIterable<T>,
  count: number,
  work: (item: T) => Promise<R>,
): AsyncGenerator<R, void, undefined> {
  const underWay: Promise<R>[] = [];
  try {
    for await (const item of items) {
      underWay.push(ignoreRejection(work(item)));
      if (underWay.length > count) yield await (underWay.shift() as Promise<R>);
    }
    for (let next = underWay.shift(); next; next = underWay.shift()) yield await next;
  } finally {
    await Promise.allSettled(underWay);
  }
}

/** The items, until `signal` fires: then nobody waits any longer for one that may never come. @throws {UniFlowError} `ABORTED`. */
export async function* untilAborted<T>(
  items: Iterable<T> | AsyncIterable<T>,
  signal: AbortSignal | undefined,
): AsyncGenerator<T, void, undefined> {
  if (!signal) {
    yield* items;
    return;
  }
  const iterator: Iterator<T> | AsyncIterator<T> = Symbol.asyncIterator in items ? items[Symbol.asyncIterator]() : items[Symbol.iterator]();
  let ended = false;
  try {
    for (;;) {
      const next = await unlessAborted(iterator.next(), signal);
      ended = next.done === true;
      if (next.done) return;
      yield next.value;
    }
  } finally {
    const closing = ended ? undefined : ignoreRejection(Promise.resolve(iterator.return?.()));
    if (!signal.aborted) await closing; // or it may wait for the item as well
  }
}

/** Listens for this one alone: what a promise of the abort was asked once for each item would be kept as long as the signal. */
async function unlessAborted<T>(value: T | PromiseLike<T>, signal: AbortSignal): Promise<T> {
  throwIfAborted(signal);
  let stop: (() => void) | undefined;
  try {
    return await new Promise<T>((resolve, reject) => {
      stop = () => reject(aborted(signal));
      signal.addEventListener('abort', stop);
      Promise.resolve(value).then(resolve, reject);
    });
  } finally {
    signal.removeEventListener('abort', stop as () => void);
  }
}

/** It is awaited, but maybe only after others have been. */
export function ignoreRejection<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => undefined);
  return promise;
}
