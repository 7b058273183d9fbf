/** Measures the visibility of patch borders. */

/** Greyscale or RGB bytes, [B,H,W,C]. */
export interface Images {
  data: Uint8Array;
  shape: readonly number[];
}

/**
 * Mean absolute difference of neighbouring pixels across patch borders, divided by that inside patches:
 *
 *   r(x) = mean |x_i − x_j| over neighbours i, j in different patches / mean |x_i − x_j| over neighbours in one patch
 *
 * Neighbours are those to the right and below; the means are over all images and channels.
 */
export function borderRatio({ data, shape }: Images, patch: number): number {
  const [images, height, width, channels] = shape as [number, number, number, number];
  const [across, within] = [
    { sum: 0, count: 0 },
    { sum: 0, count: 0 },
  ];
  const compare = (i: number, j: number, side: typeof across): void => {
    for (let c = 0; c < channels; c++) side.sum += Math.abs((data[i + c] as number) - (data[j + c] as number));
    side.count += channels;
  };
  for (let b = 0; b < images; b++)
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++) {
        const at = ((b * height + y) * width + x) * channels;
        if (x + 1 < width) compare(at, at + channels, (x + 1) % patch === 0 ? across : within);
        if (y + 1 < height) compare(at, at + width * channels, (y + 1) % patch === 0 ? across : within);
      }
  return across.sum / across.count / (within.sum / within.count);
}

/** {@link borderRatio} of the reconstructions divided by that of their originals: 1 if they have no more of a grid than the originals. */
export function seams(reconstructions: Images, originals: Images, patch: number): number {
  return borderRatio(reconstructions, patch) / borderRatio(originals, patch);
}
