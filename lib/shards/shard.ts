/**
 * Encodes one shard: consecutive images, written to files with a record. The contents depend only on the images, the model and the options.
 */
import { createHash } from 'node:crypto';
import { describe } from '../check.js';
import { groupCount, requireLevels } from '../codes.js';
import { reasonOf, UniFlowError } from '../errors.js';
import type { Encoded } from '../model.js';
import { ignoreRejection } from '../prefetch.js';
import type { UniFlow } from '../uniflow.js';
import { FORMATS, checkFormat, type FormatName } from './formats/index.js';
import { elementType, type ArrayName, type Layout, type ShardArray, type ShardContent, type ShardFile } from './formats/format.js';
import { mergeMoments, momentsOf, type Moments } from './moments.js';
import type { Output } from './output.js';
import type { Item } from '../sources/item.js';
import { encodePipeline, type EncodePipelineOptions, type PictureBatch, type PictureRecord, type Pipeline } from './pipeline.js';
import { Spool } from './spool.js';
import { Stamps, type StampRecord } from './stamps.js';
import { checkStore, ELEMENTS, toStored, type StoreType } from './store.js';

/** Options for the contents of shards. */
export interface ShardOptions extends Omit<EncodePipelineOptions, 'hiddenStates' | 'signal'> {
  /** Default true, unless codes are stored. */
  latents?: boolean | undefined;
  /** Default float32. */
  store?: StoreType | undefined;
  /** Default safetensors. */
  format?: FormatName | undefined;
  /** Name of the model to store in the files. Default: none. */
  model?: string | undefined;
}

/** An image that could not be read. */
export interface Failure {
  id: string;
  reason: string;
}

export interface FileRecord {
  name: string;
  bytes: number;
  /** Hash in hex. */
  sha256: string;
}

/** Complete description of a shard, as JSON. Every id given to the shard is in its files or among its failures. */
export interface ShardRecord {
  index: number;
  files: FileRecord[];
  /** Number of images in the files. */
  count: number;
  /** Number of images given to the shard. */
  items: number;
  firstId: string;
  lastId: string;
  /** sha256 (hex) of the ids given to the shard, in order. */
  ids: string;
  /** Stamps of the image files. Missing in records of earlier versions. */
  stamps?: StampRecord;
  /** Statistics of the latents over all patches; null if no latents are stored. */
  statistics: Moments | null;
  failures: Failure[];
}

/** Destination of a shard's files. */
export type ShardSink = Pick<Output, 'scratch' | 'write'>;

/** Batches whose rows may be converted and written concurrently. */
const WRITTEN_AT_ONCE = 4;

/** Common prefix of the names of a shard's files. */
export function stemOf(index: number): string {
  return `shard-${String(index).padStart(6, '0')}`;
}

/** Layout of a shard within a run: its files, and a list with one line per image. */
function shardLayout(stem: string, format: FormatName): Layout {
  return {
    fileOf: (array) => (format === 'npy' ? `${stem}.${array}.npy` : `${stem}.${format}`),
    filesOf: (files, { pictures }) => [
      ...files,
      { name: `${stem}.jsonl`, chunks: pictures.map((picture) => Buffer.from(`${JSON.stringify(picture)}\n`)) },
    ],
  };
}

/** Encodes shards with one model. Concurrent shards share threads and memory. */
export class ShardEncoder {
  readonly pipeline: Pipeline<Encoded>;
  readonly arrays: readonly ArrayName[];
  readonly store: StoreType;
  readonly format: FormatName;
  readonly model: string;

  /** @throws {UniFlowError} `BAD_INPUT` for bad options. */
  constructor(
    readonly uniflow: UniFlow,
    options: ShardOptions = {},
  ) {
    const { codes = false, latents = !codes, tokens = false, store = 'float32', format = 'safetensors', model = '' } = options;
    checkStore(store);
    checkFormat(format);
    const stored: [ArrayName, boolean][] = [['latents', latents], ['codes', codes], ['tokens', tokens]]; // prettier-ignore
    this.arrays = stored.flatMap(([name, wanted]) => (wanted ? [name] : []));
    if (this.arrays.length === 0) throw UniFlowError.expected('BAD_INPUT', 'latents', 'true, or tokens or codes', describe(latents));
    if (codes) requireLevels(uniflow.config);
    [this.store, this.format, this.model] = [store, format, model];
    this.pipeline = encodePipeline(uniflow, options);
  }

  /** Vector length of the array. */
  widthOf(array: ArrayName): number {
    const { config } = this.uniflow;
    return array === 'latents' ? config.latentChannels : array === 'codes' ? groupCount(config) : config.encoder.width;
  }

  /**
   * Encodes the items, taking them as needed, and writes their shard, which is complete once this resolves. Repeating it, or running it on
   * two machines at once, leaves one shard. Images that cannot be read are skipped; `onFailure` may throw to stop.
   *
   * @throws {UniFlowError} if the output cannot be written; `ABORTED`; errors of `items`. After an error, no part of the shard remains.
   */
  async encode(
    index: number,
    items: Iterable<Item> | AsyncIterable<Item>,
    output: ShardSink,
    { signal, verify, layout = shardLayout(stemOf(index), this.format), onFailure, onCount }: EncodeShardOptions = {},
  ): Promise<ShardRecord> {
    const stamps = new Stamps(verify);
    const ids = new IdHasher();
    const passing = async function* (): AsyncGenerator<Item, void, undefined> {
      for await (const item of items) {
        ids.add(item);
        stamps.add(item);
        yield item;
      }
    };
    const rows = await Rows.open(this, output.scratch);
    const failures: Failure[] = [];
    const writing: Promise<void>[] = [];
    try {
      for await (const event of this.pipeline.run(passing(), signal)) {
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
        ...ids.record(),
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
  /** @internal Layout of a file that is not part of a run. */
  layout?: Layout | undefined;
  /** Also record a hash of the files' contents. */
  verify?: boolean | undefined;
  /** Called for each image that cannot be read. */
  onFailure?: ((failure: Failure) => void) | undefined;
  /** Called after each computed batch with its number of images. */
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

/** The images of a shard, as its record describes them. */
export type ShardIds = Pick<ShardRecord, 'items' | 'firstId' | 'lastId' | 'ids'>;

/** Counts and hashes the ids of items in order. */
export class IdHasher {
  private readonly hash = createHash('sha256');
  private items = 0;
  private firstId = '';
  private lastId = '';

  add({ id }: Item): void {
    if (this.items++ === 0) this.firstId = id;
    this.lastId = id;
    this.hash.update(`${JSON.stringify(id)}\n`);
  }

  record(): ShardIds {
    const { items, firstId, lastId } = this;
    return { items, firstId, lastId, ids: this.hash.copy().digest('hex') };
  }
}

/** The rows of a shard on disk. They can be written in any order. */
class Rows {
  readonly pictures: PictureRecord[] = [];
  private readonly parts: [row: number, Promise<Moments>][] = [];

  private constructor(
    private readonly encoder: ShardEncoder,
    readonly arrays: readonly ShardArray[],
  ) {}

  static async open(encoder: ShardEncoder, beside: string): Promise<Rows> {
    const arrays: ShardArray[] = [];
    for (const name of encoder.arrays)
      arrays.push({ name, width: encoder.widthOf(name), type: elementType(name, encoder.store), rows: await Spool.open(beside) });
    return new Rows(encoder, arrays);
  }

  async add(batch: PictureBatch): Promise<void> {
    const [first] = batch.pictures;
    const latents = batch.latents.data as Float32Array;
    this.parts.push([first?.row ?? 0, ignoreRejection(momentsOf(latents, this.encoder.widthOf('latents')))]);
    for (const { row, record } of batch.pictures) this.pictures[row] = record;
    for (const { name, width, type, rows } of this.arrays)
      await writeRuns(rows, await toStored(batch[name]?.data as Float32Array | Uint16Array, type), batch, width * ELEMENTS[type].bytes);
  }

  /** Merged in the order of the images, so that the sums are the same in every run. */
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

/** Writes each sequence of consecutive images at once. */
async function writeRuns(rows: Spool, stored: Uint8Array, { pictures, grid }: PictureBatch, vector: number): Promise<void> {
  const size = grid.rows * grid.cols * vector;
  for (let i = 0; i < pictures.length;) {
    const begin = i;
    const { row, offset } = pictures[begin] as PictureBatch['pictures'][number];
    while (i < pictures.length && pictures[i]?.row === row + i - begin) i++;
    await rows.write(stored.subarray(begin * size, i * size), offset * vector);
  }
}
