/** Work on what comes next, while the caller uses what came before. */

/**
 * Results of `work` in the order of `items`. While one is used, the work on up to `count` further ones is under way. Leaving the loop, or an
 * error, waits for all of it.
 */
export async function* ahead<T, R>(
  items: Iterable<T> | AsyncIterable<T>,
  count: number,
  work: (item: T) => Promise<R>,
): AsyncGenerator<R, void, undefined> {
  const underWay: Promise<R>[] = [];
  try {
    for await (const item of items) {
      underWay.push(handled(work(item)));
      if (underWay.length > count) yield await (underWay.shift() as Promise<R>);
    }
    for (let next = underWay.shift(); next; next = underWay.shift()) yield await next;
  } finally {
    await Promise.allSettled(underWay);
  }
}

/** It is awaited, but maybe only after others have been. */
export function handled<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => undefined);
  return promise;
}
