/** A cache that keeps the most recently used values within its capacity. Each value is made once; a failed one is made again. */
export class Lru<V> {
  private readonly values = new Map<string, { value: Promise<V>; size: number }>();
  private total = 0;

  /** @param capacity upper bound of the summed sizes. @param sizeOf size of a value. Default: 1, so the capacity is a number of values. */
  constructor(
    public capacity: number,
    private readonly sizeOf: (value: V) => number = () => 1,
  ) {}

  get(key: string | number, make: () => Promise<V>): Promise<V> {
    const name = String(key);
    const entry = this.values.get(name) ?? this.add(name, make());
    this.values.delete(name);
    this.values.set(name, entry);
    return entry.value;
  }

  has(key: string | number): boolean {
    return this.values.has(String(key));
  }

  private add(name: string, value: Promise<V>): { value: Promise<V>; size: number } {
    const entry = { value, size: 0 };
    value.then(
      (made) => {
        if (this.values.get(name) !== entry) return; // dropped while it was being made
        this.total += entry.size = this.sizeOf(made);
        this.trim();
      },
      () => this.values.get(name) === entry && this.values.delete(name),
    );
    return entry;
  }

  private trim(): void {
    for (const [oldest, { size }] of this.values) {
      if (this.total <= this.capacity) break;
      this.total -= size;
      this.values.delete(oldest);
    }
  }
}
