/** Numbers by id in 12 bytes an entry, for as many ids as there are pictures: the ids themselves are not kept. */
import { createHash } from 'node:crypto';

/** Shares of the table that are used before it doubles. */
const LOAD = 0.6;

/** A hash table with open addressing. Keys are 64 bits of SHA-1: among ten million ids, two meet once in 400,000 runs. */
export class IdTable {
  private keys = new BigUint64Array(1024);
  private values = new Uint32Array(1024);
  private count = 0;

  /** Enters the id. @returns false if it was there. */
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

  /** Where the key is, or the free slot where it belongs. */
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

/** Zero stands for a free slot. */
function keyOf(id: string): bigint {
  return createHash('sha1').update(id).digest().readBigUInt64LE() || 1n;
}
