/** One pass over the elements. Memory-bound: reads the input once and writes the output once. */
import { native, type FloatType } from '../lib/native.js';
import { sizeOf } from './costs.js';
import type { Row } from './harness.js';

const ROWS = 4100; // four images of 1,025 tokens
const WIDTH = 1024;

function cast(from: FloatType, to: FloatType): Row {
  return {
    ...{ family: 'elementwise', name: `cast to ${to}`, shape: `${ROWS}x${WIDTH}`, dtype: from },
    cost: { bytes: ROWS * WIDTH * (sizeOf(from) + sizeOf(to)) },
    setup: (make) => {
      const x = make.tensor([ROWS, WIDTH], from);
      return () => native.cast(x, to);
    },
  };
}

/** The activation of a gated MLP: reads gate and value, writes their product. */
function swiglu(dtype: FloatType): Row {
  const hidden = 4 * WIDTH;
  return {
    ...{ family: 'elementwise', name: 'swiglu', shape: `${ROWS}x2x${hidden}`, dtype },
    cost: { bytes: 3 * ROWS * hidden * sizeOf(dtype) },
    setup: (make) => {
      const x = make.tensor([ROWS, 2 * hidden], dtype);
      return () => native.swiglu(x);
    },
  };
}

/** DINOv3 ViT-L at 448 px: patches of 16, preceded by five tokens. v is copied along with q and k. */
function rope(dtype: FloatType): Row {
  const [batch, heads, headDim, side, prefix] = [4, 16, 64, 28, 5];
  const patches = side * side;
  const qkv = batch * (prefix + patches) * 3 * heads * headDim;
  return {
    ...{ family: 'elementwise', name: 'rope', shape: `${batch}x${prefix + patches}x3x${heads * headDim}`, dtype },
    cost: { bytes: 2 * qkv * sizeOf(dtype) + 4 * 2 * patches * headDim },
    setup: (make) => {
      const x = make.tensor([batch, prefix + patches, 3 * heads * headDim], dtype);
      const table = make.keep(native.ropeTable(side, side, headDim, 100, 'image'));
      return () => native.rope(x, heads, prefix, table);
    },
  };
}

/** Copies the patch tokens without the class token. */
function sliceTokens(dtype: FloatType): Row {
  const [batch, patches] = [4, 1024];
  return {
    ...{ family: 'elementwise', name: 'sliceTokens', shape: `${batch}x${patches + 1}x${WIDTH}`, dtype },
    cost: { bytes: 2 * batch * patches * WIDTH * sizeOf(dtype) },
    setup: (make) => {
      const x = make.tensor([batch, patches + 1, WIDTH], dtype);
      return () => native.sliceTokens(x, 1, patches + 1);
    },
  };
}

/** The latents of four images in groups of six channels, as of the preset `small`. Bound by the hyperbolic tangents. */
function fsq(dtype: FloatType): Row {
  const [tokens, channels] = [4 * 784, 48];
  const levels = Uint32Array.from([8, 8, 8, 5, 5, 5]);
  return {
    ...{ family: 'elementwise', name: 'fsq', shape: `${tokens}x${channels}`, dtype },
    cost: { bytes: 2 * tokens * channels * sizeOf(dtype) },
    setup: (make) => {
      const x = make.tensor([tokens, channels], dtype);
      return () => native.fsq(x, levels);
    },
  };
}

export const rows: Row[] = [
  cast('float32', 'bfloat16'),
  cast('bfloat16', 'float32'),
  ...(['bfloat16', 'float32'] as const).flatMap((dtype) => [swiglu(dtype), rope(dtype), sliceTokens(dtype), fsq(dtype)]),
];
