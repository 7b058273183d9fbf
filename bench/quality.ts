/** PSNR and SSIM of four pairs of images. Compute-bound: five moments, blurred along rows and columns by 11 taps. */
import { native } from '../lib/native.js';
import type { Row } from './harness.js';

const [BATCH, SIDE, WINDOW] = [4, 448, 11];
const INSIDE = SIDE - WINDOW + 1;
const MOMENTS = 5;
const windows = SIDE * INSIDE + INSIDE * INSIDE; // along the rows, then along the columns

export const rows: Row[] = [
  {
    ...{ family: 'quality', name: 'PSNR+SSIM', shape: `${BATCH}x${SIDE}x${SIDE}x3`, dtype: 'uint8', images: BATCH },
    cost: { flops: BATCH * 3 * windows * MOMENTS * WINDOW * 2, bytes: 2 * BATCH * SIDE * SIDE * 3 },
    setup: (make) => {
      const [a, b] = [make.pixels(BATCH, SIDE, SIDE), make.pixels(BATCH, SIDE, SIDE)];
      return () => native.imageQuality(a, b, 'standard');
    },
  },
];
