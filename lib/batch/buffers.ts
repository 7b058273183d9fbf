/** Memory for pixels that goes round: as much as is in use at once, and no more. */
export class Buffers {
  private readonly free: ArrayBuffer[] = [];
  private largest = 0;

  /** Bytes with arbitrary content. */
  take(bytes: number): Uint8Array {
    this.largest = Math.max(this.largest, bytes);
    const last = this.free.pop();
    return new Uint8Array(last && last.byteLength >= bytes ? last : new ArrayBuffer(this.largest), 0, bytes);
  }

  /** They must not be used any more. */
  give(bytes: Uint8Array): void {
    this.free.push(bytes.buffer as ArrayBuffer);
  }
}
