/** One shard: consecutive pictures to files and a record of them. What it has depends on its pictures, the model and the options alone. */
import { createHash } from 'node:crypto';
import { describe } from '../check.js';
import { reasonOf, throwIfAborted, UniFlowError } from '../errors.js';
import { ignoreRejection } from '../prefetch.js';
import type { UniFlow } from '../uniflow.js';
import { FORMATS, checkFormat, type FormatName } from './formats/index.js';
import type { ArrayName, Layout, ShardArray, ShardContent, ShardFile } from './formats/format.js';
import { mergeMoments, momentsOf, type Moments } from './moments.js';
import type { Output } from './output.js';
import type { Item } from '../sources/item.js';
import { Pipeline, type PictureBatch, type PictureRecord, type PipelineOptions } from './pipeline.js';
import { Spool } from './spool.js';
import { Stamps, type StampRecord } from './stamps.js';
import { checkStore, STORE, toStored, type StoreType } from './store.js';

/** What shards have. */
export interface ShardOptions extends Omit<PipelineOptions, 'hiddenStates' | 'signal'> {
  /** Default true; false stores tokens only. */
  latents?: boolean | undefined;
  /** Default float32. */
  store?: StoreType | undefined;
  /** Default safetensors. */
  format?: FormatName | undefined;
  /** What the model is called in the files. Default: nothing. */
  model?: string | undefined;
}

/** A picture that could not be read. */
export interface Failure {
  id: string;
  reason: string;
}

export interface FileRecord {
  name: string;
  bytes: number;
  /** In hex. */
  sha256: string;
}

/** All that there is to know of a shard, as JSON. Every id that it was given is in its files or among its failures. */
export interface ShardRecord {
  index: number;
  files: FileRecord[];
  /** Pictures in the files. */
  count: number;
  /** Pictures that it was given. */
  items: number;
  firstId: string;
  lastId: string;
  /** sha256 (hex) of the ids that it was given, in order. */
  ids: string;
  /** Of the files that the pictures are in. Not in records of earlier versions. */
  stamps?: StampRecord;
  /** Of the latents, all patches; null where there are none. */
  statistics: Moments | null;
  failures: Failure[];
}

/** What a shard is written to. */
export type ShardSink = Pick<Output, 'scratch' | 'write'>;

/** Batches whose rows are being converted and written. */
const WRITTEN_AT_ONCE = 4;

/** The beginning of the names of a shard's files. */
export function stemOf(index: number): string {
  return `shard-${String(index).padStart(6, '0')}`;
}

/** A shard among others: its files, and a line a picture. */
function shardLayout(stem: string, format: FormatName): Layout {
  return {
    fileOf: (array) => (format === 'npy' ? `${stem}.${array}.npy` : `${stem}.${format}`),
    filesOf: (files, { pictures }) => [
      ...files,
      { name: `${stem}.jsonl`, chunks: pictures.map((picture) => Buffer.from(`${JSON.stringify(picture)}\n`)) },
    ],
  };
}

/** Makes shards of one model. Several may be made at once; they share threads and memory. */
export class ShardEncoder {
  readonly pipeline: Pipeline;
  readonly arrays: readonly ArrayName[];
  readonly store: StoreType;
  readonly format: FormatName;
  readonly model: string;

  /** @throws {UniFlowError} `BAD_INPUT` for bad options. */
  constructor(
    readonly uniflow: UniFlow,
    options: ShardOptions = {},
  ) {
    const { latents = true, tokens = false, store = 'float32', format = 'safetensors', model = '' } = options;
    checkStore(store);
    checkFormat(format);
    if (!latents && !tokens) throw UniFlowError.expected('BAD_INPUT', 'latents', 'true, or tokens', describe(latents));
    this.arrays = [...(latents ? (['latents'] as const) : []), ...(tokens ? (['tokens'] as const) : [])];
    [this.store, this.format, this.model] = [store, format, model];
    this.pipeline = new Pipeline(uniflow, options);
  }

  /** Elements of a vector of the array. */
  widthOf(array: ArrayName): number {
    const { latentChannels, encoder } = this.uniflow.config;
    return array === 'latents' ? latentChannels : encoder.width;
  }

  /**
   * Encodes the items, which are taken as they are needed, and writes their shard; it is there when this resolves. Doing it twice, or on two
   * machines at once, leaves one shard. Pictures that cannot be read are left out, and `onFailure` may throw to end the work.
   *
   * @throws {UniFlowError} where the output cannot be written, `ABORTED`, or what the items throw. Then nothing of the shard is there.
   */
  async encode(
    index: number,
    items: Iterable<Item> | AsyncIterable<Item>,
    output: ShardSink,
    { signal, verify, layout = shardLayout(stemOf(index), this.format), onFailure, onCount }: EncodeShardOptions = {},
  ): Promise<ShardRecord> {
    const stamps = new Stamps(verify);
    const census = new Census(stamps);
    const rows = await Rows.open(this, output.scratch);
    const failures: Failure[] = [];
    const writing: Promise<void>[] = [];
    try {
      for await (const event of this.pipeline.run(census.count(items), signal)) {
        if ('error' in event) {
          const failure = { id: event.id, reason: reasonOf(event.error, event.error.subject ?? event.id) };
          failures.push(failure);
          onFailure?.(failure);
          continue;
        }
        writing.push(ignoreRejection(rows.add(event)));
        if (writing.length > WRITTEN_AT_ONCE) await writing.shift();
        onCount?.(event.pictures.length);
      }
      await Promise.all(writing);
      const files = await this.pipeline.meter.write.during(() => this.write(stemOf(index), layout, rows, output));
      return {
        index,
        files,
        count: rows.pictures.length,
        ...census.record(),
        stamps: await stamps.record(),
        statistics: await rows.moments(),
        failures,
      };
    } finally {
      await Promise.allSettled(writing);
      await rows.close();
    }
  }

  private async write(stem: string, layout: Layout, rows: Rows, output: ShardSink): Promise<FileRecord[]> {
    const { pictures } = rows;
    if (pictures.length === 0) return [];
    const offsets = [0];
    for (const { grid } of pictures) offsets.push((offsets.at(-1) as number) + grid.rows * grid.cols);
    const { store, model, pipeline } = this;
    const uniform = pipeline.target.fit !== 'native';
    const content: ShardContent = { stem, fileOf: layout.fileOf, store, model, pictures, offsets, arrays: rows.arrays, uniform };
    const files: FileRecord[] = [];
    for (const file of layout.filesOf(FORMATS[this.format].files(content), content)) files.push(await writeHashed(file, output));
    return files;
  }
}

export interface EncodeShardOptions {
  signal?: AbortSignal | undefined;
  /** @internal Of a file that is no shard of a run. */
  layout?: Layout | undefined;
  /** Record a hash of the files' content as well. */
  verify?: boolean | undefined;
  /** Called for each picture that cannot be read. */
  onFailure?: ((failure: Failure) => void) | undefined;
  /** Called with the number of pictures of each batch that is computed. */
  onCount?: ((pictures: number) => void) | undefined;
}

async function writeHashed({ name, chunks }: ShardFile, output: ShardSink): Promise<FileRecord> {
  const hash = createHash('sha256');
  let bytes = 0;
  async function* passing(): AsyncGenerator<Uint8Array> {
    for await (const chunk of chunks) {
      hash.update(chunk);
      bytes += chunk.length;
      yield chunk;
    }
  }
  await output.write(name, passing());
  return { name, bytes, sha256: hash.digest('hex') };
}

/** Which pictures pass by. */
export class Census {
  private readonly hash = createHash('sha256');
  private items = 0;
  private firstId = '';
  private lastId = '';

  /** @param stamps of their files, where they are wanted. */
  constructor(private readonly stamps?: Stamps) {}

  async *count(items: Iterable<Item> | AsyncIterable<Item>): AsyncGenerator<Item, void, undefined> {
    for await (const item of items) {
      if (this.items++ === 0) this.firstId = item.id;
      this.lastId = item.id;
      this.hash.update(`${JSON.stringify(item.id)}\n`);
      this.stamps?.add(item);
      yield item;
    }
  }

  /** Lets all of them pass. */
  async pass(items: Iterable<Item> | AsyncIterable<Item>, signal: AbortSignal | undefined): Promise<void> {
    for (const passing = this.count(items); !(await passing.next()).done;) throwIfAborted(signal);
  }

  record(): Pick<ShardRecord, 'items' | 'firstId' | 'lastId' | 'ids'> {
    const { items, firstId, lastId } = this;
    return { items, firstId, lastId, ids: this.hash.copy().digest('hex') };
  }
}

/** The rows of a shard on disk, each at its place whenever it comes. */
class Rows {
  readonly pictures: PictureRecord[] = [];
  private readonly parts: [row: number, Promise<Moments>][] = [];

  private constructor(
    private readonly encoder: ShardEncoder,
    readonly arrays: readonly ShardArray[],
  ) {}

  static async open(encoder: ShardEncoder, beside: string): Promise<Rows> {
    const arrays: ShardArray[] = [];
    for (const name of encoder.arrays) arrays.push({ name, width: encoder.widthOf(name), rows: await Spool.open(beside) });
    return new Rows(encoder, arrays);
  }

  async add(batch: PictureBatch): Promise<void> {
    const { store } = this.encoder;
    const [first] = batch.pictures;
    const latents = batch.latents.data as Float32Array;
    this.parts.push([first?.row ?? 0, ignoreRejection(momentsOf(latents, this.encoder.widthOf('latents')))]);
    for (const { row, record } of batch.pictures) this.pictures[row] = record;
    for (const { name, width, rows } of this.arrays) {
      const values = (name === 'latents' ? latents : batch.tokens?.data) as Float32Array;
      const stored = await toStored(values, store);
      await writeRuns(rows, stored, batch, width * STORE[store].bytes);
    }
  }

  /** In the order of the pictures, so that the sums are the same in every run. */
  async moments(): Promise<Moments | null> {
    let all: Moments | undefined;
    for (const [, part] of this.parts.sort(([a], [b]) => a - b)) all = mergeMoments(all, await part);
    return all ?? null;
  }

  async close(): Promise<void> {
    await Promise.allSettled(this.parts.map(([, part]) => part));
    for (const { rows } of this.arrays) await rows.close();
  }
}

/** Pictures that follow each other are written at once. */
async function writeRuns(rows: Spool, stored: Uint8Array, { pictures, grid }: PictureBatch, vector: number): Promise<void> {
  const size = grid.rows * grid.cols * vector;
  for (let i = 0; i < pictures.length;) {
    const begin = i;
    const { row, offset } = pictures[begin] as PictureBatch['pictures'][number];
    while (i < pictures.length && pictures[i]?.row === row + i - begin) i++;
    await rows.write(stored.subarray(begin * size, i * size), offset * vector);
  }
}
