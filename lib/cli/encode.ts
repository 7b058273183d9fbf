/**
 * `uniflow encode`: encodes images to a file of latents, or to shards in a folder or bucket, in this process or on the workers of a queue.
 * Runs over shards may take days and can be interrupted.
 */
import { stat } from 'node:fs/promises';
import { extname } from 'node:path';
import { UniFlowError } from '../errors.js';
import { optional } from '../optional.js';
import { embeddedName } from '../package.js';
import { encodeOnWorkers, type QueueProgress } from '../queue/index.js';
import { encodeToFile } from '../shards/file.js';
import { formatOfFile } from '../shards/latents.js';
import { isS3 } from '../shards/open-output.js';
import type { RunOptions, RunResult } from '../shards/run.js';
import type { Failure } from '../shards/shard.js';
import { encodeToShards } from '../shards/worker.js';
import { Skips } from '../sources/skips.js';
import { openSource, STDIN } from '../sources/source.js';
import type { UniFlow } from '../uniflow.js';
import { namedItems, refuseMissing } from './inputs.js';
import type { EncodeCommandOptions } from './options.js';
import { failures as failed, plural, printJson } from './output.js';
import { refuseInside } from './outputs.js';
import { Progress, stageDetails } from './progress.js';
import { estimating, loadModel, reportFailure, reportSkips } from './shared.js';

export async function encode(inputs: readonly string[], options: EncodeCommandOptions, signal: AbortSignal): Promise<void> {
  const { out, queue } = options;
  if (out === STDIN)
    throw UniFlowError.expected(
      'BAD_INPUT',
      'out',
      'a file or a folder',
      "'-': latents are not written to standard output (./- is a folder)",
    );
  if (!options.latents && !options.tokens && !options.codes)
    throw new UniFlowError('BAD_INPUT', '--no-latents takes --tokens, or there is nothing to write', { subject: 'out' });
  const folder = await isFolder(out);
  if (!folder) refuseFolderOptions(options);
  if (folder && !isS3(out)) await refuseInside(out, inputs);
  if (queue === undefined) refuseQueueOptions(options);
  await refuseMissing(inputs);
  if (queue !== undefined) await checkQueue(inputs, queue);
  const uniflow = await loadModel(options, signal);
  const progress = new Progress('encode', { unit: 'images' }, options.json === true).start(undefined);
  await estimating(inputs, progress, options.json === true || queue !== undefined, () =>
    (folder ? toShards : toFile)(uniflow, inputs, options, progress, signal),
  );
}

/** Whether --out names a folder: an existing one, a name with a trailing slash, or one without extension. */
async function isFolder(out: string): Promise<boolean> {
  if (isS3(out) || out.endsWith('/') || extname(out) === '') return true;
  return (await stat(out).catch(() => undefined))?.isDirectory() ?? false;
}

/** @throws {UniFlowError} `BAD_INPUT` if --out does not name a latents file, or an option for folders is given with it. */
function refuseFolderOptions({ out, shardSize, format, maxFailures, verify, queue }: EncodeCommandOptions): void {
  formatOfFile(out, 'out');
  const given = { 'shard-size': shardSize, format, 'max-failures': maxFailures, verify, queue };
  const name = Object.entries(given).find(([, value]) => value !== undefined)?.[0];
  if (name !== undefined)
    throw new UniFlowError(
      'BAD_INPUT',
      `--${name} is for shards, and takes a folder as --out (a name without extension, or with / at the end)`,
      { subject: 'out' },
    );
}

function refuseQueueOptions({ maxWaiting, detach }: EncodeCommandOptions): void {
  const given = maxWaiting !== undefined ? 'max-waiting' : detach && 'detach';
  if (given) throw new UniFlowError('BAD_INPUT', `--${given} is for runs with --queue`, { subject: 'queue' });
}

/** Reports what would make a run with --queue fail, before the model is loaded. */
async function checkQueue(inputs: readonly string[], queue: string): Promise<void> {
  if (inputs.includes(STDIN))
    throw new UniFlowError('BAD_INPUT', 'standard input cannot be read by workers: --queue takes files, archives, lists and URLs', {
      subject: 'queue',
    });
  (await (await optional('queue', () => import('../queue/jobs.js'))).connect(queue)).disconnect();
}

type Target = (
  uniflow: UniFlow,
  inputs: readonly string[],
  options: EncodeCommandOptions,
  progress: Progress,
  signal: AbortSignal,
) => Promise<void>;

/** Ids are the paths as named; an image named twice is encoded twice. */
const toFile: Target = async (uniflow, inputs, options, progress, signal) => {
  const { out, json = false } = options;
  const started = performance.now();
  const skips = new Skips();
  const broken: Failure[] = [];
  const detailOf = stageDetails();
  const { fit, size, store, latents, codes, tokens, batchSize, model, onFailure } = runOptions(options, progress, signal);
  let done = 0;
  const { files, shape, grid, record } = await encodeToFile(uniflow, namedItems(inputs, skips, signal), out, {
    ...{ fit, size, store, latents, codes, tokens, batchSize, model, signal },
    onFailure: (failure) => {
      broken.push(failure);
      onFailure?.(failure);
    },
    onCount: (pictures, utilisation) =>
      progress.update((done += pictures) + broken.length, detailOf({ failures: broken.length, utilisation })),
  });
  reportSkips(skips, progress, json);
  progress.stop();
  const seconds = (performance.now() - started) / 1000;
  const list = broken.map(({ id, reason }) => ({ path: id, reason }));
  if (json) return printJson({ files, shape, grid, images: record.count, failed: list, skipped: skips.count, seconds });
  process.stdout.write(
    `${plural(record.count, 'image')} as ${codes ? 'codes' : latents === false ? 'tokens' : 'latents'} [${shape.join(', ')}] in ${files.join(', ')}${failed(list)}\n`,
  );
};

const toShards: Target = async (uniflow, inputs, options, progress, signal) => {
  const { out, json = false, queue, detach, maxWaiting } = options;
  const started = performance.now();
  const detailOf = stageDetails();
  const source = openSource(inputs, { signal });
  const shared = runOptions(options, progress, signal);
  const result =
    queue === undefined
      ? await encodeToShards(uniflow, source, out, {
          ...shared,
          onProgress: (state) => progress.update(state.done, detailOf(state), state.before),
        })
      : await encodeOnWorkers(uniflow, source, out, {
          ...{ ...shared, queue, detach, maxWaiting },
          onProgress: (state) => showQueue(progress, state),
          onState: (text) => !json && progress.line(`uniflow: ${text}`),
        });
  reportSkips(result.skips, progress, json);
  progress.stop();
  const { manifest, planned, before } = result;
  if (manifest) return reportRun(out, { ...result, manifest }, (performance.now() - started) / 1000, json);
  if (json) printJson({ out, shards: planned, before });
  else process.stdout.write(`${plural(planned, 'shard')} of ${out} planned; the same command without --detach waits for them\n`);
};

function reportRun(out: string, { manifest, before, complete, skips }: RunResult, seconds: number, json: boolean): void {
  const { count, failures, shards } = manifest;
  if (failures > 0 && !complete) process.exitCode = 1; // includes failures from before an interruption
  if (json) return printJson({ out, images: count, failures, shards: shards.length, before, complete, skipped: skips.count, seconds });
  const failed = failures > 0 ? ` (${failures} failed: see failures.jsonl)` : '';
  const what = `${plural(count, 'image')} in ${plural(shards.length, 'shard')} in ${out}${failed}`;
  process.stdout.write(complete ? `${what}: it was complete before\n` : `${what}\n`);
}

/** Converts the command's options to those of the library. */
function runOptions(options: EncodeCommandOptions, progress: Progress, signal: AbortSignal): Omit<RunOptions, 'onProgress'> {
  const { json, batch, shardSize, format, fit, size, store, codes, tokens, maxFailures, verify } = options;
  const latents = options.latents && !codes;
  return {
    ...{ shardSize, format, fit, size, store, latents, codes, tokens, maxFailures, verify, batchSize: batch, signal },
    model: options.model ?? embeddedName,
    onFailure: ({ id, reason }) => reportFailure({ path: id, reason }, progress, json === true),
  };
}

function showQueue(progress: Progress, { done, before, total, shards, failures, workers }: QueueProgress): void {
  if (total !== undefined) progress.expect(total);
  const failed = failures > 0 ? `, ${failures} failed` : '';
  progress.update(done, `${plural(shards, 'shard')} from ${plural(workers, 'worker')}${failed}`, before);
}
