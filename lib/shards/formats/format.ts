/** Interface of the shard formats: serialising a shard, and reading rows from it. */
import { UniFlowError } from '../../errors.js';
import type { Grid } from '../../tensor.js';
import type { PictureRecord } from '../pipeline.js';
import type { Output } from '../output.js';
import type { Spool } from '../spool.js';
import { ELEMENTS, STORE, type ElementType, type StoreType } from '../store.js';

export type ArrayName = 'latents' | 'codes' | 'tokens';
/** The arrays that can be decoded. */
export type LatentsName = Exclude<ArrayName, 'tokens'>;

/** Type of the array's elements in a run that stores latents and tokens as `store`. */
export function elementType(array: ArrayName, store: StoreType): ElementType {
  return array === 'codes' ? 'uint16' : store;
}

/** One array of a shard: the vectors [T, width] of all images in order. */
export interface ShardArray {
  name: ArrayName;
  width: number;
  type: ElementType;
  rows: Spool;
}

/** Names of the files of a shard and of its companions. */
export interface Layout {
  /** The file that holds the array; formats with a single file always return that one. */
  fileOf: (array: ArrayName) => string;
  /** All files of a shard in writing order: those of its format, and the list of its images. */
  filesOf: (files: readonly ShardFile[], content: ShardContent) => ShardFile[];
}

/** Contents of a shard's files. */
export interface ShardContent {
  /** For example `shard-000000`. Keys in archives start with its number. */
  stem: string;
  fileOf: Layout['fileOf'];
  /** Stored in the text fields of formats that have them. */
  model: string;
  /** Type of latents and tokens. */
  store: StoreType;
  pictures: readonly PictureRecord[];
  /** Index of each image's first vector in the arrays, followed by the total number of vectors. */
  offsets: readonly number[];
  arrays: readonly ShardArray[];
  /** Whether all images have the same grid, regardless of the source. */
  uniform: boolean;
}

export interface ShardFile {
  name: string;
  chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>;
}

/** A stored shard to read rows from. */
export interface StoredShard {
  input: Output;
  stem: string;
  store: StoreType;
  widths: Record<ArrayName, number>;
  offsets: readonly number[];
}

/** Reads the vectors of a row in their storage type. */
export type RowReader = (name: ArrayName, row: number) => Promise<Uint8Array>;

/** Metadata of an image as recorded in a single file. */
export interface FilePicture {
  id?: string | undefined;
  grid?: Grid | undefined;
  patches: number;
}

/** The latents or codes of one file, as described by the file itself. */
export interface LatentsFile {
  array: LatentsName;
  pictures: readonly FilePicture[];
  type: ElementType;
  width: number;
  /** Reads the vectors of an image in their storage type. */
  read: (row: number) => Promise<Uint8Array>;
}

export interface Format {
  /** Rejects if a required library is not installed, so that a run fails before it starts. */
  checkInstalled?(): Promise<unknown>;
  files(content: ShardContent): ShardFile[];
  /** Opens a shard of a run, using the manifest and the list of its images. */
  open(shard: StoredShard): Promise<RowReader>;
  /** Opens a self-describing file. @throws if it has no latents. */
  openFile(input: Output, name: string): Promise<LatentsFile>;
}

/** Type of an array's elements by a format's dtype name. @throws {UniFlowError} `BAD_INPUT` for other dtypes. */
export function typeOf(format: 'safetensors' | 'npy', dtype: unknown, array: LatentsName, subject: string): ElementType {
  const types: readonly ElementType[] = array === 'codes' ? ['uint16'] : (Object.keys(STORE) as StoreType[]);
  const found = types.find((type) => ELEMENTS[type][format] === dtype);
  if (found) return found;
  const expected = types.map((type) => ELEMENTS[type][format]);
  throw UniFlowError.expected('BAD_INPUT', subject, expected.join(', '), String(dtype));
}

/**
 * The images of an array [B,N,Z], or of [T,Z] with a grid for each. @throws {UniFlowError} `BAD_INPUT` if shape and labels do not match.
 */
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

/** Index of each image's first vector, followed by the total number of vectors. */
export function offsetsOf(pictures: readonly Pick<FilePicture, 'patches'>[]): number[] {
  const offsets = [0];
  for (const { patches } of pictures) offsets.push((offsets.at(-1) as number) + patches);
  return offsets;
}

/** The vectors of row `i` of an array, in their storage type. */
export function storedRow({ rows, width, type }: ShardArray, { offsets }: ShardContent, i: number): Promise<Buffer> {
  const vector = width * ELEMENTS[type].bytes;
  return rows.read((offsets[i] as number) * vector, (offsets[i + 1] as number) * vector);
}

/** [n,N,width] if all images have the same grid, else [T,width]. */
export function shapeOf({ width }: ShardArray, { offsets, pictures, uniform }: ShardContent): number[] {
  const total = offsets.at(-1) as number;
  return uniform ? [pictures.length, total / pictures.length, width] : [total, width];
}
