/**
 * Plans a run and completes it: has every shard of the source encoded by a driver, in this process or on other machines, and writes the
 * manifest. A run can be stopped and resumed any number of times without losing or repeating work.
 */
import { join } from 'node:path';
import { checkInteger } from '../check.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { untilAborted } from '../prefetch.js';
import type { Item } from '../sources/item.js';
import { Skips } from '../sources/skips.js';
import { itemsOfSource, unique, type Source } from '../sources/source.js';
import { beginRun, clearRun, readRecords, tidy } from './commits.js';
import { checkSameRun, FAILURES, readManifest, seal, writeFailures, writeSkips, type Header, type Manifest } from './manifest.js';
import type { Utilisation } from './meter.js';
import type { Output } from './output.js';
import { compareIds, compareShard, plannedShards, type PlannedShard } from './plan.js';
import type { Failure, ShardIds, ShardOptions, ShardRecord } from './shard.js';

/** Options of {@link encodeToShards}. */
export interface RunOptions extends ShardOptions {
  /** Number of images per shard, including unreadable ones. Default 1024. */
  shardSize?: number | undefined;
  /** The run stops after more unreadable images than this, and can be resumed. Default: unlimited. */
  maxFailures?: number | undefined;
  /** Also hash the image files, so that a resumed run detects changes by content. Default: by size and modification time. */
  verify?: boolean | undefined;
  signal?: AbortSignal | undefined;
  onFailure?: ((failure: Failure) => void) | undefined;
  onProgress?: ((progress: RunProgress) => void) | undefined;
}

export interface RunProgress {
  /** Images processed so far: computed, unreadable, or completed earlier. */
  done: number;
  /** Images completed by earlier calls. */
  before: number;
  failures: number;
  /** Utilisation since the last call. */
  utilisation: () => Utilisation;
}

export interface RunResult {
  manifest: Manifest;
  /** Images completed by earlier calls. */
  before: number;
  /** Whether the run was already complete, so that nothing was done. */
  complete: boolean;
  /** Number of shards of the run. */
  planned: number;
  /** Files that the source skipped; they are listed in skipped.jsonl. */
  skips: Skips;
}

/** Like {@link RunResult}, without a manifest if the run was planned but is not complete. */
export type PlanResult = Omit<RunResult, 'manifest'> & { manifest: Manifest | undefined };

export type ItemSource = Source | Iterable<Item> | AsyncIterable<Item>;

/** Has shards encoded and committed: by this process, or by workers of a queue. */
export interface Driver {
  /** Takes a shard that has no record. Resolves once the driver takes another. `again`: the source is read again after a loss. */
  encode(shard: PlannedShard, again: boolean): Promise<void>;
  /** Waits until the run has a record of every shard. @returns false if some were lost and have to be planned again. */
  settled(): Promise<boolean>;
  /** Waits for work of this process after the run has failed. */
  close?(): Promise<void>;
}

type Options = Pick<RunOptions, 'maxFailures' | 'verify' | 'signal' | 'onFailure'>;

const MAX_SHARD = 2 ** 20;

/** @throws {UniFlowError} `BAD_INPUT` for a bad size or limit. @returns the shard size. */
export function checkRun(options: Pick<RunOptions, 'shardSize' | 'maxFailures' | 'signal'>): number {
  const { shardSize = 1024, maxFailures = Infinity, signal } = options;
  checkInteger('shardSize', shardSize, 1, MAX_SHARD);
  if (maxFailures !== Infinity) checkInteger('maxFailures', maxFailures, 0, Number.MAX_SAFE_INTEGER);
  throwIfAborted(signal);
  return shardSize;
}

export class Run {
  /** Records of the committed shards, as far as they have been read. */
  readonly records = new Map<number, ShardRecord>();
  /** Images processed so far. */
  done = 0;
  /** Images completed by earlier calls. */
  before = 0;
  /** Number of images of the source; undefined until it has been read to the end. */
  total: number | undefined;
  /** Fires when the run is aborted or has failed. */
  readonly signal: AbortSignal;
  private readonly stop = new AbortController();
  private failure: { error: unknown } | undefined;
  /** Ids of the source's images, by shard. */
  private readonly planned: ShardIds[] = [];
  private readonly failed: Failure[] = [];
  private skips = new Skips();

  constructor(
    readonly output: Output,
    public header: Header,
    private readonly source: ItemSource,
    private readonly options: Options,
    /** Called when the counts have changed. */
    readonly report: (run: Run) => void,
  ) {
    this.signal = options.signal ? AbortSignal.any([options.signal, this.stop.signal]) : this.stop.signal;
  }

  /** The result if the run is already complete. @throws {UniFlowError} `BAD_INPUT` if it is a different run, or one of other images. */
  async completed(): Promise<RunResult | undefined> {
    const manifest = await readManifest(this.output);
    if (!manifest) return undefined;
    checkSameRun(this.output.name, manifest.header, this.header);
    for (const record of manifest.shards) this.records.set(record.index, record);
    await this.plan(({ first }) => {
      const subject = `${this.output.name}: the images`;
      throw UniFlowError.expected('BAD_INPUT', subject, 'those of the run, which is complete', `'${first.id}' after them`);
    });
    return { ...this.result(manifest), before: manifest.count + manifest.failures, complete: true };
  }

  /** Starts or resumes the run. @throws {UniFlowError} `BAD_INPUT` if the output holds a different one. */
  async begin(): Promise<void> {
    this.header = await beginRun(this.output, this.header);
  }

  /** Reads the records of the shards that have been committed. */
  async resume(): Promise<void> {
    for await (const record of readRecords(this.output, this.records)) this.records.set(record.index, record);
  }

  /** Has all shards encoded that have no record. @param detach return once they are planned */
  async encode(driver: Driver, detach = false): Promise<PlanResult> {
    try {
      for (const { items, failures } of this.records.values()) {
        this.before += items;
        for (const failure of failures) this.failed.push(failure);
      }
      this.count(this.before);
      this.checkFailures();
      for (let again = false; ; again = true) {
        await this.plan((shard) => driver.encode(shard, again));
        if (detach && this.missing().length > 0) return this.result(undefined);
        if (await driver.settled()) return this.result(await this.seal());
      }
    } catch (error) {
      this.fail(error);
      await driver.close?.();
      await writeFailures(this.output, this.failed).catch(() => undefined); // the first error matters
      throwIfAborted(this.options.signal);
      throw (this.failure as { error: unknown }).error;
    }
  }

  /** Number of unreadable images so far. */
  get failures(): number {
    return this.failed.length;
  }

  /** Indices of the planned shards without a record. */
  missing(): number[] {
    return [...this.planned.keys()].filter((index) => !this.records.has(index));
  }

  /** Adds a committed shard. @param counted number of its images that have been counted, with their failures, while it was encoded */
  add(record: ShardRecord, counted = 0): void {
    this.records.set(record.index, record);
    if (counted === 0) for (const failure of record.failures) this.addFailure(failure);
    this.count(record.items - counted);
  }

  count(images: number): void {
    this.done += images;
    this.report(this);
  }

  /** @throws {UniFlowError} `BAD_INPUT` after too many. */
  addFailure(failure: Failure): void {
    this.failed.push(failure);
    this.options.onFailure?.(failure);
    this.checkFailures();
  }

  /** Takes the items of a committed shard. @throws {UniFlowError} `BAD_INPUT` if it was made of other images. */
  async compare(record: ShardRecord, shard: PlannedShard): Promise<void> {
    await compareShard(this.output.name, record, shard, { signal: this.signal, verify: this.options.verify });
  }

  /** Stops all shards of this process. The run rejects with the first error. */
  fail(error: unknown): void {
    this.failure ??= { error };
    this.stop.abort();
  }

  /** Reads the source: compares the committed shards with it, and offers the others. */
  private async plan(offer: (shard: PlannedShard) => Promise<void>): Promise<void> {
    this.skips = new Skips();
    this.planned.length = 0;
    const items = unique(untilAborted(itemsOfSource(this.source, this.skips.add), this.signal));
    try {
      for await (const shard of plannedShards(items, this.header.shardSize)) {
        const record = this.records.get(shard.index);
        await (record ? this.compare(record, shard) : offer(shard));
        this.planned.push(await shard.ids());
      }
    } catch (error) {
      this.fail(error);
      throw error;
    } finally {
      await items.return();
    }
    this.total = this.planned.reduce((sum, { items }) => sum + items, 0);
    for (const record of this.records.values()) compareIds(this.output.name, record, this.planned[record.index]);
  }

  private checkFailures(): void {
    const { maxFailures = Infinity } = this.options;
    if (this.failures <= maxFailures) return;
    const count = `${this.failures} images could not be read, and ${maxFailures} are allowed`;
    throw new UniFlowError('BAD_INPUT', `stopped: ${count}; see ${join(this.output.name, FAILURES)}. Run it again to go on`);
  }

  private result<M>(manifest: M): Omit<RunResult, 'manifest'> & { manifest: M } {
    return { manifest, before: this.before, complete: false, planned: this.planned.length, skips: this.skips };
  }

  private async seal(): Promise<Manifest> {
    const { output, header } = this;
    const records = [...this.records.values()];
    for (const record of records) compareIds(output.name, record, this.planned[record.index]);
    if (records.every(({ count }) => count === 0)) await this.refuseEmpty();
    await tidy(output, records);
    await writeSkips(output, this.skips);
    return seal(output, header, records);
  }

  /** Refuses a run without readable images, which may be a wrong path, and frees the output for another run. */
  private async refuseEmpty(): Promise<never> {
    await clearRun(this.output);
    const why = this.failures === 0 ? 'there is none' : `see ${join(this.output.name, FAILURES)}`;
    throw new UniFlowError('BAD_INPUT', `nothing is written: no image could be read; ${why}`);
  }
}
