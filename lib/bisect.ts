/** Index of the last value <= `x` in ascending values, the first of which is <= `x`. */
export function lastNotAbove(values: ArrayLike<number>, x: number): number {
  let [low, high] = [0, values.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if ((values[middle] as number) <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}
