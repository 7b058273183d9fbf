/**
 * A run on this machine: writes shards to a folder, and can be stopped and resumed any number of times without losing or repeating work.
 */
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
  /** Files that the source skipped; they are listed in skipped.jsonl. */
  skips: Skips;
}

/** Shards computed or written concurrently: the next can start while one waits for the disk. */
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
 * Encodes the images of a source into shards in `folder`, and writes a manifest at the end. Calling it again with the same images and
 * options resumes a run that was stopped or killed; the resulting shards are identical, byte for byte. Images that cannot be read are
 * skipped and listed in failures.jsonl.
 *
 * @throws {UniFlowError} `BAD_INPUT` for bad options, if the folder holds another run, is in use or cannot be written, if the images differ
 * from those of the run, and after `maxFailures`; `ABORTED`. Completed shards are kept.
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
    const meanwhile = await completeRun(output, header, items, skips, options); // another process may have completed the run before releasing the journal
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

/** The result of a run that is already complete; undefined if it is not. @throws {UniFlowError} if it is a different run. */
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

/** Skips the images of a completed shard. @throws {UniFlowError} if they are not the images it was made from. */
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

/** The error for files that changed under the same names. */
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

/** Refuses a run without readable images, which may be a wrong path, and frees the folder for another run. */
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

  /**
   * Processes the shards in order. All items of a shard are taken from the source before the next shard starts, but its computation may
   * still be running.
   */
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

  /** Stops all shards. The run rejects with the first error. */
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

  /** Rejects a source with fewer images than the completed shards: it is a different source. */
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

/** Consecutive items of a source. The source continues after them. */
class Section implements AsyncIterable<Item> {
  /** Resolves once no more items are needed. */
  readonly taken: Promise<void>;
  end!: () => void;

  private constructor(
    private readonly first: Item,
    private readonly rest: AsyncIterator<Item>,
    private readonly size: number,
  ) {
    this.taken = new Promise((resolve) => (this.end = resolve));
  }

  /** The next items; undefined at the end of the source. */
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
