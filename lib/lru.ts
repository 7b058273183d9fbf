/** Values by key, made once; those used last are kept. A value that fails is made again. */
export class Lru<V> {
  private readonly values = new Map<string, Promise<V>>();

  constructor(public capacity: number) {}

  get(key: string | number, make: () => Promise<V>): Promise<V> {
    const name = String(key);
    const value = this.values.get(name) ?? make();
    this.values.delete(name);
    this.values.set(name, value);
    value.catch(() => this.values.get(name) === value && this.values.delete(name));
    for (const oldest of this.values.keys()) {
      if (this.values.size <= this.capacity) break;
      this.values.delete(oldest);
    }
    return value;
  }
}
