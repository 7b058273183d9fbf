/**
 * `npx tsx bench/batch-memory.ts`: resident memory while 1,000 and while 20,000 pictures become shards, each in a process of its own. It has to
 * be the same, within 5 %. Takes some minutes.
 */
import { execFileSync } from 'node:child_process';
import { rm } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { encodeToShards } from '../lib/batch/run.js';
import { openSource } from '../lib/batch/source.js';
import { UniFlow } from '../lib/uniflow.js';
import { makeCrops } from './photos.js';

const SIDE = 128;
const COUNTS = [1000, 20_000];
const TOLERANCE = 0.05;
const MEBI = 2 ** 20;

/** Mean resident memory over the second half of the pictures, in bytes. */
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
  const means: number[] = [];
  for (const pictures of COUNTS) {
    const crops = await makeCrops(pictures, SIDE);
    const args = ['--import', 'tsx', fileURLToPath(import.meta.url), crops, String(pictures)];
    means.push(Number(execFileSync(process.execPath, args, { encoding: 'utf8' })));
    await rm(crops, { recursive: true });
    console.log(`${pictures} pictures: ${(means.at(-1)! / MEBI).toFixed(0)} MiB`);
  }
  const change = (means[1] as number) / (means[0] as number) - 1;
  console.log(`${(100 * change).toFixed(1)} %`);
  process.exitCode = Math.abs(change) > TOLERANCE ? 1 : 0;
}
