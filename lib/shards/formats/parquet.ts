/**
 * A shard as Parquet, one row per image: id, width, height, rows, cols, crop and padding as JSON, and latents, codes and tokens as bytes, [rows *
 * cols, Z] little-endian. The file's metadata name the element type of latents and tokens as `dtype`. The libraries are loaded on demand.
 */
import type { AsyncBuffer, FileMetaData } from 'hyparquet';
import type { ColumnSource, ParquetWriter } from 'hyparquet-writer';
import { UniFlowError } from '../../errors.js';
import { optional } from '../../optional.js';
import type { Output } from '../output.js';
import { loadParquetWriter, taken } from '../parquet-writer.js';
import type { PictureRecord } from '../pipeline.js';
import { checkStore, ELEMENTS } from '../store.js';
import { elementType, storedRow, type FilePicture, type Format, type ShardContent } from './format.js';

/** Size of the row groups, which are buffered in memory and then written. */
const GROUP_BYTES = 2 ** 24;
const PAGE_BYTES = 2 ** 17;

export const parquet: Format = {
  checkInstalled: loadParquetWriter,
  files: (content) => [{ name: content.fileOf('latents'), chunks: chunksOf(content) }],
  open: async ({ input, stem }) => {
    const { cell } = await openTable(input, `${stem}.parquet`);
    return cell;
  },
  openFile: async (input, name) => {
    const { metadata, cell, columns } = await openTable(input, name);
    const text = Object.fromEntries((metadata.key_value_metadata ?? []).map(({ key, value }) => [key, value]));
    const array = text['latents.width'] === undefined && text['codes.width'] !== undefined ? 'codes' : 'latents';
    const width = Number(text[`${array}.width`]);
    const store = text['dtype'];
    if (!(width > 0)) throw UniFlowError.expected('BAD_INPUT', name, 'a column of latents or codes', 'none');
    checkStore(store);
    const pictures = (await columns(['id', 'rows', 'cols'])).map(({ id, rows, cols }): FilePicture => {
      const grid = { rows: Number(rows), cols: Number(cols) };
      return { id: String(id), grid, patches: grid.rows * grid.cols };
    });
    return { array, pictures, type: elementType(array, store), width, read: (row) => cell(array, row) };
  },
};

interface Table {
  metadata: FileMetaData;
  /** Reads the given columns of all rows. */
  columns: (names: string[]) => Promise<Record<string, unknown>[]>;
  /** Reads the bytes of one cell. */
  cell: (column: string, row: number) => Promise<Uint8Array>;
}

async function openTable(input: Output, name: string): Promise<Table> {
  const file: AsyncBuffer = {
    byteLength: (await input.size(name)) ?? 0,
    slice: async (begin, end = file.byteLength) => {
      const bytes = await input.read(name, { begin, end });
      return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) as ArrayBuffer;
    },
  };
  const { parquetMetadataAsync, parquetReadObjects } = await optional('parquet', () => import('hyparquet'));
  const metadata: FileMetaData = await parquetMetadataAsync(file);
  return {
    metadata,
    columns: (columns) => parquetReadObjects({ file, metadata, columns }),
    cell: async (column, row) => {
      const range = { rowStart: row, rowEnd: row + 1, useOffsetIndex: true, utf8: false };
      const [found] = await parquetReadObjects({ file, metadata, columns: [column], ...range });
      return (found as Record<string, Uint8Array>)[column] as Uint8Array;
    },
  };
}

async function* chunksOf(content: ShardContent): AsyncGenerator<Uint8Array> {
  const { arrays, pictures, store, offsets } = content;
  const vectors = arrays.reduce((sum, { width, type }) => sum + width * ELEMENTS[type].bytes, 0);
  const perRow = ((offsets.at(-1) as number) / pictures.length) * vectors;
  const rows = Math.max(1, Math.floor(GROUP_BYTES / perRow));
  const library = await loadParquetWriter();
  const sink = new library.ByteWriter();
  let writer: ParquetWriter | undefined;
  for (let begin = 0; begin < pictures.length; begin += rows) {
    const columnData = await columnsOf(content, begin, Math.min(pictures.length, begin + rows));
    writer ??= new library.ParquetWriter({
      writer: sink,
      schema: library.schemaFromColumnData({ columnData }),
      codec: 'UNCOMPRESSED',
      statistics: false,
      kvMetadata: [
        { key: 'dtype', value: store },
        { key: 'model', value: content.model },
        ...arrays.map(({ name, width }) => ({ key: `${name}.width`, value: String(width) })),
      ],
    });
    await writer.write({ columnData, rowGroupSize: rows, pageSize: PAGE_BYTES });
    yield taken(sink);
  }
  await writer?.finish();
  yield taken(sink);
}

async function columnsOf(content: ShardContent, begin: number, end: number): Promise<ColumnSource[]> {
  const pictures = content.pictures.slice(begin, end);
  const column = (name: string, type: 'INT32' | 'STRING', of: (picture: PictureRecord) => unknown, nullable = false): ColumnSource => ({
    ...{ name, type, nullable, data: pictures.map(of) },
  });
  const json = (value: object | undefined): string | null => (value ? JSON.stringify(value) : null);
  const arrays = content.arrays.map(async (array): Promise<ColumnSource> => {
    const rows = pictures.map((_, i) => storedRow(array, content, begin + i));
    return { name: array.name, type: 'BYTE_ARRAY', nullable: false, encoding: 'PLAIN', data: await Promise.all(rows) };
  });
  return [
    column('id', 'STRING', ({ id }) => id),
    column('width', 'INT32', ({ width }) => width),
    column('height', 'INT32', ({ height }) => height),
    column('rows', 'INT32', ({ grid }) => grid.rows),
    column('cols', 'INT32', ({ grid }) => grid.cols),
    column('crop', 'STRING', ({ crop }) => json(crop), true),
    column('padding', 'STRING', ({ padding }) => json(padding), true),
    ...(await Promise.all(arrays)),
  ];
}
