/** End to end through the public API, with random weights. The bound is the FLOPs of the matrix products. */
import ndarray from 'ndarray';
import sharp from 'sharp';
import { parseUniFlowConfig, presets, type Preset } from '../lib/config.js';
import type { ModelType } from '../lib/device.js';
import { native, type FloatType } from '../lib/native.js';
import { UniFlow } from '../lib/uniflow.js';
import { decodeCost, encodeCost } from './costs.js';
import type { Row } from './harness.js';
import { noisePixels, type Inputs, onBench } from './inputs.js';
import { readPhotos } from './photos.js';
import { watchProcess } from './watch.js';

const official = parseUniFlowConfig(presets.official);
const tiny = parseUniFlowConfig(presets.tiny);
const PHOTOS = 6;

/** int8: quantised from a model in bfloat16. */
async function model(make: Inputs, preset: Preset, dtype: ModelType): Promise<UniFlow> {
  native.trimMemory(); // so that resident memory measures this model
  const uniflow = UniFlow.random(preset, { ...onBench(), dtype: dtype === 'int8' ? 'bfloat16' : dtype });
  make.onRelease(() => uniflow.dispose());
  if (dtype === 'int8') await uniflow.quantize();
  return uniflow;
}

/** Images of the model's own size, stored uncompressed, so that nearly all of the time is the tokenizer's. */
function encodeOfficial(batch: number, dtype: ModelType): Row {
  const [height, width] = official.imageSize;
  return {
    ...{ family: 'tokenizer', name: 'encode official', shape: `${batch}x${height}x${width}x3`, dtype, images: batch },
    cost: encodeCost(official, batch),
    watch: watchProcess,
    setup: async (make) => {
      const raw = { width, height, channels: 3 as const };
      const image = await sharp(noisePixels(width * height), { raw })
        .png({ compressionLevel: 0 })
        .toBuffer();
      const images = Array<Buffer>(batch).fill(image);
      const uniflow = await model(make, 'official', dtype);
      return () => uniflow.encode(images, { batchSize: batch });
    },
  };
}

function decodeOfficial(batch: number, dtype: FloatType): Row {
  const { grid, latentChannels } = official.decoder;
  const shape = [batch, grid.rows * grid.cols, latentChannels];
  return {
    ...{ family: 'tokenizer', name: 'decode official, 1 step', shape: shape.join('x'), dtype, images: batch },
    cost: decodeCost(official, batch, 1),
    watch: watchProcess,
    setup: async (make) => {
      const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
      await make.tensor(shape, 'float32').read(values);
      const uniflow = await model(make, 'official', dtype);
      return () => uniflow.decode(ndarray(values, shape), { batchSize: batch, steps: 1 });
    },
  };
}

/** JPEG files of about 0.4 megapixels: reading, decoding and resizing take about as long as the small model. */
function encodePhotos(dtype: FloatType): Row {
  return {
    ...{ family: 'tokenizer', name: 'encode tiny from JPEG files', shape: `${PHOTOS} photos`, dtype, images: PHOTOS },
    cost: encodeCost(tiny, PHOTOS),
    watch: watchProcess,
    setup: async (make) => {
      const paths = await readPhotos(PHOTOS);
      const uniflow = await model(make, 'tiny', dtype);
      return () => uniflow.encode(paths);
    },
  };
}

export const rows: Row[] = [
  encodeOfficial(1, 'bfloat16'),
  encodeOfficial(4, 'bfloat16'),
  encodeOfficial(4, 'float32'),
  encodeOfficial(4, 'int8'),
  decodeOfficial(4, 'bfloat16'),
  decodeOfficial(4, 'float32'),
  encodePhotos('float32'),
];
