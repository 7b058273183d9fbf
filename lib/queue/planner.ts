/** Has the shards of a run encoded by workers: the driver that submits them as jobs. */
import type { Redis } from 'ioredis';
import { resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { checkInteger, checkOptions } from '../check.js';
import { aborted, throwIfAborted, UniFlowError } from '../errors.js';
import { isRecorded, readRecords } from '../shards/commits.js';
import { headerOf } from '../shards/manifest.js';
import { isS3, openOutput } from '../shards/open-output.js';
import type { PlannedShard } from '../shards/plan.js';
import { checkRun, Run, type Driver, type ItemSource, type PlanResult, type RunOptions } from '../shards/run.js';
import { ShardEncoder, type ShardRecord } from '../shards/shard.js';
import type { Item } from '../sources/item.js';
import type { UniFlow } from '../uniflow.js';
import { connect, Jobs, runId, type JobState } from './jobs.js';

/** Options of encodeOnWorkers. */
export interface QueueOptions extends Omit<RunOptions, 'onProgress'> {
  /** `redis://host:port/db`, or `rediss://`. */
  queue: string;
  /** Maximum number of waiting jobs of all runs; planning pauses above it. Default 64. */
  maxWaiting?: number | undefined;
  /** Maximum number of attempts per shard. Default 5. */
  attempts?: number | undefined;
  /** Return once all shards are planned, without waiting for them. Calling it again waits, and seals the run. Default false. */
  detach?: boolean | undefined;
  onProgress?: ((progress: QueueProgress) => void) | undefined;
  /** Called with a message about what the work is waiting for. */
  onState?: ((text: string) => void) | undefined;
}

export interface QueueProgress {
  /** Images of the completed shards. */
  done: number;
  /** Images completed by earlier calls. */
  before: number;
  failures: number;
  /** Completed shards. */
  shards: number;
  /** Images of the source; undefined until it has been read to the end. */
  total: number | undefined;
  /** Connected workers. */
  workers: number;
}

export type QueueResult = PlanResult;

const SECOND = 1_000;
/** Maximum fraction of the time spent polling the output. */
const POLLING = 0.1;

/** See index.ts. */
export async function encodeOnWorkers(uniflow: UniFlow, source: ItemSource, out: string, options: QueueOptions): Promise<QueueResult> {
  checkOptions(options);
  const { maxWaiting = 64, attempts = 5 } = options;
  checkInteger('maxWaiting', maxWaiting, 1, 1e6);
  checkInteger('attempts', attempts, 1, 1000);
  const shardSize = checkRun(options);
  const encoder = new ShardEncoder(uniflow, options);
  const redis = await connect(options.queue, options.onState);
  const ended = new AbortController();
  const abortion = new Promise<never>((_, reject) => {
    const { signal } = options;
    signal?.addEventListener('abort', () => reject(aborted(signal)), { signal: ended.signal });
  });
  try {
    // Commands waiting for a lost connection cannot be cancelled, so this does not wait for them.
    return await Promise.race([planned(redis, encoder, source, out, { ...options, shardSize, maxWaiting, attempts }), abortion]);
  } finally {
    ended.abort();
    redis.disconnect();
  }
}

type Settings = QueueOptions & { shardSize: number; maxWaiting: number; attempts: number };

async function planned(redis: Redis, encoder: ShardEncoder, source: ItemSource, out: string, settings: Settings): Promise<QueueResult> {
  const where = isS3(out) ? out : resolve(out);
  const output = await openOutput(where);
  let workers: Workers | undefined;
  const run = new Run(output, await headerOf(encoder, settings.shardSize), source, settings, () => workers?.report());
  const complete = await run.completed();
  if (complete) return complete;
  await run.begin();
  await run.resume();
  const jobs = new Jobs(redis, { run: runId(where, run.header), out: where, verify: settings.verify }, settings.attempts);
  try {
    workers = new Workers(run, jobs, settings);
    return await run.encode(workers, settings.detach);
  } finally {
    await jobs.close();
  }
}

/** The workers of a queue. Their progress is read from the output: a record is there once its shard is committed. */
class Workers implements Driver {
  private nextPoll = 0;
  private connected = 0;

  constructor(
    private readonly run: Run,
    private readonly jobs: Jobs,
    private readonly options: Settings,
  ) {}

  /** Submits the shard, unless it has a job. Retries a job that failed in an earlier call of the planner. */
  async encode(shard: PlannedShard, again: boolean): Promise<void> {
    const { index } = shard;
    await this.pollIfDue();
    const state = await this.jobs.state(index);
    if (state === 'there' || (state === 'failed' && again)) return;
    if (state === 'none' && (await isRecorded(this.run.output, index))) {
      await this.poll(); // it was committed since the last poll
      return this.run.compare(this.run.records.get(index) as ShardRecord, shard);
    }
    if (state === 'failed') await this.jobs.remove(index);
    const items: Item[] = [];
    for await (const item of shard) items.push(portableItem(item));
    while ((await this.jobs.waiting()) >= this.options.maxWaiting) {
      await this.pollIfDue();
      await sleep(SECOND / 10);
    }
    await this.jobs.add(index, items);
  }

  /** Waits until all shards are complete. @returns false if some shard has neither a record nor a job. */
  async settled(): Promise<boolean> {
    for (;;) {
      const before: [index: number, state: JobState][] = [];
      for (const index of this.run.missing()) before.push([index, await this.jobs.state(index)]);
      await this.poll();
      const missing = before.filter(([index]) => !this.run.records.has(index));
      if (missing.length === 0) return true;
      if (missing.some(([, state]) => state === 'none')) {
        this.options.onState?.('the queue has lost shards: they are planned again');
        return false;
      }
      if (missing.every(([, state]) => state === 'failed')) throw await this.failed(missing.map(([index]) => index));
      await sleep(Math.max(SECOND / 4, this.nextPoll - performance.now()));
    }
  }

  report(): void {
    const { done, before, failures, records, total } = this.run;
    this.options.onProgress?.({ done, before, failures, shards: records.size, total, workers: this.connected });
  }

  private async failed(missing: readonly number[]): Promise<UniFlowError> {
    const reasons = [];
    for (const index of missing.slice(0, 5)) reasons.push(`shard ${index}: ${await this.jobs.reason(index)}`);
    const more = missing.length > 5 ? `; and ${missing.length - 5} more` : '';
    const all = this.run.missing().length + this.run.records.size;
    return new UniFlowError(
      'INTERNAL',
      `${missing.length} of ${all} shards failed: ${reasons.join('; ')}${more}. Run it again to try them again`,
    );
  }

  private async pollIfDue(): Promise<void> {
    throwIfAborted(this.run.signal);
    if (performance.now() >= this.nextPoll) await this.poll();
  }

  /** Reads new records. */
  private async poll(): Promise<void> {
    throwIfAborted(this.run.signal);
    const begin = performance.now();
    for await (const record of readRecords(this.run.output, this.run.records)) this.run.add(record);
    this.connected = await this.jobs.workers();
    this.report();
    this.nextPoll = performance.now() + Math.max(SECOND, (performance.now() - begin) / POLLING);
  }
}

/** The item in a form that other processes can read. @throws {UniFlowError} `UNSUPPORTED` if only this process can read it. */
function portableItem({ id, image }: Item): Item {
  if (typeof image === 'string') return { id, image: resolve(image) };
  if (image instanceof URL && image.protocol === 'file:') return { id, image: fileURLToPath(image) };
  if (typeof image === 'object' && !(image instanceof URL || image instanceof Uint8Array || 'data' in image)) {
    if ('parquet' in image) return { id, image: { ...image, parquet: resolve(image.parquet) } };
    if ('path' in image) return { id, image: { ...image, path: resolve(image.path) } };
    if ('url' in image || 'error' in image) return { id, image };
  }
  throw new UniFlowError(
    'UNSUPPORTED',
    `${id} has no path or URL by which a worker could read it: a queue takes files, archives (.tar, .parquet) and URLs, but neither standard input nor .tar.gz nor IDX`,
    { subject: id },
  );
}
