/** Small labelled images in memory, decoded once, with augmentations for training a teacher. */
import ndarray, { type NdArray } from 'ndarray';
import { batches } from '../../lib/train/loader.js';
import type { Dataset } from '../../lib/sources/dataset.js';

export class Labelled {
  private constructor(
    private readonly bytes: Uint8Array,
    readonly labels: Int32Array,
    /** Height and width. */
    readonly side: number,
  ) {}

  /** Reads all images of a data set, resized to `side`. */
  static async read(data: Dataset, side: number): Promise<Labelled> {
    const bytes = new Uint8Array(data.length * 3 * side ** 2);
    const labels = new Int32Array(data.length);
    let done = 0;
    for await (const batch of batches(data, { batchSize: 512, size: side, crop: 'center', epochs: 1 })) {
      bytes.set(batch.pixels.data, done * 3 * side ** 2);
      labels.set(batch.labels as Int32Array, done);
      done += batch.ids.length;
    }
    return new Labelled(bytes, labels, side);
  }

  get count(): number {
    return this.labels.length;
  }

  /** uint8 [B,H,W,3], a copy. */
  pixels(indices: readonly number[]): NdArray<Uint8Array> {
    const { side } = this;
    const size = 3 * side ** 2;
    const data = new Uint8Array(indices.length * size);
    indices.forEach((index, i) => data.set(this.bytes.subarray(index * size, (index + 1) * size), i * size));
    return ndarray(data, [indices.length, side, side, 3]);
  }
}

/**
 * Shifts each image by a whole number of pixels, from −shift to shift, fills the rest with black (a crop of the padded image), and mirrors
 * every other one. @param draws three for each image, on [0, 1).
 */
export function augment(
  pixels: NdArray<Uint8Array>,
  { shift, flip }: { shift: number; flip: boolean },
  draws: Float64Array,
): NdArray<Uint8Array> {
  const [count, side] = pixels.shape as [number, number];
  const out = new Uint8Array(pixels.size);
  for (let i = 0; i < count; i++) {
    const [down, right] = [0, 1].map((at) => Math.floor((draws[3 * i + at] as number) * (2 * shift + 1)) - shift) as [number, number];
    const mirrored = flip && (draws[3 * i + 2] as number) < 0.5;
    for (let y = 0; y < side; y++)
      for (let x = 0; x < side; x++) {
        const [row, column] = [y - down, (mirrored ? side - 1 - x : x) - right];
        if (row < 0 || row >= side || column < 0 || column >= side) continue;
        const [to, from] = [3 * ((i * side + y) * side + x), 3 * ((i * side + row) * side + column)];
        for (let c = 0; c < 3; c++) out[to + c] = pixels.data[from + c] as number;
      }
  }
  return ndarray(out, [...pixels.shape]);
}

/**
 * Fills a box of each image from the previous image in the batch; the first takes it from the last. All images share the box, which has
 * uniform area and position and is clipped at the borders. @param draws three, on [0, 1). @returns the fraction of the area that was
 * pasted.
 */
export function paste(pixels: NdArray<Uint8Array>, draws: ArrayLike<number>): number {
  const [count, side] = pixels.shape as [number, number];
  const [area, y, x] = [draws[0] as number, draws[1] as number, draws[2] as number];
  const half = (side * Math.sqrt(area)) / 2;
  const range = (middle: number): [number, number] => [
    Math.max(0, Math.round(middle * side - half)),
    Math.min(side, Math.round(middle * side + half)),
  ];
  const [[top, bottom], [left, right]] = [range(y), range(x)];
  const before = Uint8Array.from(pixels.data);
  const size = 3 * side ** 2;
  for (let i = 0; i < count; i++)
    for (let row = top; row < bottom; row++) {
      const [begin, end] = [3 * (row * side + left), 3 * (row * side + right)];
      const source = size * ((i + count - 1) % count);
      pixels.data.set(before.subarray(source + begin, source + end), i * size + begin);
    }
  return ((bottom - top) * (right - left)) / side ** 2;
}
