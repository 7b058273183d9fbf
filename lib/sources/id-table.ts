/** Maps ids to numbers in 12 bytes per entry, because the ids of all images may not fit in memory. */
import { createHash } from 'node:crypto';

/** Maximum load factor before the table doubles. */
const LOAD = 0.6;

/** A hash table with open addressing. Keys are 64 bits of SHA-1: with ten million ids, the chance of a collision is 1 in 400,000. */
export class IdTable {
  private keys = new BigUint64Array(1024);
  private values = new Uint32Array(1024);
  private count = 0;

  /** Adds the id. @returns false if it is already present. */
  add(id: string, value: number): boolean {
    if (this.count >= LOAD * this.keys.length) this.grow();
    const key = keyOf(id);
    const slot = this.slotOf(key);
    if (this.keys[slot] !== 0n) return false;
    this.keys[slot] = key;
    this.values[slot] = value;
    this.count++;
    return true;
  }

  get(id: string): number | undefined {
    const slot = this.slotOf(keyOf(id));
    return this.keys[slot] === 0n ? undefined : this.values[slot];
  }

  /** The slot of the key, or the free slot to insert it. */
  private slotOf(key: bigint): number {
    const mask = this.keys.length - 1;
    let slot = Number(key & BigInt(mask));
    while (this.keys[slot] !== 0n && this.keys[slot] !== key) slot = (slot + 1) & mask;
    return slot;
  }

  private grow(): void {
    const { keys, values } = this;
    this.keys = new BigUint64Array(2 * keys.length);
    this.values = new Uint32Array(2 * keys.length);
    for (const [i, key] of keys.entries()) {
      if (key === 0n) continue;
      const slot = this.slotOf(key);
      this.keys[slot] = key;
      this.values[slot] = values[i] as number;
    }
  }
}

/** Zero marks a free slot, so it is never a key. */
function keyOf(id: string): bigint {
  return createHash('sha1').update(id).digest().readBigUInt64LE() || 1n;
}
