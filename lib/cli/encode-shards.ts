/** `uniflow encode` into a folder: shards, which may take days and can be interrupted. */
import { stat } from 'node:fs/promises';
import { extname } from 'node:path';
import { isS3 } from '../shards/open-output.js';
import { encodeToShards, type RunOptions, type RunProgress, type RunResult } from '../shards/run.js';
import { openSource, type Source } from '../sources/source.js';
import { UniFlowError } from '../errors.js';
import { embeddedName } from '../package.js';
import type { EncodeCommandOptions, ShardCommandOptions } from './options.js';
import { plural, printJson } from './output.js';
import { refuseInside } from './outputs.js';
import { Progress } from './progress.js';
import { loadModel, reportSkips } from './shared.js';

/** Whether what --out names is a folder: it is one, ends as one, or has no extension. */
export async function isFolder(out: string): Promise<boolean> {
  if (isS3(out) || out.endsWith('/') || extname(out) === '') return true;
  return (await stat(out).catch(() => undefined))?.isDirectory() ?? false;
}

/** @throws {UniFlowError} `BAD_INPUT` where one of them comes with a file. */
export function refuseShardOptions({ shardSize, format, fit, store, latents, maxFailures, queue }: ShardCommandOptions): void {
  const given = { 'shard-size': shardSize, format, fit, store, 'no-latents': !latents || undefined, 'max-failures': maxFailures, queue };
  const name = Object.entries(given).find(([, value]) => value !== undefined)?.[0];
  if (name !== undefined)
    throw new UniFlowError(
      'BAD_INPUT',
      `--${name} is for shards, and takes a folder as --out (a name without extension, or with / at the end)`,
      { subject: 'out' },
    );
}

/** @throws {UniFlowError} `BAD_INPUT` where the folder would have nothing, or is among the inputs. */
export async function checkFolder(inputs: readonly string[], { out, latents, tokens }: EncodeCommandOptions): Promise<void> {
  if (!latents && !tokens)
    throw new UniFlowError('BAD_INPUT', '--no-latents takes --tokens, or there is nothing to write', { subject: 'out' });
  if (!isS3(out)) await refuseInside(out, inputs);
}

export async function encodeShards(inputs: readonly string[], options: EncodeCommandOptions, signal: AbortSignal): Promise<void> {
  refuseQueueOptions(options);
  const { out, json = false } = options;
  const source = openSource(inputs, { signal });
  const uniflow = await loadModel(options, signal);
  const progress = new Progress('encode', { unit: 'images' }, json).start(undefined);
  const counting = new AbortController();
  if (source.repeatable && !json) void expectCount(source, progress, counting.signal).catch(() => undefined); // the run says what is wrong
  const started = performance.now();
  const detailOf = details();
  try {
    const result = await encodeToShards(uniflow, source, out, {
      ...runOptions(options, progress, signal),
      onProgress: (state) => progress.update(state.done, detailOf(state), state.before),
    });
    reportSkips(result.skips, progress, json);
    progress.stop();
    if (result.manifest.failures > 0 && !result.complete) process.exitCode = 1; // also of those that failed before a stop
    report(out, result, (performance.now() - started) / 1000, json);
  } finally {
    counting.abort();
    progress.stop();
  }
}

/** Options of the library. */
export function runOptions(options: EncodeCommandOptions, progress: Progress, signal: AbortSignal): Omit<RunOptions, 'onProgress'> {
  const { json, batch, shardSize, format, fit, size, store, latents, tokens, maxFailures } = options;
  return {
    ...{ shardSize, format, fit, size, store, latents, tokens, maxFailures, batchSize: batch, signal },
    model: options.model ?? embeddedName,
    onFailure: ({ id, reason }) => {
      process.exitCode = 1;
      if (!json) progress.line(`uniflow: ${id}: ${reason}`);
    },
  };
}

function refuseQueueOptions({ out, maxWaiting, detach }: EncodeCommandOptions): void {
  if (isS3(out))
    throw new UniFlowError('BAD_INPUT', `${out} takes --queue: a run of one machine keeps its journal in a folder`, { subject: 'out' });
  const given = maxWaiting !== undefined ? 'max-waiting' : detach && 'detach';
  if (given) throw new UniFlowError('BAD_INPUT', `--${given} is for runs with --queue`, { subject: 'queue' });
}

/** Goes through the source once more, to say how long it will take. */
async function expectCount(source: Source, progress: Progress, signal: AbortSignal): Promise<void> {
  const items = source[Symbol.asyncIterator]();
  let total = 0;
  while (!(await items.next()).done) {
    if (signal.aborted) return;
    total++;
  }
  progress.expect(total);
}

const SECONDS_BETWEEN_READINGS = 1;

/** How busy the stages were in about the last second, and how many pictures failed. */
function details(): (state: RunProgress) => string {
  let next = 0;
  let stages = '';
  return ({ failures, utilisation }) => {
    const now = performance.now() / 1000;
    if (now >= next) {
      next = now + SECONDS_BETWEEN_READINGS;
      stages = Object.entries(utilisation())
        .map(([stage, share]: [string, number]) => `${stage} ${Math.round(100 * share)} %`)
        .join(', ');
    }
    return failures > 0 ? `${stages}, ${failures} failed` : stages;
  };
}

export function report(out: string, { manifest, before, complete, skips }: RunResult, seconds: number, json: boolean): void {
  const { count, failures, shards } = manifest;
  if (json) return printJson({ out, images: count, failures, shards: shards.length, before, complete, skipped: skips.count, seconds });
  const failed = failures > 0 ? ` (${failures} failed: see failures.jsonl)` : '';
  const what = `${plural(count, 'picture')} in ${plural(shards.length, 'shard')} in ${out}${failed}`;
  process.stdout.write(complete ? `${what}: it was complete before\n` : `${what}\n`);
}
