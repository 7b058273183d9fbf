/** What a format of shards is: bytes of a shard, and rows out of them. */
import { UniFlowError } from '../../errors.js';
import type { Grid } from '../../tensor.js';
import type { PictureRecord } from '../pipeline.js';
import type { Output } from '../output.js';
import type { Spool } from '../spool.js';
import { STORE, type StoreType } from '../store.js';

export type ArrayName = 'latents' | 'tokens';

/** One array of a shard: all pictures' vectors [T, width], in the order of the pictures. */
export interface ShardArray {
  name: ArrayName;
  width: number;
  rows: Spool;
}

/** The names of the files of a shard, and of what is beside them. */
export interface Layout {
  /** The file that has the array, or all of them. */
  fileOf: (array: ArrayName) => string;
  /** All files of a shard in the order in which they are written: those of its format, and the list of its pictures. */
  filesOf: (files: readonly ShardFile[], content: ShardContent) => ShardFile[];
}

/** What a shard's files are made of. */
export interface ShardContent {
  /** `shard-000000`: keys in archives begin with its number. */
  stem: string;
  fileOf: Layout['fileOf'];
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

/** What is known of a picture by a file alone. */
export interface FilePicture {
  id?: string | undefined;
  grid?: Grid | undefined;
  patches: number;
}

/** The latents of one file, of a run or not, as it describes them itself. */
export interface LatentsFile {
  pictures: readonly FilePicture[];
  store: StoreType;
  width: number;
  /** The vectors of a picture as they are stored. */
  read: (row: number) => Promise<Uint8Array>;
}

export interface Format {
  /** Rejects where what it writes with is not installed: a run says so before it begins. */
  checkInstalled?(): Promise<unknown>;
  files(content: ShardContent): ShardFile[];
  /** A shard of a run, which the manifest and the list of its pictures describe. */
  open(shard: StoredShard): Promise<RowReader>;
  /** A file that nothing else describes. @throws where it has no latents. */
  openFile(input: Output, name: string): Promise<LatentsFile>;
}

/** A type of elements by what a format calls it. @throws {UniFlowError} `BAD_INPUT` for one that latents are not stored as. */
export function storeOf(format: 'safetensors' | 'npy', dtype: unknown, subject: string): StoreType {
  const found = (Object.keys(STORE) as StoreType[]).find((store) => STORE[store][format] === dtype);
  if (found) return found;
  const expected = Object.values(STORE).map((store) => store[format]);
  throw UniFlowError.expected('BAD_INPUT', subject, expected.join(', '), String(dtype));
}

/** The pictures of an array [B,N,Z], or with their grids of [T,Z]. @throws {UniFlowError} `BAD_INPUT` where they do not fit. */
export function picturesOf(
  subject: string,
  shape: readonly number[],
  { ids, grids, grid }: { ids?: readonly string[] | undefined; grids?: readonly Grid[] | undefined; grid?: Grid | undefined },
): FilePicture[] {
  const [first = 0, second = 0] = shape;
  const flat = shape.length === 2 && grids !== undefined;
  const count = flat ? grids.length : first;
  const patches = (i: number): number => (flat ? rowsOf(grids[i] as Grid) : second);
  const total = flat ? grids.reduce((sum, each) => sum + rowsOf(each), 0) : first;
  if ((shape.length !== 3 && !flat) || shape.includes(0) || total !== first)
    throw UniFlowError.expected('BAD_INPUT', subject, 'latents [B, N, Z], or [T, Z] with grids', `[${shape.join(', ')}]`);
  if (ids && ids.length !== count)
    throw UniFlowError.expected('BAD_INPUT', `${subject}: ids`, `one for each of ${count} latents`, `${ids.length}`);
  return Array.from({ length: count }, (_, i) => ({ id: ids?.[i], grid: grids?.[i] ?? grid, patches: patches(i) }));
}

const rowsOf = ({ rows, cols }: Grid): number => rows * cols;

/** Where each picture's vectors begin, and where the last one's end. */
export function offsetsOf(pictures: readonly Pick<FilePicture, 'patches'>[]): number[] {
  const offsets = [0];
  for (const { patches } of pictures) offsets.push((offsets.at(-1) as number) + patches);
  return offsets;
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
