/** Embeddings as Parquet: `id`, and `embedding` as a list that Arrow's readers (pyarrow, Polars, DuckDB, LanceDB) take as one of fixed size. */
import { loadParquetWriter, taken } from './parquet-writer.js';
import type { Spool } from './spool.js';

/** The vectors of all images, float32 [n,E], in a temporary file. */
export interface Embeddings {
  ids: readonly string[];
  dimensions: number;
  rows: Spool;
  /** Origin of the vectors: model, pool, whether they are normalised. The values are strings, as file metadata requires. */
  origin: Record<string, string>;
}

/** Size of the row groups, which are buffered in memory and then written. */
const GROUP_BYTES = 2 ** 23;

export async function* embeddingsParquet({ ids, dimensions, rows, origin }: Embeddings): AsyncGenerator<Uint8Array> {
  const { ByteWriter, ParquetWriter } = await loadParquetWriter();
  const sink = new ByteWriter();
  const writer = new ParquetWriter({
    writer: sink,
    schema: [
      { name: 'root', num_children: 2 },
      { name: 'id', type: 'BYTE_ARRAY', converted_type: 'UTF8', repetition_type: 'REQUIRED' },
      { name: 'embedding', converted_type: 'LIST', repetition_type: 'REQUIRED', num_children: 1 },
      { name: 'list', repetition_type: 'REPEATED', num_children: 1 },
      { name: 'element', type: 'FLOAT', repetition_type: 'REQUIRED' },
    ],
    codec: 'UNCOMPRESSED', // digits of floats do not compress
    statistics: false,
    kvMetadata: [...Object.entries({ 'ARROW:schema': arrowSchema(dimensions), ...origin })].map(([key, value]) => ({ key, value })),
  });
  const perGroup = Math.max(1, Math.floor(GROUP_BYTES / (4 * dimensions)));
  for (let begin = 0; begin < ids.length; begin += perGroup) {
    const end = Math.min(ids.length, begin + perGroup);
    const bytes = new Uint8Array(await rows.read(4 * begin * dimensions, 4 * end * dimensions)).buffer; // copied for alignment
    const vectors = Array.from({ length: end - begin }, (_, i) => Array.from(new Float32Array(bytes, 4 * i * dimensions, dimensions)));
    const columnData = [
      { name: 'id', data: ids.slice(begin, end) },
      { name: 'embedding', data: vectors, encoding: 'PLAIN' as const },
    ];
    await writer.write({ columnData, rowGroupSize: perGroup });
    yield taken(sink);
  }
  await writer.finish();
  yield taken(sink);
}

/**
 * Arrow's schema message of `id: utf8` and `embedding: fixed_size_list<float>[n]`, as apache-arrow writes it; Arrow's writers store it in Parquet files, whose
 * own schema has no lists of fixed size. A flatbuffer for each length differs only in those four bytes, so a library for flatbuffers is not needed.
 */
const ARROW_SCHEMA =
  '/////+AAAAAQAAAAAAAKABAADgAHAAgACgAAAAAAAAEQAAAAAAAEAAgACAAAAAQACAAAAAQAAAACAAAAhAAAAAQAAACU////EAAAABwAAAAAAAAQVAAAAAkAAABlbWJlZGRpbmcAAAABAAAABAAAAMD/' +
  '//8QAAAAGAAAAAAAAAMcAAAABwAAAGVsZW1lbnQAAAAAAAAABgAGAAQABgAAAAEABgAIAAQABgAAAAQDAgEQABQABAAAAA8AEAAAAAgAEAAAABAAAAAUAAAAAAAABRQAAAACAAAAaWQAAAAAAAAEAAQABAAAAA==';
const LENGTH_AT = 172;

/** @internal In base64, as in the metadata of Parquet files. */
export function arrowSchema(dimensions: number): string {
  const message = Buffer.from(ARROW_SCHEMA, 'base64');
  message.writeInt32LE(dimensions, LENGTH_AT);
  return message.toString('base64');
}
