/** The last index whose value is not above `x`, in ascending values that begin with one not above it. */
export function lastNotAbove(values: ArrayLike<number>, x: number): number {
  let [low, high] = [0, values.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if ((values[middle] as number) <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}
