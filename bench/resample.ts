/**
 * Resizes images to an encoder's input size. The bound is reading the cropped part of the image and writing the crop with the bandwidth of
 * all threads; a call runs on one thread and computes with every byte.
 */
import { native } from '../lib/native.js';
import type { Row } from './harness.js';
import { noisePixels } from './inputs.js';

interface Crop {
  from: readonly [width: number, height: number];
  side: number;
  mode: 'cover' | 'shortest_edge';
  /** The shortest edge after resizing. */
  edge: number;
}

function row({ from: [width, height], side, mode, edge }: Crop): Row {
  const seen = Math.floor((Math.min(width, height) * side) / edge); // edge of the square inside the crop
  return {
    ...{ family: 'resample', name: mode, shape: `${width}x${height}->${side}x${side}`, dtype: 'uint8', images: 1 },
    cost: { bytes: 3 * (seen * seen + side * side) },
    setup: () => {
      const pixels = noisePixels(width * height);
      const into = new Uint8Array(3 * side * side);
      const options = { width: side, height: side, mode, edge, filter: 'bicubic' as const };
      return () => native.resample(pixels, width, height, into, options);
    },
  };
}

export const rows: Row[] = [
  row({ from: [4000, 3000], side: 448, mode: 'cover', edge: 448 }),
  row({ from: [1100, 733], side: 224, mode: 'cover', edge: 224 }),
  row({ from: [1100, 733], side: 224, mode: 'shortest_edge', edge: 256 }),
];
