/** The reader of Parquet, imported where a table is read: its packages are optional, and large. */
import { optional } from '../optional.js';

/** @throws {MissingPackageError} */
export function loadParquet(): Promise<typeof import('./parquet.js')> {
  return optional('parquet', () => import('./parquet.js'));
}
