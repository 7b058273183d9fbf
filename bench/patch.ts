/**
 * Conversion between pixels and tokens, for four images of 448 x 448. Memory-bound, except for the matrix product of the patch embedding.
 */
import { native, type FloatType } from '../lib/native.js';
import { IMAGENET } from '../lib/io/preprocess.js';
import { linearCost, sizeOf } from './costs.js';
import type { Row } from './harness.js';

const BATCH = 4;
const SIDE = 448;
const PATCH = 14;
const WIDTH = 1024;
const GRID = SIDE / PATCH;
const PATCHES = BATCH * GRID * GRID;
const PIXELS = 3 * PATCH * PATCH; // per patch, equal to its number of bytes
const shape = `${BATCH}x${SIDE}x${SIDE}x3`;
const normalisation = { mean: Float32Array.from(IMAGENET.mean), std: Float32Array.from(IMAGENET.std) };

/** The patch vectors between unfolding and product are not counted, because the bound assumes one fused pass. */
function patchEmbed(dtype: FloatType): Row {
  const tokens = PATCHES + BATCH; // one class token per image
  const { flops } = linearCost({ rows: PATCHES, inputs: PIXELS, outputs: WIDTH, dtype });
  const parameters = WIDTH * PIXELS * sizeOf(dtype) + 4 * WIDTH * (1 + 1 + GRID * GRID); // weight; bias, class token, positions
  return {
    ...{ family: 'patch', name: `patchEmbed ->${WIDTH}`, shape, dtype },
    cost: { flops, bytes: PATCHES * PIXELS + parameters + tokens * WIDTH * sizeOf(dtype) },
    setup: (make) => {
      const pixels = make.pixels(BATCH, SIDE, SIDE);
      const options = {
        weight: make.weight(WIDTH, PIXELS, dtype),
        bias: make.vector(WIDTH),
        prefix: make.vector(1, WIDTH),
        position: make.vector(GRID * GRID, WIDTH),
        ...{ patch: PATCH, normalisation, dtype },
      };
      return () => native.patchEmbed(pixels, options);
    },
  };
}

function unfold(dtype: FloatType): Row {
  return {
    ...{ family: 'patch', name: 'unfold uint8', shape, dtype },
    cost: { bytes: PATCHES * PIXELS * (1 + sizeOf(dtype)) },
    setup: (make) => {
      const pixels = make.pixels(BATCH, SIDE, SIDE);
      return () => native.unfold(pixels, PATCH, normalisation, dtype);
    },
  };
}

function assemble(dtype: FloatType): Row {
  return {
    ...{ family: 'patch', name: 'assemble', shape: `${BATCH}x${GRID * GRID}x${WIDTH}`, dtype },
    cost: { bytes: (2 * PATCHES + BATCH) * WIDTH * sizeOf(dtype) + 4 * WIDTH * (1 + GRID * GRID) },
    setup: (make) => {
      const x = make.tensor([BATCH, GRID * GRID, WIDTH], dtype);
      const [prefix, position] = [make.vector(1, WIDTH), make.vector(GRID * GRID, WIDTH)];
      return () => native.assemble(x, prefix, position);
    },
  };
}

const fold: Row = {
  ...{ family: 'patch', name: 'fold to uint8', shape, dtype: 'float32' },
  cost: { bytes: PATCHES * PIXELS * (4 + 1) },
  setup: (make) => {
    const patches = make.tensor([BATCH, GRID * GRID, PIXELS], 'float32');
    return () => native.fold(patches, GRID, GRID, PATCH, normalisation, 'uint8');
  },
};

function resizeTable(from: number, to: number, antialias: boolean): Row {
  return {
    ...{ family: 'patch', name: `resizeTable${antialias ? ' antialiased' : ''}`, shape: `${from}²->${to}²x${WIDTH}`, dtype: 'float32' },
    cost: { bytes: 4 * WIDTH * (from * from + to * to) },
    setup: (make) => {
      const table = make.vector(from * from, WIDTH);
      return () => native.resizeTable(table, from, from, to, to, antialias);
    },
  };
}

export const rows: Row[] = [
  ...(['bfloat16', 'float32'] as const).flatMap((dtype) => [patchEmbed(dtype), unfold(dtype), assemble(dtype)]),
  fold,
  resizeTable(37, 32, true), // DINOv2's table at 448 px
  resizeTable(16, 32, false),
];
