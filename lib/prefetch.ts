/** Prefetching: work on later items runs while the caller uses earlier results. */
import { aborted, throwIfAborted } from './errors.js';

/**
 * Yields the results of `work` in the order of `items`. While the caller uses one, up to `count` later ones are being computed. Leaving the loop, or an
 * error, waits for all of them.
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

/** Yields the items until `signal` fires, and then stops waiting, even for an item that may never come. @throws {UniFlowError} `ABORTED`. */
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
    if (!signal.aborted) await closing; // after an abort this could wait for the pending item
  }
}

/** Adds one listener per wait. Racing a shared abort promise would leak one reaction per item. */
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

/** Marks a promise as handled, because it may be awaited only after others. */
export function ignoreRejection<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => undefined);
  return promise;
}
