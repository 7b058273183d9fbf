/** The library that writes Parquet, loaded on demand, and its output as chunks. */
import type { ByteWriter } from 'hyparquet-writer';
import { optional } from '../optional.js';

/** Rejects if the library is not installed. */
export function loadParquetWriter(): Promise<typeof import('hyparquet-writer')> {
  return optional('parquet', () => import('hyparquet-writer'));
}

/** Takes the bytes written so far and resets the writer. */
export function taken(sink: ByteWriter): Uint8Array {
  const bytes = sink.getBytes().slice();
  sink.index = 0;
  return bytes;
}
