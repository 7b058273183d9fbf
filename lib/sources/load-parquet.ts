/** Imports the Parquet reader on demand, because its packages are optional and large. */
import { optional } from '../optional.js';

/** @throws {MissingPackageError} */
export function loadParquet(): Promise<typeof import('./parquet.js')> {
  return optional('parquet', () => import('./parquet.js'));
}
