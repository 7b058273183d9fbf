/** A whole run on this machine: shards into a folder, with nothing lost and nothing done twice, however often it is stopped. */
import { appendFile } from 'node:fs/promises';
import { join } from 'node:path';
import { checkInteger, checkOptions, describe } from '../check.js';
import { untilAborted } from '../prefetch.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { makeFolder, unwritable } from '../io/files.js';
import type { UniFlow } from '../uniflow.js';
import { Journal } from './journal.js';
import { checkSameRun, FAILURES, headerOf, readManifest, seal, writeFailures, writeSkips, type Header, type Manifest } from './manifest.js';
import type { Utilisation } from './meter.js';
import { FolderOutput } from './output.js';
import type { Item } from '../sources/item.js';
import { Census, ShardEncoder, type Failure, type ShardOptions, type ShardRecord } from './shard.js';
import { sameFiles, Stamps } from './stamps.js';
import { Skips } from '../sources/skips.js';
import { itemsOfSource, unique, type Source } from '../sources/source.js';

/** Of {@link encodeToShards}. */
export interface RunOptions extends ShardOptions {
  /** Pictures of a shard, those that cannot be read included. Default 1024. */
  shardSize?: number | undefined;
  /** More than so many pictures that cannot be read end the run, which can be taken up again. Default: any number. */
  maxFailures?: number | undefined;
  /**
   * Hash the files of the pictures, so that a run that goes on tells by their content whether they are the same. Default: by size and time of change.
   */
  verify?: boolean | undefined;
  signal?: AbortSignal | undefined;
  onFailure?: ((failure: Failure) => void) | undefined;
  onProgress?: ((progress: RunProgress) => void) | undefined;
}

export interface RunProgress {
  /** Pictures that are done with: computed, unreadable, or there before. */
  done: number;
  /** Of these, how many were there before. */
  before: number;
  failures: number;
  /** Since the last time it was asked for. */
  utilisation: () => Utilisation;
}

export interface RunResult {
  manifest: Manifest;
  /** Pictures that were there before. */
  before: number;
  /** Whether the run was complete before, and nothing was done. */
  complete: boolean;
  /** Files that the source passed over; they are named in skipped.jsonl. */
  skips: Skips;
}

/** Shards that are computed or written at once: one may wait for the disk while another begins. */
const SHARDS_AT_ONCE = 3;
const MAX_SHARD = 2 ** 20;
const OPTIONS: readonly (keyof RunOptions)[] = [
  ...([
    'shardSize',
    'maxFailures',
    'verify',
    'signal',
    'onFailure',
    'onProgress',
    'latents',
    'tokens',
    'store',
    'format',
    'model',
  ] as const),
  ...(['fit', 'size', 'batchSize', 'download'] as const),
];

/**
 * Encodes the pictures of a source into shards in `folder`, with a manifest when it is complete. A run that was stopped, in whatever way, is
 * taken up where it was when this is called again with the same pictures and options; the shards are the same as without the stop, byte for
 * byte. Pictures that cannot be read are left out, and are named in failures.jsonl.
 *
 * @throws {UniFlowError} `BAD_INPUT` for bad options, where the folder has another run, is in use or cannot be written, where the pictures are not those
 * of the run, and after `maxFailures`; `ABORTED`. Shards that are there stay.
 */
export async function encodeToShards(
  uniflow: UniFlow,
  source: Source | Iterable<Item> | AsyncIterable<Item>,
  folder: string,
  options: RunOptions = {},
): Promise<RunResult> {
  checkOptions(options, OPTIONS);
  if (typeof folder !== 'string' || folder === '') throw UniFlowError.expected('BAD_INPUT', 'folder', 'a path', describe(folder));
  const { shardSize = 1024, maxFailures = Infinity } = options;
  checkInteger('shardSize', shardSize, 1, MAX_SHARD);
  if (maxFailures !== Infinity) checkInteger('maxFailures', maxFailures, 0, Number.MAX_SAFE_INTEGER);
  throwIfAborted(options.signal);
  const encoder = new ShardEncoder(uniflow, options);
  await makeFolder(folder);
  const output = new FolderOutput(folder);
  const header = await headerOf(encoder, shardSize);
  const skips = new Skips();
  const items = itemsOfSource(source, skips.add);
  const sealed = await completeRun(output, header, items, skips, options);
  if (sealed) return sealed;
  const journal = await Journal.open(output, header);
  try {
    const meanwhile = await completeRun(output, header, items, skips, options); // by who had the journal until now
    if (meanwhile) return meanwhile;
    const run = new Run(encoder, output, journal, shardSize, options);
    await run.all(unique(untilAborted(items, options.signal)));
    const records = [...journal.records.values()];
    await writeSkips(output, skips);
    if (records.every(({ count }) => count === 0)) await refuseEmpty(output, journal);
    return { manifest: await seal(output, journal.header, records), before: run.before, complete: false, skips };
  } finally {
    await journal.close();
  }
}

/** What there is to say of a run that is complete; undefined where it is not. @throws {UniFlowError} where it is another one. */
async function completeRun(
  output: FolderOutput,
  header: Header,
  source: Parameters<typeof unique>[0],
  skips: Skips,
  { signal, verify }: RunOptions,
): Promise<RunResult | undefined> {
  const manifest = await readManifest(output);
  if (!manifest) return undefined;
  checkSameRun(output.name, manifest.header, header);
  const items = unique(untilAborted(source, signal));
  try {
    for (const record of manifest.shards)
      await checkPictures(output, record, (await Section.next(items, header.shardSize)) ?? [], { signal, verify });
    const more = await items.next();
    if (!more.done)
      throw UniFlowError.expected(
        'BAD_INPUT',
        `${output.name}: the pictures`,
        'those of the run, which is complete',
        `'${more.value.id}' after them`,
      );
  } finally {
    await items.return();
  }
  return { manifest, before: manifest.count + manifest.failures, complete: true, skips };
}

/** Passes over the pictures of a shard that is there. @throws {UniFlowError} where they were others. */
async function checkPictures(
  output: FolderOutput,
  record: ShardRecord,
  pictures: Parameters<typeof unique>[0],
  { signal, verify }: Pick<RunOptions, 'signal' | 'verify'>,
): Promise<void> {
  const stamps = new Stamps(verify);
  const census = new Census(stamps);
  await census.pass(pictures, signal);
  const { ids, items, firstId, lastId } = census.record();
  if (ids === record.ids && !sameFiles(record.stamps, await stamps.record())) throw changed(output, record, verify);
  if (ids === record.ids) return;
  throw UniFlowError.expected(
    'BAD_INPUT',
    `${output.name}: the pictures of shard ${record.index}`,
    `those that it was made of (${record.items}, '${record.firstId}' to '${record.lastId}')`,
    `${items}, '${firstId}' to '${lastId}'`,
  );
}

/** Files that are others under the same names. */
function changed(output: FolderOutput, { index, firstId, lastId, stamps }: ShardRecord, verify = false): UniFlowError {
  const differ = verify && stamps?.content !== undefined ? 'content' : 'size or time of change';
  const advice = stamps?.content !== undefined && !verify ? ', or compare the content with verify' : '';
  return UniFlowError.expected(
    'BAD_INPUT',
    `${output.name}: the files of shard ${index}, '${firstId}' to '${lastId}'`,
    'those that it was made of',
    `a file of another ${differ}. Choose another folder${advice}`,
  );
}

/** A run without a picture is no run, but maybe a wrong path: the folder can be used again. */
async function refuseEmpty(output: FolderOutput, journal: Journal): Promise<never> {
  await journal.clear();
  const why = (await output.size(FAILURES)) === undefined ? 'there is none' : `see ${join(output.name, FAILURES)}`;
  throw new UniFlowError('BAD_INPUT', `nothing is written: no picture could be read; ${why}`);
}

class Run {
  private done = 0;
  private failures = 0;
  before = 0;
  private readonly stop = new AbortController();
  private readonly signal: AbortSignal;
  private noting: Promise<void> = Promise.resolve();
  private failure: { error: unknown } | undefined;

  constructor(
    private readonly encoder: ShardEncoder,
    private readonly output: FolderOutput,
    private readonly journal: Journal,
    private readonly shardSize: number,
    private readonly options: RunOptions,
  ) {
    this.signal = options.signal ? AbortSignal.any([options.signal, this.stop.signal]) : this.stop.signal;
  }

  /** Shard by shard. The items of one are taken from the source before the next begins, but it may then still be computed. */
  async all(items: AsyncIterator<Item>): Promise<void> {
    const known = [...this.journal.records.values()].flatMap((record) => record.failures);
    await writeFailures(this.output, known);
    const underWay = new Set<Promise<void>>();
    try {
      for (let index = 0; !this.signal.aborted; index++) {
        const section = await Section.next(items, this.shardSize);
        if (!section) break;
        const record = this.journal.records.get(index);
        if (record) {
          await this.skip(record, section);
          continue;
        }
        const work: Promise<void> = this.shard(index, section)
          .catch((error: unknown) => this.fail(error))
          .finally(() => underWay.delete(work));
        underWay.add(work);
        await section.taken;
        if (underWay.size >= SHARDS_AT_ONCE) await Promise.race(underWay);
      }
    } catch (error) {
      this.fail(error);
    }
    await Promise.all(underWay);
    await this.noting;
    await items.return?.();
    throwIfAborted(this.options.signal);
    if (this.failure) throw this.failure.error;
    this.checkEnd();
  }

  /** The first error ends the others' work, and is what the run ends with. */
  private fail(error: unknown): void {
    this.failure ??= { error };
    this.stop.abort();
  }

  private async shard(index: number, section: Section): Promise<void> {
    const { signal } = this;
    try {
      const onCount = (pictures: number): void => this.progress(pictures);
      const record = await this.encoder.encode(index, section, this.output, {
        ...{ signal, verify: this.options.verify, onCount },
        onFailure: (f) => this.failed(f),
      });
      await this.journal.append(record);
    } finally {
      section.end();
    }
  }

  private async skip(record: ShardRecord, section: Section): Promise<void> {
    await checkPictures(this.output, record, section, { signal: this.signal, verify: this.options.verify });
    this.before += record.items;
    this.failures += record.failures.length;
    this.progress(record.items);
  }

  /** More shards than the source has pictures for: it is another source. */
  private checkEnd(): void {
    const tried = [...this.journal.records.values()].reduce((sum, { items }) => sum + items, 0);
    if (tried === this.done) return;
    throw UniFlowError.expected('BAD_INPUT', `${this.output.name}: the pictures`, `those of the run, ${tried} or more`, `${this.done}`);
  }

  private failed(failure: Failure): void {
    this.failures++;
    const path = join(this.output.name, FAILURES);
    this.noting = this.noting
      .then(() => appendFile(path, `${JSON.stringify(failure)}\n`))
      .catch((error: unknown) => this.fail(unwritable(path, error)));
    this.options.onFailure?.(failure);
    this.progress(1);
    const { maxFailures = Infinity } = this.options;
    if (this.failures > maxFailures)
      throw new UniFlowError(
        'BAD_INPUT',
        `stopped: ${this.failures} pictures could not be read, and ${maxFailures} are allowed; see ${path}. Run it again to go on`,
      );
  }

  private progress(pictures: number): void {
    this.done += pictures;
    const { done, before, failures } = this;
    this.options.onProgress?.({ done, before, failures, utilisation: () => this.encoder.pipeline.meter.read() });
  }
}

/** Consecutive items of a source, which is taken up again after them. */
class Section implements AsyncIterable<Item> {
  /** Resolves when nothing of it is wanted any more. */
  readonly taken: Promise<void>;
  end!: () => void;

  private constructor(
    private readonly first: Item,
    private readonly rest: AsyncIterator<Item>,
    private readonly size: number,
  ) {
    this.taken = new Promise((resolve) => (this.end = resolve));
  }

  /** Undefined at the end of the source. */
  static async next(items: AsyncIterator<Item>, size: number): Promise<Section | undefined> {
    const first = await items.next();
    return first.done ? undefined : new Section(first.value, items, size);
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Item, void, undefined> {
    yield this.first;
    for (let i = 1; i < this.size; i++) {
      const next = await this.rest.next();
      if (next.done) break;
      yield next.value;
    }
    this.end();
  }
}
