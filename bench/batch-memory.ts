/**
 * `npx tsx bench/batch-memory.ts`: compares resident memory while encoding 1,000 and 20,000 images to shards, each in its own process. It
 * must be equal within 5 %. Single runs vary by more than that, depending on uncollected garbage, so the median of nine counts. Takes some
 * minutes.
 */
import { execFileSync } from 'node:child_process';
import { rm } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { encodeToShards } from '../lib/shards/worker.js';
import { openSource } from '../lib/sources/source.js';
import { UniFlow } from '../lib/uniflow.js';
import { makeCrops } from './photos.js';

const SIDE = 128;
const CASES = [
  { images: 1000, runs: 9 },
  { images: 20_000, runs: 1 },
];
const TOLERANCE = 0.05;
const MEBI = 2 ** 20;

/** Mean resident memory in bytes over the second half of the images. */
async function residentOf(folder: string, count: number): Promise<number> {
  const uniflow = UniFlow.random('tiny');
  const samples: number[] = [];
  const onProgress = ({ done }: { done: number }): unknown => done > count / 2 && samples.push(process.memoryUsage.rss());
  try {
    await encodeToShards(uniflow, openSource(folder), `${folder}-shards`, { shardSize: 256, onProgress });
  } finally {
    await rm(`${folder}-shards`, { recursive: true });
  }
  return samples.reduce((a, b) => a + b) / samples.length;
}

const [folder, count] = process.argv.slice(2);
if (folder !== undefined) {
  console.log(await residentOf(folder, Number(count)));
} else {
  const medians: number[] = [];
  for (const { images, runs } of CASES) {
    const crops = await makeCrops(images, SIDE);
    const args = ['--import', 'tsx', fileURLToPath(import.meta.url), crops, String(images)];
    const means = Array.from({ length: runs }, () => Number(execFileSync(process.execPath, args, { encoding: 'utf8' })));
    await rm(crops, { recursive: true });
    medians.push(means.toSorted((a, b) => a - b)[runs >> 1] as number);
    console.log(`${images} images: ${means.map((bytes) => (bytes / MEBI).toFixed(0)).join(', ')} MiB`);
  }
  const change = (medians[1] as number) / (medians[0] as number) - 1;
  console.log(`${(100 * change).toFixed(1)} %`);
  process.exitCode = Math.abs(change) > TOLERANCE ? 1 : 0;
}
