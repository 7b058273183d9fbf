/** Plans a run on many machines: submits shards as jobs, and seals the run once all are in the output. */
import type { Redis } from 'ioredis';
import { resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { checkInteger, checkOptions } from '../check.js';
import { aborted, throwIfAborted, UniFlowError } from '../errors.js';
import type { UniFlow } from '../uniflow.js';
import { headerOf, readManifest, checkSameRun, seal, writeSkips, type Header, type Manifest } from '../shards/manifest.js';
import { isS3, openOutput } from '../shards/open-output.js';
import type { Output } from '../shards/output.js';
import type { Item } from '../sources/item.js';
import type { RunOptions } from '../shards/run.js';
import { Census, ShardEncoder, type ShardRecord } from '../shards/shard.js';
import { Skips } from '../sources/skips.js';
import { itemsOfSource, unique, type Source } from '../sources/source.js';
import { beginRun, committed, isRecorded, readRecord, tidy } from './commits.js';
import { connect, Jobs, runId } from './jobs.js';

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

export interface QueueResult {
  /** Undefined with `detach` if the run is not complete. */
  manifest: Manifest | undefined;
  before: number;
  complete: boolean;
  /** Number of shards of the run. */
  planned: number;
  /** Files that the source skipped; they are listed in skipped.jsonl. */
  skips: Skips;
}

type Items = Source | AsyncIterable<Item> | Iterable<Item>;

const SECOND = 1_000;
/** Maximum fraction of the time spent polling the output. */
const LOOKING = 0.1;

/** See index.ts. */
export async function encodeOnWorkers(uniflow: UniFlow, source: Items, out: string, options: QueueOptions): Promise<QueueResult> {
  checkOptions(options);
  const { shardSize = 1024, maxFailures = Infinity, maxWaiting = 64, attempts = 5 } = options;
  checkInteger('shardSize', shardSize, 1, 2 ** 20);
  checkInteger('maxWaiting', maxWaiting, 1, 1e6);
  checkInteger('attempts', attempts, 1, 1000);
  if (maxFailures !== Infinity) checkInteger('maxFailures', maxFailures, 0, Number.MAX_SAFE_INTEGER);
  throwIfAborted(options.signal);
  const encoder = new ShardEncoder(uniflow, options);
  const redis = await connect(options.queue, options.onState);
  const ended = new AbortController();
  const abortion = new Promise<never>((_, reject) => {
    const { signal } = options;
    signal?.addEventListener('abort', () => reject(aborted(signal)), { signal: ended.signal });
  });
  try {
    // Commands waiting for a lost connection cannot be cancelled, so this does not wait for them.
    return await Promise.race([
      planned(redis, encoder, source, out, { ...options, shardSize, maxFailures, maxWaiting, attempts }),
      abortion,
    ]);
  } finally {
    ended.abort();
    redis.disconnect();
  }
}

type Settings = QueueOptions & { shardSize: number; maxFailures: number; maxWaiting: number; attempts: number };

async function planned(redis: Redis, encoder: ShardEncoder, source: Items, out: string, settings: Settings): Promise<QueueResult> {
  const where = isS3(out) ? out : resolve(out);
  const output = await openOutput(where);
  const wanted = await headerOf(encoder, settings.shardSize);
  const sealed = await readManifest(output);
  if (sealed) {
    checkSameRun(output.name, sealed.header, wanted);
    return { manifest: sealed, before: sealed.count + sealed.failures, complete: true, planned: sealed.shards.length, skips: new Skips() };
  }
  const header = await beginRun(output, wanted);
  const jobs = new Jobs(redis, runId(where, header), where, settings.attempts);
  try {
    return await new Planner(header, source, output, jobs, settings).run();
  } finally {
    await jobs.close();
  }
}

class Planner {
  private readonly records = new Map<number, ShardRecord>();
  /** Hash of the ids that the source currently has for each shard. */
  private readonly ids: string[] = [];
  private total: number | undefined;
  private done = 0;
  private failures = 0;
  private before = 0;
  private nextLook = 0;
  private workers = 0;
  private skips = new Skips();

  constructor(
    private readonly header: Header,
    private readonly source: Items,
    private readonly output: Output,
    private readonly jobs: Jobs,
    private readonly options: Settings,
  ) {}

  async run(): Promise<QueueResult> {
    await this.look();
    this.before = this.done;
    for (let again = false; ; again = true) {
      await this.plan(again);
      if (this.options.detach && this.records.size < this.ids.length) return this.result(undefined);
      if (await this.settled()) return this.result(await this.seal());
      this.options.onState?.('the queue has lost shards: they are planned again');
    }
  }

  private result(manifest: Manifest | undefined): QueueResult {
    return { manifest, before: this.before, complete: false, planned: this.ids.length, skips: this.skips };
  }

  /** Reads the source and ensures that every shard is complete or has a job. */
  private async plan(again: boolean): Promise<void> {
    let index = 0;
    let total = 0;
    this.skips = new Skips();
    const source = unique(itemsOfSource(this.source, this.skips.add));
    for await (const { items, ids } of sections(source, this.options.shardSize)) {
      this.ids[index] = ids;
      await this.lookNowAndThen();
      this.checkIds(index);
      if (!this.records.has(index)) await this.offer(index, items, again);
      index++;
      total += items.length;
    }
    this.ids.length = index;
    this.total = total;
    for (const known of this.records.keys()) this.checkIds(known);
  }

  /** Retries a job that failed in an earlier call of the planner. */
  private async offer(index: number, items: Item[], again: boolean): Promise<void> {
    const state = await this.jobs.state(index);
    if (state === 'there' || (state === 'failed' && again)) return;
    if (state === 'none' && (await isRecorded(this.output, index))) return; // completed since the last poll
    if (state === 'failed') await this.jobs.remove(index);
    const portable = items.map(portableItem);
    while ((await this.jobs.waiting()) >= this.options.maxWaiting) {
      await this.lookNowAndThen();
      await sleep(SECOND / 10);
    }
    await this.jobs.add(index, portable);
  }

  /** Waits until all shards are complete. @returns false if some shard has neither a record nor a job. */
  private async settled(): Promise<boolean> {
    for (;;) {
      const before = await this.statesOfMissing();
      await this.look();
      const missing = before.filter(([index]) => !this.records.has(index));
      if (missing.length === 0) return true;
      if (missing.some(([, state]) => state === 'none')) return false;
      if (missing.every(([, state]) => state === 'failed')) throw await this.failed(missing.map(([index]) => index));
      await sleep(Math.max(SECOND / 4, this.nextLook - performance.now()));
    }
  }

  private async statesOfMissing(): Promise<[index: number, state: 'none' | 'failed' | 'there'][]> {
    const states: [number, 'none' | 'failed' | 'there'][] = [];
    for (const index of this.ids.keys()) if (!this.records.has(index)) states.push([index, await this.jobs.state(index)]);
    return states;
  }

  private async failed(missing: readonly number[]): Promise<UniFlowError> {
    const reasons = [];
    for (const index of missing.slice(0, 5)) reasons.push(`shard ${index}: ${await this.jobs.reason(index)}`);
    const more = missing.length > 5 ? `; and ${missing.length - 5} more` : '';
    return new UniFlowError(
      'INTERNAL',
      `${missing.length} of ${this.ids.length} shards failed: ${reasons.join('; ')}${more}. Run it again to try them again`,
    );
  }

  private async lookNowAndThen(): Promise<void> {
    throwIfAborted(this.options.signal);
    if (performance.now() >= this.nextLook) await this.look();
  }

  /** Reads new records. */
  private async look(): Promise<void> {
    throwIfAborted(this.options.signal);
    const begin = performance.now();
    for (const index of await committed(this.output)) {
      if (this.records.has(index)) continue;
      const record = await readRecord(this.output, index);
      this.records.set(index, record);
      this.done += record.items;
      this.failures += record.failures.length;
      record.failures.forEach((failure) => this.options.onFailure?.(failure));
    }
    const { maxFailures } = this.options;
    if (this.failures > maxFailures)
      throw new UniFlowError(
        'BAD_INPUT',
        `stopped: ${this.failures} pictures could not be read, and ${maxFailures} are allowed. Run it again to go on`,
      );
    this.workers = await this.jobs.workers();
    const { done, failures, total, workers } = this;
    this.options.onProgress?.({ done, before: this.before, failures, shards: this.records.size, total, workers });
    this.nextLook = performance.now() + Math.max(SECOND, (performance.now() - begin) / LOOKING);
  }

  /** @throws {UniFlowError} if the shard was made from other images than those of the source. */
  private checkIds(index: number): void {
    const record = this.records.get(index);
    if (!record || record.ids === this.ids[index]) return;
    const there = `${record.items}, '${record.firstId}' to '${record.lastId}'`;
    throw UniFlowError.expected(
      'BAD_INPUT',
      `${this.output.name}: the pictures of shard ${index}`,
      `those that it was made of (${there})`,
      'others',
    );
  }

  private async seal(): Promise<Manifest> {
    const records = [...this.records.values()];
    for (const { index } of records) this.checkIds(index);
    if (records.every(({ count }) => count === 0))
      throw new UniFlowError(
        'BAD_INPUT',
        `nothing is written: no picture could be read; ${this.failures > 0 ? `${this.failures} failed` : 'there is none'}`,
      );
    await tidy(this.output, records);
    await writeSkips(this.output, this.skips);
    return seal(this.output, this.header, records);
  }
}

/** Groups consecutive items, with the hash of their ids. */
async function* sections(source: AsyncIterable<Item>, size: number): AsyncGenerator<{ items: Item[]; ids: string }, void, undefined> {
  let items: Item[] = [];
  for await (const item of source) {
    items.push(item);
    if (items.length < size) continue;
    yield { items, ids: await hashIds(items) };
    items = [];
  }
  if (items.length > 0) yield { items, ids: await hashIds(items) };
}

async function hashIds(items: readonly Item[]): Promise<string> {
  const census = new Census();
  for (const passing = census.count(items); !(await passing.next()).done;);
  return census.record().ids;
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
