/** Memory beyond this limit is left to the garbage collector. */
const MOST_KEPT_BYTES = 128 << 20;

/**
 * A pool of pixel buffers, as large as the memory in use at once. V8 counts memory outside its heap and collects garbage every few megabytes of it, which
 * costs more than decoding an image.
 */
export class Buffers {
  private readonly free: ArrayBuffer[] = [];
  private kept = 0;

  /** A buffer with undefined content. */
  take(bytes: number): Uint8Array {
    const last = this.free.pop();
    if (last) this.kept -= last.byteLength;
    const fits = last && last.byteLength >= bytes && last.byteLength <= 2 * bytes;
    return new Uint8Array(fits ? last : new ArrayBuffer(bytes), 0, bytes);
  }

  /** Returns a buffer, which must not be used afterwards. */
  give(bytes: Uint8Array): void {
    const buffer = bytes.buffer as ArrayBuffer;
    if (this.kept + buffer.byteLength > MOST_KEPT_BYTES) return;
    this.kept += buffer.byteLength;
    this.free.push(buffer);
  }
}
