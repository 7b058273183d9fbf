/** Pictures in a Parquet file: a column of bytes, or of Hugging Face's { bytes, path }. Loaded when it is needed: hyparquet takes 20 MB. */
import {
  asyncBufferFromFile,
  parquetMetadataAsync,
  parquetReadObjects,
  parquetSchema,
  type AsyncBuffer,
  type FileMetaData,
  type SchemaTree,
} from 'hyparquet';
import { compressors } from 'hyparquet-compressors';
import { basename } from 'node:path';
import { unreadable } from './files.js';
import { UniFlowError } from '../errors.js';

interface Table {
  file: AsyncBuffer;
  metadata: FileMetaData;
}

/** The pictures of a file by row; their bytes are not read yet. */
export async function* parquetRows(path: string): AsyncGenerator<{ id: string; image: ParquetCell }, void, undefined> {
  const { metadata } = await openTable(path);
  const column = imageColumn(path, metadata);
  for (let row = 0; row < Number(metadata.num_rows); row++) yield { id: `${basename(path)}/${row}`, image: { parquet: path, column, row } };
}

/** One picture of a Parquet file. */
export interface ParquetCell {
  parquet: string;
  column: string;
  row: number;
}

async function openTable(path: string): Promise<Table> {
  try {
    const file = await asyncBufferFromFile(path);
    return { file, metadata: await parquetMetadataAsync(file) };
  } catch (cause) {
    throw unreadable(path, cause);
  }
}

/** `image` where there is one, else the only one that holds bytes. */
function imageColumn(path: string, metadata: FileMetaData): string {
  const { children } = parquetSchema(metadata);
  const binary = children.filter(isBinary).map(({ element }) => element.name);
  if (binary.includes('image')) return 'image';
  if (binary.length === 1) return binary[0] as string;
  const columns = children.map(({ element }) => element.name).join(', ');
  throw UniFlowError.expected('BAD_INPUT', path, "a column 'image' of bytes, or only one column of bytes", `the columns ${columns}`);
}

function isBinary({ element, children }: SchemaTree): boolean {
  if (children.length > 0) return children.some((child) => child.element.name === 'bytes' && isBinary(child));
  return element.type === 'BYTE_ARRAY' && element.converted_type === undefined && element.logical_type === undefined;
}

/** Row groups read last: pictures are asked for in the order of their rows, at the border of two groups by turns. */
const KEPT_GROUPS = 2;
const groups = new Map<string, Promise<{ begin: number; images: (Uint8Array | undefined)[] }>>();
const tables = new Map<string, Promise<Table>>();

/** @throws {UniFlowError} `BAD_INPUT` where the cell has no bytes, or the file is damaged. */
export async function readCell({ parquet: path, column, row }: ParquetCell): Promise<Uint8Array> {
  const table = await kept(tables, path, KEPT_GROUPS, () => openTable(path));
  const [begin, end] = groupOf(path, table.metadata, row);
  const { images } = await kept(groups, `${path}\0${column}\0${begin}`, KEPT_GROUPS, async () => ({
    begin,
    images: await readImages(path, table, column, begin, end),
  }));
  const image = images[row - begin];
  if (!image) throw UniFlowError.expected('BAD_INPUT', `${path}: ${column}, row ${row}`, 'bytes', 'nothing');
  return image;
}

function groupOf(path: string, metadata: FileMetaData, row: number): [begin: number, end: number] {
  let begin = 0;
  for (const { num_rows } of metadata.row_groups) {
    const end = begin + Number(num_rows);
    if (row < end) return [begin, end];
    begin = end;
  }
  throw UniFlowError.expected('BAD_INPUT', path, `more than ${row} rows`, `${begin}`);
}

async function readImages(
  path: string,
  table: Table,
  column: string,
  rowStart: number,
  rowEnd: number,
): Promise<(Uint8Array | undefined)[]> {
  try {
    const rows = await parquetReadObjects({ ...table, columns: [column], rowStart, rowEnd, compressors, utf8: false });
    return rows.map(({ [column]: cell }: Record<string, unknown>) => {
      const bytes = cell instanceof Uint8Array ? cell : (cell as { bytes?: unknown } | null)?.bytes;
      return bytes instanceof Uint8Array ? bytes : undefined;
    });
  } catch (cause) {
    throw unreadable(path, cause);
  }
}

/** The value of `key`: made once, and kept among the `count` used last. */
function kept<T>(cache: Map<string, Promise<T>>, key: string, count: number, make: () => Promise<T>): Promise<T> {
  const value = cache.get(key) ?? make();
  cache.delete(key);
  cache.set(key, value);
  value.catch(() => cache.delete(key));
  for (const oldest of cache.keys()) {
    if (cache.size <= count) break;
    cache.delete(oldest);
  }
  return value;
}
