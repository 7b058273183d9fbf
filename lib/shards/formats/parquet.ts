/**
 * A shard as Parquet, a row a picture: id, width, height, rows, cols, crop and padding as JSON, and latents and tokens as bytes, [rows * cols, Z]
 * little-endian. What the bytes are is in the file's metadata, as `dtype`. The libraries are loaded when they are needed.
 */
import type { AsyncBuffer, FileMetaData } from 'hyparquet';
import type { ByteWriter, ColumnSource, ParquetWriter } from 'hyparquet-writer';
import { optional } from '../../optional.js';
import { STORE } from '../store.js';
import type { PictureRecord } from '../pipeline.js';
import { storedRow, type Format, type ShardContent } from './format.js';

/** Rows are written, and held in memory, in groups of so many bytes. */
const GROUP_BYTES = 2 ** 24;
const PAGE_BYTES = 2 ** 17;

const writer = (): Promise<typeof import('hyparquet-writer')> => optional('parquet', () => import('hyparquet-writer'));

export const parquet: Format = {
  checkInstalled: writer,
  files: (content) => [{ name: `${content.stem}.parquet`, chunks: chunksOf(content) }],
  open: async ({ input, stem }) => {
    const name = `${stem}.parquet`;
    const file: AsyncBuffer = {
      byteLength: (await input.size(name)) ?? 0,
      slice: async (begin, end = file.byteLength) => {
        const bytes = await input.read(name, { begin, end });
        return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) as ArrayBuffer;
      },
    };
    const { parquetMetadataAsync, parquetReadObjects } = await optional('parquet', () => import('hyparquet'));
    const metadata: FileMetaData = await parquetMetadataAsync(file);
    return async (column, row) => {
      const range = { rowStart: row, rowEnd: row + 1, useOffsetIndex: true, utf8: false };
      const [found] = await parquetReadObjects({ file, metadata, columns: [column], ...range });
      return (found as Record<string, Uint8Array>)[column] as Uint8Array;
    };
  },
};

async function* chunksOf(content: ShardContent): AsyncGenerator<Uint8Array> {
  const { arrays, pictures, store, offsets } = content;
  const { bytes } = STORE[store];
  const perRow = ((offsets.at(-1) as number) / pictures.length) * bytes * arrays.reduce((sum, { width }) => sum + width, 0);
  const rows = Math.max(1, Math.floor(GROUP_BYTES / perRow));
  const library = await writer();
  const sink = new library.ByteWriter();
  let table: ParquetWriter | undefined;
  for (let begin = 0; begin < pictures.length; begin += rows) {
    const columnData = await columnsOf(content, begin, Math.min(pictures.length, begin + rows));
    table ??= new library.ParquetWriter({
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
    await table.write({ columnData, rowGroupSize: rows, pageSize: PAGE_BYTES });
    yield taken(sink);
  }
  await table?.finish();
  yield taken(sink);
}

/** What was written so far, which is then forgotten. */
function taken(sink: ByteWriter): Uint8Array {
  const bytes = sink.getBytes().slice();
  sink.index = 0;
  return bytes;
}

async function columnsOf(content: ShardContent, begin: number, end: number): Promise<ColumnSource[]> {
  const pictures = content.pictures.slice(begin, end);
  const column = (name: string, type: 'INT32' | 'STRING', of: (picture: PictureRecord) => unknown, nullable = false): ColumnSource => ({
    ...{ name, type, nullable, data: pictures.map(of) },
  });
  const json = (value: object | undefined): string | null => (value ? JSON.stringify(value) : null);
  const arrays = content.arrays.map(async (array): Promise<ColumnSource> => {
    const rows = pictures.map((_, i) => storedRow(array, content, STORE[content.store].bytes, begin + i));
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
