/** Random access to the images of shards on disk, in order, by number or by id. Only requested data is kept in memory. */
import ndarray, { type NdArray } from 'ndarray';
import { createHash } from 'node:crypto';
import { checkInteger, checkOptions } from '../check.js';
import { UniFlowError } from '../errors.js';
import { elementType, type ArrayName, type RowReader } from './formats/format.js';
import type { PictureRecord } from './pipeline.js';
import { FORMATS } from './formats/index.js';
import { IdTable } from '../sources/id-table.js';
import { MANIFEST, readManifest, type Manifest } from './manifest.js';
import { FolderOutput, type Output } from './output.js';
import { stemOf, type ShardRecord } from './shard.js';
import { fromStored } from './store.js';

/** One image of {@link Shards}. */
export interface ShardSample extends PictureRecord {
  /** float32 [N,Z]; undefined if latents were not stored. */
  latents?: NdArray<Float32Array>;
  /** [N,G], if they were stored. */
  codes?: NdArray<Uint16Array>;
  /** float32 [N,D] */
  tokens?: NdArray<Float32Array>;
}

/** Options of {@link openShards}. */
export interface ReadOptions {
  /** Whether to read the tokens, if they were stored. Default true. */
  tokens?: boolean;
}

interface OpenShard {
  pictures: PictureRecord[];
  offsets: number[];
  read: RowReader;
}

/** Number of shards whose image lists are cached. */
const KEPT_SHARDS = 8;
/** Number of bytes read at a time during verification. */
const PIECE = 2 ** 24;

/**
 * Opens the shards of a complete run.
 * @throws {UniFlowError} `NOT_FOUND` if there is no manifest (the run is not complete), `BAD_INPUT` if the manifest is damaged.
 */
export async function openShards(folder: string | Output, options: ReadOptions = {}): Promise<Shards> {
  checkOptions(options);
  const input = typeof folder === 'string' ? new FolderOutput(folder) : folder;
  const manifest = await readManifest(input);
  if (manifest) return new Shards(input, manifest, options.tokens ?? true);
  throw UniFlowError.expected('NOT_FOUND', input.name, `a complete run with ${MANIFEST}`, 'none');
}

/** The images of a run, in the order of its source. Created by {@link openShards}. */
export class Shards implements AsyncIterable<ShardSample> {
  /** Number of images. */
  readonly length: number;
  private readonly begins: number[] = [];
  private readonly opened = new Map<number, Promise<OpenShard>>();
  private readonly arrays: ArrayName[];
  private ids: Promise<IdTable> | undefined;

  /** @internal */
  constructor(
    private readonly input: Output,
    readonly manifest: Manifest,
    tokens: boolean,
  ) {
    this.length = manifest.count;
    this.arrays = (Object.keys(manifest.header.arrays) as ArrayName[]).filter((name) => tokens || name !== 'tokens');
    let begin = 0;
    for (const { count } of manifest.shards) {
      this.begins.push(begin);
      begin += count;
    }
  }

  /**
   * Reads image `index`. @throws {UniFlowError} `BAD_INPUT` if the index is out of range or the shard is damaged; `NOT_FOUND` if the shard
   * is missing.
   */
  async at(index: number): Promise<ShardSample> {
    checkInteger('index', index, 0, this.length - 1);
    const shard = this.shardOf(index);
    try {
      return await this.sample(await this.open(shard), index - (this.begins[shard] as number));
    } catch (error) {
      this.opened.delete(shard); // the cached metadata of its files may be wrong
      if (error instanceof UniFlowError) throw error;
      const { message } = error as Error; // an error of a library, or caused by corrupt numbers
      throw UniFlowError.expected('BAD_INPUT', `${this.input.name}: ${stemOf(shard)}`, 'the files that were written', message, error);
    }
  }

  /** Reads the image with the given id; undefined if there is none. The first call reads all ids and keeps 12 bytes of each. */
  async get(id: string): Promise<ShardSample | undefined> {
    this.ids ??= this.readIds();
    const index = (await this.ids).get(id);
    if (index === undefined) return undefined;
    const sample = await this.at(index);
    return sample.id === id ? sample : undefined;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<ShardSample, void, undefined> {
    for (let index = 0; index < this.length; index++) yield await this.at(index);
  }

  /** Name of the run for messages. */
  get name(): string {
    return this.input.name;
  }

  /** Metadata of all images in order, without latents. */
  async *pictures(): AsyncGenerator<PictureRecord, void, undefined> {
    for (const { index, count } of this.manifest.shards) if (count > 0) yield* await this.picturesOf(stemOf(index));
  }

  /** Compares the hashes of all files with the manifest. @throws {UniFlowError} `BAD_INPUT` naming the first damaged file. */
  async verify(): Promise<void> {
    for (const { name, sha256 } of this.manifest.shards.flatMap(({ files }) => files)) {
      const actual = await this.hash(name);
      if (actual !== sha256) throw UniFlowError.expected('BAD_INPUT', `${this.input.name}: ${name}`, `sha256 ${sha256}`, actual);
    }
  }

  private async hash(name: string): Promise<string> {
    const hash = createHash('sha256');
    const size = (await this.input.size(name)) ?? 1; // if the file is missing, the read reports it
    for (let begin = 0; begin < size; begin += PIECE)
      hash.update(await this.input.read(name, { begin, end: Math.min(size, begin + PIECE) }));
    return hash.digest('hex');
  }

  /** Binary search for the last non-empty shard that begins at or before `index`. */
  private shardOf(index: number): number {
    let [low, high] = [0, this.begins.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if ((this.begins[middle] as number) <= index) low = middle;
      else high = middle;
    }
    return low;
  }

  private open(shard: number): Promise<OpenShard> {
    const found = this.opened.get(shard) ?? this.openShard(this.manifest.shards[shard] as ShardRecord);
    this.opened.delete(shard);
    this.opened.set(shard, found);
    for (const oldest of this.opened.keys()) {
      if (this.opened.size <= KEPT_SHARDS) break;
      this.opened.delete(oldest);
    }
    return found;
  }

  private async openShard({ index, count }: ShardRecord): Promise<OpenShard> {
    const stem = stemOf(index);
    const pictures = await this.picturesOf(stem);
    if (pictures.length !== count)
      throw UniFlowError.expected('BAD_INPUT', `${this.input.name}: ${stem}.jsonl`, `${count} lines`, `${pictures.length}`);
    const offsets = [0];
    for (const { grid } of pictures) offsets.push((offsets.at(-1) as number) + grid.rows * grid.cols);
    const { store, format, arrays } = this.manifest.header;
    const widths = { latents: 0, codes: 0, tokens: 0, ...arrays };
    return { pictures, offsets, read: await FORMATS[format].open({ input: this.input, stem, store, widths, offsets }) };
  }

  private async picturesOf(stem: string): Promise<PictureRecord[]> {
    const text = (await this.input.read(`${stem}.jsonl`)).toString().trimEnd();
    try {
      return text.split('\n').map((line) => JSON.parse(line) as PictureRecord);
    } catch (cause) {
      throw UniFlowError.expected('BAD_INPUT', `${this.input.name}: ${stem}.jsonl`, 'lines of JSON', (cause as Error).message, cause);
    }
  }

  private async sample({ pictures, read }: OpenShard, row: number): Promise<ShardSample> {
    const picture = pictures[row] as PictureRecord;
    const { store, arrays: widths } = this.manifest.header;
    const arrays = this.arrays.map(async (name) => {
      const values = await fromStored(await read(name, row), elementType(name, store));
      return [name, ndarray(values, [picture.grid.rows * picture.grid.cols, widths[name] as number])] as const;
    });
    return { ...picture, ...Object.fromEntries(await Promise.all(arrays)) };
  }

  private async readIds(): Promise<IdTable> {
    const ids = new IdTable();
    let number = 0;
    for await (const { id } of this.pictures()) ids.add(id, number++);
    return ids;
  }
}
