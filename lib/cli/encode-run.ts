/** Options and report of `uniflow encode`, shared by local and distributed runs. */
import { embeddedName } from '../package.js';
import type { RunOptions, RunResult } from '../shards/run.js';
import type { EncodeCommandOptions } from './options.js';
import { plural, printJson } from './output.js';
import type { Progress } from './progress.js';

/** Converts the command's options to those of the library. */
export function runOptions(options: EncodeCommandOptions, progress: Progress, signal: AbortSignal): Omit<RunOptions, 'onProgress'> {
  const { json, batch, shardSize, format, fit, size, store, latents, tokens, maxFailures, verify } = options;
  return {
    ...{ shardSize, format, fit, size, store, latents, tokens, maxFailures, verify, batchSize: batch, signal },
    model: options.model ?? embeddedName,
    onFailure: ({ id, reason }) => {
      process.exitCode = 1;
      if (!json) progress.line(`uniflow: ${id}: ${reason}`);
    },
  };
}

export function report(out: string, { manifest, before, complete, skips }: RunResult, seconds: number, json: boolean): void {
  const { count, failures, shards } = manifest;
  if (json) return printJson({ out, images: count, failures, shards: shards.length, before, complete, skipped: skips.count, seconds });
  const failed = failures > 0 ? ` (${failures} failed: see failures.jsonl)` : '';
  const what = `${plural(count, 'picture')} in ${plural(shards.length, 'shard')} in ${out}${failed}`;
  process.stdout.write(complete ? `${what}: it was complete before\n` : `${what}\n`);
}
