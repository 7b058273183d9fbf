/**
 * Encodes a folder of photographs end to end, from JPEG files to shards, compared with the encoder alone on decoded pixels, and with
 * decoding alone, by sharp and by this library. Encoding and decoding share the cores of a CPU, so the last figure relates to the rate if
 * both ran one after the other. batch-memory.ts measures memory over many images.
 */
import ndarray from 'ndarray';
import { readdir, readFile, rm } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import pLimit from 'p-limit';
import sharp from 'sharp';
import { encodeToShards } from '../lib/shards/worker.js';
import { openSource } from '../lib/sources/source.js';
import type { Preset } from '../lib/config.js';
import { decodeImage } from '../lib/images/decode.js';
import { UniFlow } from '../lib/uniflow.js';
import type { Figures, Row } from './harness.js';
import { noisePixels, onBench } from './inputs.js';
import { makeCrops } from './photos.js';

const SIDE = 224;
/** Side of the image files. */
const CROP = 256;
const IMAGES = 2048;
/** Number of images for the reference rates. */
const ALONE = 512;
const BATCH = 16;

/** Images per second, the better of two runs. */
async function rateOf(work: () => Promise<unknown>): Promise<number> {
  let best = Infinity;
  for (let run = 0; run < 2; run++) {
    const begin = performance.now();
    await work();
    best = Math.min(best, performance.now() - begin);
  }
  return (1000 * ALONE) / best;
}

function encodeAlone(uniflow: UniFlow): Promise<number> {
  const pixels = ndarray(noisePixels(ALONE * SIDE * SIDE), [ALONE, SIDE, SIDE, 3]);
  return rateOf(() => uniflow.encode({ pixels }, { batchSize: BATCH }));
}

/** Decodes without resizing. */
async function decodeAlone(folder: string, decode: (file: Buffer) => Promise<unknown>): Promise<number> {
  const files = await Promise.all((await readdir(folder)).slice(0, ALONE).map((name) => readFile(join(folder, name))));
  const limit = pLimit(availableParallelism());
  return rateOf(() => limit.map(files, decode));
}

/** Images per second. */
interface Rates {
  encode: number;
  'sharp decode': number;
  decode: number;
}

async function ratesAlone(uniflow: UniFlow, folder: string): Promise<Rates> {
  return {
    encode: await encodeAlone(uniflow),
    'sharp decode': await decodeAlone(folder, (file) => sharp(file).raw().toBuffer()),
    decode: await decodeAlone(folder, decodeImage),
  };
}

function folderToShards(preset: Preset): Row {
  let alone: () => Promise<Rates>;
  let before: Rates;
  let runs = 0;
  return {
    ...{ family: 'batch', name: `${preset}: JPEGs to shards`, shape: `${IMAGES}x${CROP}->${SIDE}`, dtype: 'uint8', images: IMAGES },
    cost: { bytes: 3 * IMAGES * (CROP ** 2 + SIDE ** 2) },
    setup: async (make) => {
      const folder = await makeCrops(IMAGES, CROP);
      const uniflow = UniFlow.random(preset, onBench());
      make.onRelease(() => Promise.all([rm(folder, { recursive: true }), rm(`${folder}-shards`, { recursive: true }), uniflow.dispose()]));
      alone = () => ratesAlone(uniflow, folder);
      before = await alone();
      return async () => {
        await rm(`${folder}-shards`, { recursive: true, force: true });
        await encodeToShards(uniflow, openSource(folder), `${folder}-shards`, { size: SIDE, batchSize: BATCH, store: 'float16' });
        runs++;
      };
    },
    watch: () => {
      const begin = performance.now();
      runs = 0;
      return async (): Promise<Figures> => {
        const rate = (1000 * IMAGES * runs) / (performance.now() - begin);
        const after = await alone(); // averaged with the rate before, because the machine's speed drifts
        const mean = (name: keyof Rates): number => (before[name] + after[name]) / 2;
        return {
          '% of encode alone': (100 * rate) / mean('encode'),
          '% of sharp decode alone': (100 * rate) / mean('sharp decode'),
          '% of encode and decode on these cores': 100 * rate * (1 / mean('encode') + 1 / mean('decode')),
        };
      };
    },
  };
}

export const rows: Row[] = [folderToShards('tiny'), folderToShards('nano')];
