/** More than this is left to the garbage collector. */
const MOST_KEPT_BYTES = 128 << 20;

/**
 * Memory for pixels that goes round: as much as is in use at once. V8 counts what lies outside its heap, and collects garbage every few
 * megabytes of it, which costs more than decoding a picture.
 */
export class Buffers {
  private readonly free: ArrayBuffer[] = [];
  private kept = 0;

  /** Bytes with arbitrary content. */
  take(bytes: number): Uint8Array {
    const last = this.free.pop();
    if (last) this.kept -= last.byteLength;
    const fits = last && last.byteLength >= bytes && last.byteLength <= 2 * bytes;
    return new Uint8Array(fits ? last : new ArrayBuffer(bytes), 0, bytes);
  }

  /** They must not be used any more. */
  give(bytes: Uint8Array): void {
    const buffer = bytes.buffer as ArrayBuffer;
    if (this.kept + buffer.byteLength > MOST_KEPT_BYTES) return;
    this.kept += buffer.byteLength;
    this.free.push(buffer);
  }
}
