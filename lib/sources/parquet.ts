/**
 * Images in Parquet files, in the layout of Hugging Face data sets: a column of bytes, or of { bytes, path }, and a label column. Reads
 * whole row groups. Imported only by load-parquet.ts.
 */
import {
  asyncBufferFromFile,
  parquetMetadataAsync,
  parquetReadObjects,
  parquetSchema,
  type AsyncBuffer,
  type Compressors,
  type FileMetaData,
  type SchemaTree,
} from 'hyparquet';
import { compressors } from 'hyparquet-compressors';
import { basename } from 'node:path';
import { lastNotAbove } from '../bisect.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { Lru } from '../lru.js';
import { unreadable } from './files.js';
import type { Items, ParquetCell, Reading } from './item.js';

/** Names of the image column, by priority; otherwise the only column of bytes is used. */
const IMAGE_COLUMNS = ['image', 'img', 'jpg', 'jpeg', 'png', 'webp', 'image_bytes', 'bytes'];
const LABEL_COLUMNS = ['label', 'labels', 'class', 'cls', 'fine_label'];

/** Some decompressors reject empty input, which pages of nulls have. */
const decompressors: Compressors = Object.fromEntries(
  Object.entries(compressors).map(([codec, decompress]) => [
    codec,
    (input: Uint8Array, length: number) => (length === 0 ? new Uint8Array() : decompress(input, length)),
  ]),
);

interface Table {
  file: AsyncBuffer;
  metadata: FileMetaData;
}

async function openTable(path: string): Promise<Table> {
  try {
    const file = await asyncBufferFromFile(path);
    return { file, metadata: await parquetMetadataAsync(file) };
  } catch (cause) {
    throw unreadable(path, cause);
  }
}

/** Whether the file has an image column. Also true if it cannot be read, so that the read reports the error. */
export async function hasImages(path: string): Promise<boolean> {
  const table = await openTable(path).catch(() => undefined);
  return !table || imageColumnOf(table.metadata) !== undefined;
}

/**
 * References to the images of a file by row, without reading their bytes. @throws {UniFlowError} `BAD_INPUT` if there is no image column.
 */
export async function* inParquet(path: string, { signal }: Reading): Items {
  const { metadata } = await openTable(path);
  const column = imageColumn(path, metadata);
  for (let row = 0; row < Number(metadata.num_rows); row++) {
    throwIfAborted(signal);
    yield { id: idOf(path, row), image: { parquet: path, column, row } };
  }
}

const idOf = (path: string, row: number): string => `${basename(path)}/${row}`;

function imageColumn(path: string, metadata: FileMetaData): string {
  const column = imageColumnOf(metadata);
  if (column !== undefined) return column;
  const columns = parquetSchema(metadata).children.map(({ element }) => element.name);
  throw UniFlowError.expected(
    'BAD_INPUT',
    path,
    "a column 'image' or 'img' of bytes, or only one column of bytes",
    `the columns ${columns.join(', ')}`,
  );
}

function imageColumnOf(metadata: FileMetaData): string | undefined {
  const binary = parquetSchema(metadata)
    .children.filter(isBinary)
    .map(({ element }) => element.name);
  return IMAGE_COLUMNS.find((name) => binary.includes(name)) ?? (binary.length === 1 ? binary[0] : undefined);
}

function isBinary({ element, children }: SchemaTree): boolean {
  if (children.length > 0) return children.some((child) => child.element.name === 'bytes' && isBinary(child));
  return element.type === 'BYTE_ARRAY' && element.converted_type === undefined && element.logical_type === undefined;
}

// ----- one image ------------------------------------------------------------------------------------------------

/** Images are requested in row order; at a boundary, requests alternate between two row groups or files. */
const KEPT_AT_A_BORDER = 2;
const opened = new Lru<ParquetImages>(KEPT_AT_A_BORDER);
const groupsAtABorder: ImageGroups = new Lru(KEPT_AT_A_BORDER);

/** @throws {UniFlowError} `BAD_INPUT` if the cell has no bytes or the file is damaged. */
export async function readCell({ parquet: path, column, row }: ParquetCell): Promise<Uint8Array> {
  const images = await opened.get(`${path}\0${column}`, () => ParquetImages.open(path, { column, groups: groupsAtABorder }));
  return images.read(row);
}

// ----- a file ---------------------------------------------------------------------------------------------------

/** Images of row groups in memory, possibly of several files. */
export type ImageGroups = Lru<readonly (Uint8Array | undefined)[]>;

/** Random access to the images of a file. A row is read with its row group. */
export class ParquetImages {
  readonly length: number;
  /** First row of each row group. */
  readonly begins: readonly number[];

  private constructor(
    readonly path: string,
    private readonly table: Table,
    private readonly column: string,
    private readonly groups: ImageGroups,
  ) {
    const begins: number[] = [];
    let rows = 0;
    for (const { num_rows } of table.metadata.row_groups) {
      if (num_rows > 0) begins.push(rows);
      rows += Number(num_rows);
    }
    [this.begins, this.length] = [begins, rows];
  }

  static async open(path: string, { column, groups }: { column?: string; groups: ImageGroups }): Promise<ParquetImages> {
    const table = await openTable(path);
    return new ParquetImages(path, table, column ?? imageColumn(path, table.metadata), groups);
  }

  /** Approximate total size of all images in memory, rounded up. */
  get bytes(): number {
    const sizes = this.table.metadata.row_groups.flatMap(({ columns }) =>
      columns
        .filter(({ meta_data }) => meta_data?.path_in_schema[0] === this.column)
        .map(({ meta_data }) => Number(meta_data?.total_uncompressed_size)),
    );
    return sizes.reduce((a, b) => a + b, 0);
  }

  idOf(row: number): string {
    return idOf(this.path, row);
  }

  /** @throws {UniFlowError} `BAD_INPUT` if the cell has no bytes or the file is damaged. */
  async read(row: number): Promise<Uint8Array> {
    if (row >= this.length) throw UniFlowError.expected('BAD_INPUT', this.path, `more than ${row} rows`, `${this.length}`);
    const group = lastNotAbove(this.begins, row);
    const images = await this.groups.get(`${this.path}\0${this.column}\0${group}`, async () => {
      const cells = await this.readColumn(this.column, group);
      return cells.map((cell) => {
        const bytes = cell instanceof Uint8Array ? cell : (cell as { bytes?: unknown } | null)?.bytes;
        return bytes instanceof Uint8Array ? bytes : undefined;
      });
    });
    const image = images[row - (this.begins[group] as number)];
    if (!image) throw UniFlowError.expected('BAD_INPUT', `${this.path}: ${this.column}, row ${row}`, 'bytes', 'nothing');
    return image;
  }

  /** Labels of all rows, as text; undefined for a row without a label or with -1. */
  async labels(signal: AbortSignal | undefined): Promise<(row: number) => string | undefined> {
    const column = this.labelColumn;
    if (column === undefined) return () => undefined;
    const values: (number | string | undefined)[] = [];
    for (const group of this.begins.keys()) {
      throwIfAborted(signal);
      for (const value of await this.readColumn(column, group)) values.push(labelOf(value));
    }
    return (row) => values[row]?.toString();
  }

  /** label → name, if the file's metadata state them. */
  get classes(): readonly string[] | undefined {
    const text = this.table.metadata.key_value_metadata?.find(({ key }) => key === 'huggingface')?.value;
    try {
      const { info } = JSON.parse(text ?? '{}') as { info?: { features?: Record<string, { names?: unknown }> } };
      const names = info?.features?.[this.labelColumn ?? '']?.names;
      return Array.isArray(names) && names.every((name) => typeof name === 'string') ? names : undefined;
    } catch {
      return undefined; // metadata written by another tool
    }
  }

  private get labelColumn(): string | undefined {
    const leaves = parquetSchema(this.table.metadata).children.filter(({ children }) => children.length === 0);
    return LABEL_COLUMNS.find((name) => leaves.some(({ element }) => element.name === name));
  }

  private async readColumn(column: string, group: number): Promise<unknown[]> {
    const [rowStart, rowEnd = this.length] = [this.begins[group], this.begins[group + 1]];
    try {
      const rows = await parquetReadObjects({
        ...this.table,
        columns: [column],
        rowStart,
        rowEnd,
        compressors: decompressors,
        utf8: false,
      });
      return rows.map((row) => (row as Record<string, unknown>)[column]);
    } catch (cause) {
      throw unreadable(this.path, cause);
    }
  }
}

/** Normalises a number or text; undefined if the value is not a label. */
function labelOf(value: unknown): number | string | undefined {
  if (typeof value === 'bigint') value = Number(value);
  if (typeof value === 'number') return value >= 0 ? value : undefined;
  if (value instanceof Uint8Array) return Buffer.from(value).toString();
  return typeof value === 'string' && value !== '' ? value : undefined;
}
