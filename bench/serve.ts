/**
 * The service under load: 64 connections send small JPEG files to /v1/encode of the tiny model, with and without dynamic batching. `npx tsx
 * bench/serve.ts [--quick] [--seconds n]`; the server is a separate process on the same CPU as the clients.
 */
import autocannon, { type Result } from 'autocannon';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import sharp from 'sharp';
import type { FloatType } from '../lib/native.js';
import { UniFlow } from '../lib/uniflow.js';
import { noisePixels } from './inputs.js';
import { machine } from './machine.js';
import { machineLines } from './table.js';

const CONNECTIONS = 64;
/**
 * Image sizes for the tiny preset: its own, at which one image keeps two cores nearly as busy as sixteen do, and one of 16 patches, which
 * leaves them idle.
 */
const CASES: { side: number; dtype: FloatType }[] = [
  { side: 224, dtype: 'float32' },
  { side: 224, dtype: 'bfloat16' },
  { side: 56, dtype: 'float32' },
];
const SECONDS = 60;
const QUICK_SECONDS = 5;
const WARM_UP_SECONDS = 2;

const { values } = parseArgs({ options: { quick: { type: 'boolean' }, seconds: { type: 'string' } } });
const seconds = Number(values.seconds ?? (values.quick ? QUICK_SECONDS : SECONDS));

interface Memory {
  resident: number;
  native: number;
}

async function memoryOf(url: string): Promise<Memory> {
  const text = await (await fetch(`${url}/metrics`)).text();
  const mib = (name: string): number => Number(new RegExp(`^${name} (\\S+)$`, 'm').exec(text)?.[1]) / 2 ** 20;
  return { resident: mib('process_resident_memory_bytes'), native: mib('uniflow_native_memory_bytes') };
}

async function load(url: string, side: number, body: Buffer, duration: number): Promise<Result> {
  const headers = { 'content-type': 'image/jpeg', accept: 'application/octet-stream' };
  const query = `options=${encodeURIComponent(JSON.stringify({ size: side }))}`;
  return autocannon({ url: `${url}/v1/encode?${query}`, method: 'POST', headers, body, connections: CONNECTIONS, duration, timeout: 60 });
}

function image(side: number): Promise<Buffer> {
  return sharp(noisePixels(side * side), { raw: { width: side, height: side, channels: 3 } })
    .blur(4)
    .jpeg()
    .toBuffer();
}

/** Responses per second, in images. */
async function measure(model: string, { side, dtype }: (typeof CASES)[number], args: string[]): Promise<number> {
  const body = await image(side);
  const command = ['--import', 'tsx', 'lib/cli/main.ts', 'serve', '--model', model, '--port', '0', '--json', '--dtype', dtype, ...args];
  const server = spawn(process.execPath, command, { cwd: join(import.meta.dirname, '..'), stdio: ['ignore', 'pipe', 'inherit'] });
  const ended = once(server, 'close');
  try {
    const [line] = (await once(server.stdout, 'data')) as [Buffer];
    const { url } = JSON.parse(String(line)) as { url: string };
    await load(url, side, body, WARM_UP_SECONDS);
    const before = await memoryOf(url);
    const { latency, statusCodeStats = {}, errors, timeouts } = await load(url, side, body, seconds);
    const after = await memoryOf(url);
    const count = (status: string): number => (statusCodeStats as Record<string, { count?: number }>)[status]?.count ?? 0;
    const other = Object.keys(statusCodeStats).reduce((sum, status) => sum + (['200', '503'].includes(status) ? 0 : count(status)), 0);
    const rate = count('200') / seconds;
    console.log(
      `${side}x${side} ${dtype}, ${args.join(' ') || 'batching'}: ${rate.toFixed(1)} images/s, p50 ${latency.p50} ms, p99 ${latency.p99} ms; ` +
        `${count('503')} times 503, ${other + errors} errors, ${timeouts} timeouts; ` +
        `resident ${before.resident.toFixed(0)} -> ${after.resident.toFixed(0)} MiB, native ${before.native.toFixed(0)} -> ${after.native.toFixed(0)} MiB`,
    );
    return rate;
  } finally {
    server.kill('SIGTERM');
    await ended;
  }
}

const dir = await mkdtemp(join(tmpdir(), 'uniflow-bench-serve-'));
try {
  console.log(`${machineLines(machine())}\n${CONNECTIONS} connections, ${seconds} s each`);
  const uniflow = UniFlow.random('tiny');
  await uniflow.save(dir);
  await uniflow.dispose();
  for (const images of CASES) {
    const single = await measure(dir, images, ['--max-batch', '1']);
    const batched = await measure(dir, images, []);
    console.log(`batching answers ${(batched / single).toFixed(2)} times as many`);
  }
} finally {
  await rm(dir, { recursive: true, force: true });
}
