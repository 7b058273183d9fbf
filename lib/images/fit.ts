/** How a picture of any shape becomes patches: where it goes, what is cut off, what is added. */
import { describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import type { OpenImage } from './decode.js';
import type { Resampling } from '../native.js';
import { gridOf, type Grid } from '../tensor.js';

/**
 * - crop: fills the model's size and cuts off what is over, as {@link UniFlow.encode} does.
 * - pad: the whole picture in the model's size, at the top left; the rest has the mean colour.
 * - native: the whole picture at its own aspect ratio, in about as many patches as the model's size has. Sides are rounded to whole
 *   patches, which changes the aspect by half a patch at most.
 */
export type Fit = 'crop' | 'pad' | 'native';

const FITS: Record<Fit, true> = { crop: true, pad: true, native: true };

export function checkFit(fit: unknown): asserts fit is Fit {
  if (!Object.hasOwn(FITS, fit as string)) throw UniFlowError.expected('BAD_INPUT', 'fit', Object.keys(FITS).join(', '), describe(fit));
}

/** What is made of a picture; all but the grid in pixels. */
export interface Placement {
  grid: Grid;
  /** What is seen of the picture, in its own pixels. */
  crop?: { left: number; top: number; width: number; height: number };
  /** What is added to the picture when it has its size. */
  padding?: { right: number; bottom: number };
}

/** The size to fit into, and how. */
export interface Target {
  fit: Fit;
  size: readonly [height: number, width: number];
  patch: number;
  /** The colour of padding: the mean of the pixels that the encoder was trained on, in [0, 1]. */
  mean: readonly [number, number, number];
}

type Extent = Pick<OpenImage, 'width' | 'height'>;

export function placementOf(picture: Extent, { fit, size, patch }: Target): Placement {
  const grid = gridOf(size, patch);
  const [width, height] = [grid.cols * patch, grid.rows * patch];
  if (fit === 'native') return { grid: nativeGrid(picture, grid.rows * grid.cols) };
  if (fit === 'crop') return { grid, crop: visible(picture, size, { width, height }) };
  const scaled = inside(picture, width, height);
  return { grid, padding: { right: width - scaled.width, bottom: height - scaled.height } };
}

/** About `patches` patches, with the aspect ratio of the picture. */
function nativeGrid({ width, height }: Extent, patches: number): Grid {
  const side = (ratio: number): number => Math.min(patches, Math.max(1, Math.round(Math.sqrt(patches * ratio))));
  return { rows: side(height / width), cols: side(width / height) };
}

/** The size of the pixels that are computed with. Those of a crop may have more than whole patches, which the encoder cuts off. */
export function pixelSize({ grid }: Placement, { fit, size, patch }: Target): readonly [height: number, width: number] {
  return fit === 'crop' ? size : [grid.rows * patch, grid.cols * patch];
}

/** What the `patches` show of a picture that covers height x width: native/image/resample.cpp, center_crop. */
function visible(picture: Extent, [height, width]: Target['size'], patches: Extent): NonNullable<Placement['crop']> {
  let [w, h] = [picture.width, picture.height];
  while (w >= 2 * width && h >= 2 * height) [w, h] = [w >> 1, h >> 1];
  const scale = Math.max(width / w, height / h);
  const whole = { width: roundHalfEven(w * scale), height: roundHalfEven(h * scale) };
  const [x, y] = [picture.width / whole.width, picture.height / whole.height];
  const exact = {
    left: ((whole.width - width) >> 1) * x,
    top: ((whole.height - height) >> 1) * y,
    width: patches.width * x,
    height: patches.height * y,
  };
  return Object.fromEntries(Object.entries(exact).map(([name, n]) => [name, Math.round(n * 1000) / 1000])) as typeof exact;
}

function roundHalfEven(x: number): number {
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

/** The largest size with the picture's aspect inside width x height. */
function inside(picture: Extent, width: number, height: number): Extent {
  const scale = Math.min(width / picture.width, height / picture.height);
  const side = (n: number, most: number): number => Math.min(most, Math.max(1, Math.round(n * scale)));
  return { width: side(picture.width, width), height: side(picture.height, height) };
}

/** Writes the picture as it is placed `into` packed RGB of {@link pixelSize}. */
export async function place(picture: OpenImage, placement: Placement, target: Target, into: Uint8Array): Promise<void> {
  const [height, width] = pixelSize(placement, target);
  const { fit, mean } = target;
  const { padding } = placement;
  if (!padding) return picture.resample(into, to(width, height, fit === 'crop' ? 'cover' : 'stretch'));
  const inner = { width: width - padding.right, height: height - padding.bottom };
  if (padding.right === 0) {
    await picture.resample(into.subarray(0, 3 * width * inner.height), to(width, inner.height, 'stretch'));
  } else {
    const pixels = new Uint8Array(3 * inner.width * inner.height);
    await picture.resample(pixels, to(inner.width, inner.height, 'stretch'));
    fill(into, mean);
    const row = 3 * inner.width;
    for (let y = 0; y < inner.height; y++) into.set(pixels.subarray(y * row, (y + 1) * row), 3 * y * width);
  }
  if (padding.bottom > 0) fill(into.subarray(3 * width * inner.height), mean);
}

/** Repeats the colour, doubling what is there. */
function fill(into: Uint8Array, colour: readonly number[]): void {
  into.set(colour.map((c) => Math.round(255 * c)));
  for (let done = 3; done < into.length; done *= 2) into.copyWithin(done, 0, Math.min(done, into.length - done));
}

function to(width: number, height: number, mode: Resampling['mode']): Resampling {
  return { width, height, mode, edge: Math.max(width, height), filter: 'bicubic' };
}
