/** What a format of shards is: bytes of a shard, and rows out of them. */
import type { PictureRecord } from '../pipeline.js';
import type { Output } from '../output.js';
import type { Spool } from '../spool.js';
import type { StoreType } from '../store.js';

export type ArrayName = 'latents' | 'tokens';

/** One array of a shard: all pictures' vectors [T, width], in the order of the pictures. */
export interface ShardArray {
  name: ArrayName;
  width: number;
  rows: Spool;
}

/** What a shard's files are made of. */
export interface ShardContent {
  /** The beginning of the files' names. */
  stem: string;
  /** In text fields of formats that have them. */
  model: string;
  store: StoreType;
  pictures: readonly PictureRecord[];
  /** For each picture its first vector in the arrays, and their number as the last. */
  offsets: readonly number[];
  arrays: readonly ShardArray[];
  /** Whether all pictures have one grid, whatever pictures come. */
  uniform: boolean;
}

export interface ShardFile {
  name: string;
  chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>;
}

/** Where rows are read from. */
export interface StoredShard {
  input: Output;
  stem: string;
  store: StoreType;
  widths: Record<ArrayName, number>;
  offsets: readonly number[];
}

/** Reads a row's vectors as they are stored. */
export type RowReader = (name: ArrayName, row: number) => Promise<Uint8Array>;

export interface Format {
  /** Rejects where what it writes with is not installed: a run says so before it begins. */
  checkInstalled?(): Promise<unknown>;
  files(content: ShardContent): ShardFile[];
  open(shard: StoredShard): Promise<RowReader>;
}

/** The vectors of row `i` of an array, as they are stored. */
export function storedRow({ rows, width }: ShardArray, { offsets }: ShardContent, bytes: number, i: number): Promise<Buffer> {
  return rows.read((offsets[i] as number) * width * bytes, (offsets[i + 1] as number) * width * bytes);
}

/** [n,N,width] where all pictures have one grid, else [T,width]. */
export function shapeOf({ width }: ShardArray, { offsets, pictures, uniform }: ShardContent): number[] {
  const total = offsets.at(-1) as number;
  return uniform ? [pictures.length, total / pictures.length, width] : [total, width];
}
