/** At most `count` of `length` indices, evenly spaced because folders are sorted by class. */
export function evenlySpaced(length: number, count: number): number[] {
  const kept = Math.min(length, count);
  return Array.from({ length: kept }, (_, i) => Math.floor((i * length) / kept));
}
