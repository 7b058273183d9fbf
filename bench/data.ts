/**
 * The training loader: photographs to batches of 224 x 224 random crops, compared with sharp alone, and the time that a step waits if
 * batches are prefetched. The bound is writing the decoded photographs and the crops once; decoding dominates.
 */
import ndarray from 'ndarray';
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';
import pLimit from 'p-limit';
import sharp from 'sharp';
import { openDataset, subset, type Dataset } from '../lib/sources/dataset.js';
import { batches } from '../lib/train/loader.js';
import { UniFlow } from '../lib/uniflow.js';
import type { Figures, Row } from './harness.js';
import { onBench } from './inputs.js';

const photos = fileURLToPath(new URL('../examples/photos/', import.meta.url));
const SIDE = 224;
const BATCH = 24;
/** Number of images that the tiny model encodes in about the time that two cores need to prepare a batch. */
const COMPUTED = 2;
const PHOTO_PIXELS = 800 * 600;

const common: Pick<Row, 'family' | 'shape' | 'dtype' | 'images' | 'cost'> = {
  ...{ family: 'data', shape: `${BATCH} photos->${SIDE}x${SIDE}`, dtype: 'uint8', images: BATCH },
  cost: { bytes: 3 * BATCH * (PHOTO_PIXELS + SIDE * SIDE) },
};

/** The photographs, repeated to fill a batch. */
async function openPhotos(): Promise<Dataset> {
  const found = await openDataset(photos);
  return subset(
    found,
    Array.from({ length: BATCH }, (_, i) => i % found.length),
  );
}

const randomCrops: Row = {
  ...{ ...common, name: 'random crops' },
  setup: async (make) => {
    const loader = batches(await openPhotos(), { batchSize: BATCH, size: SIDE });
    make.onRelease(() => loader.return());
    return () => loader.next();
  },
};

const sharpAlone: Row = {
  ...{ ...common, name: 'sharp: decode, resize' },
  setup: async () => {
    const dataset = await openPhotos();
    const samples = await Promise.all(Array.from({ length: BATCH }, (_, i) => dataset.read(i)));
    const limit = pLimit(availableParallelism());
    return () =>
      limit.map(samples, ({ image }) =>
        sharp(image as string)
          .resize(SIDE, SIDE, { fit: 'cover', kernel: 'cubic' })
          .raw()
          .toBuffer(),
      );
  },
};

/** A step that computes for about as long as a batch takes to prepare. Without prefetch, its time is the sum of both. */
function stepWith(prefetch: number): Row {
  const waits: number[] = [];
  return {
    ...{ ...common, name: `step with prefetch ${prefetch}` },
    setup: async (make) => {
      const loader = batches(await openPhotos(), { batchSize: BATCH, size: SIDE, prefetch });
      const uniflow = UniFlow.random('tiny', onBench());
      make.onRelease(() => Promise.all([loader.return(), uniflow.dispose()]));
      const pixels = ndarray(new Float32Array(COMPUTED * 3 * SIDE * SIDE), [COMPUTED, 3, SIDE, SIDE]);
      return async () => {
        const begin = performance.now();
        await loader.next();
        waits.push(performance.now() - begin);
        await uniflow.encode({ pixels });
      };
    },
    watch: () => {
      waits.length = 0;
      return (): Figures => ({ 'ms waited': waits.reduce((a, b) => a + b, 0) / waits.length });
    },
  };
}

export const rows: Row[] = [randomCrops, sharpAlone, stepWith(0), stepWith(2)];
