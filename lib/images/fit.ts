/** Fits an image of any shape to patches: its place, its crop, its padding. */
import { describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import type { OpenImage } from './decode.js';
import { resamplingTo, type ResamplingRule } from '../io/preprocess.js';
import type { Resampling } from '../native.js';
import { gridOf, type Grid } from '../tensor.js';

/**
 * - crop: the model's own preprocessing, as in {@link UniFlow.encode}: fills the model's size and, in most families, cuts off the rest.
 * - pad: fits the whole image into the model's size, at the top left; the rest gets the mean colour.
 * - native: the whole image at its own aspect ratio, with about as many patches as the model's size. Sides are rounded to whole
 *   patches, which changes the aspect ratio by at most half a patch.
 */
export type Fit = 'crop' | 'pad' | 'native';

const FITS: Record<Fit, true> = { crop: true, pad: true, native: true };

export function checkFit(fit: unknown): asserts fit is Fit {
  if (!Object.hasOwn(FITS, fit as string)) throw UniFlowError.expected('BAD_INPUT', 'fit', Object.keys(FITS).join(', '), describe(fit));
}

/** How an image is placed; everything except the grid is in pixels. */
export interface Placement {
  grid: Grid;
  /** The visible part of the image, in its own pixels, if the model's preprocessing is UniFlow's. */
  crop?: { left: number; top: number; width: number; height: number };
  /** Padding added after resizing. */
  padding?: { right: number; bottom: number };
}

/** The size to fit into, and how. */
export interface Target {
  fit: Fit;
  size: readonly [height: number, width: number];
  /** The model's own resizing, for crop. */
  rule: ResamplingRule;
  patch: number;
  /** Colour of the padding: the mean of the encoder's training pixels, in [0, 1]. */
  mean: readonly [number, number, number];
}

type Extent = Pick<OpenImage, 'width' | 'height'>;

export function placementOf(image: Extent, { fit, size, rule, patch }: Target): Placement {
  const grid = gridOf(size, patch);
  const [width, height] = [grid.cols * patch, grid.rows * patch];
  if (fit === 'native') return { grid: nativeGrid(image, grid.rows * grid.cols) };
  if (fit === 'crop') return rule.mode === 'cover' ? { grid, crop: visible(image, size, { width, height }) } : { grid };
  const scaled = inside(image, width, height);
  return { grid, padding: { right: width - scaled.width, bottom: height - scaled.height } };
}

/** A grid of about `patches` patches with the image's aspect ratio. */
function nativeGrid({ width, height }: Extent, patches: number): Grid {
  const side = (ratio: number): number => Math.min(patches, Math.max(1, Math.round(Math.sqrt(patches * ratio))));
  return { rows: side(height / width), cols: side(width / height) };
}

/** The size of the pixel input. A crop may have more than whole patches; the encoder drops the rest. */
export function pixelSize({ grid }: Placement, { fit, size, patch }: Target): readonly [height: number, width: number] {
  return fit === 'crop' ? size : [grid.rows * patch, grid.cols * patch];
}

/** The part of an image that the `patches` cover after it was scaled to cover height x width: native/image/resample.cpp, center_crop. */
function visible(image: Extent, [height, width]: Target['size'], patches: Extent): NonNullable<Placement['crop']> {
  let [w, h] = [image.width, image.height];
  while (w >= 2 * width && h >= 2 * height) [w, h] = [w >> 1, h >> 1];
  const scale = Math.max(width / w, height / h);
  const whole = { width: roundHalfEven(w * scale), height: roundHalfEven(h * scale) };
  const [x, y] = [image.width / whole.width, image.height / whole.height];
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

/** The largest size with the image's aspect ratio inside width x height. */
function inside(image: Extent, width: number, height: number): Extent {
  const scale = Math.min(width / image.width, height / image.height);
  const side = (n: number, most: number): number => Math.min(most, Math.max(1, Math.round(n * scale)));
  return { width: side(image.width, width), height: side(image.height, height) };
}

/** Writes the placed image `into` packed RGB of {@link pixelSize}. */
export async function place(image: OpenImage, placement: Placement, target: Target, into: Uint8Array): Promise<void> {
  const [height, width] = pixelSize(placement, target);
  const { fit, rule, mean } = target;
  const { padding } = placement;
  if (fit === 'crop') return image.resample(into, resamplingTo([height, width], rule));
  if (!padding) return image.resample(into, stretchedTo(width, height));
  const inner = { width: width - padding.right, height: height - padding.bottom };
  if (padding.right === 0) {
    await image.resample(into.subarray(0, 3 * width * inner.height), stretchedTo(width, inner.height));
  } else {
    const pixels = new Uint8Array(3 * inner.width * inner.height);
    await image.resample(pixels, stretchedTo(inner.width, inner.height));
    fill(into, mean);
    const row = 3 * inner.width;
    for (let y = 0; y < inner.height; y++) into.set(pixels.subarray(y * row, (y + 1) * row), 3 * y * width);
  }
  if (padding.bottom > 0) fill(into.subarray(3 * width * inner.height), mean);
}

/** Fills with the colour, by doubling the filled part. */
function fill(into: Uint8Array, colour: readonly number[]): void {
  into.set(colour.map((c) => Math.round(255 * c)));
  for (let done = 3; done < into.length; done *= 2) into.copyWithin(done, 0, Math.min(done, into.length - done));
}

function stretchedTo(width: number, height: number): Resampling {
  return resamplingTo([height, width], { mode: 'stretch', filter: 'bicubic', edgeRatio: 1 });
}
