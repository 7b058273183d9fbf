/** Outputs by name. */
import { resolve } from 'node:path';
import { FolderOutput, type Output } from './output.js';

/** Whether it names a place in a store of objects. */
export function isS3(out: string): boolean {
  return out.startsWith('s3://');
}

/**
 * The output that `out` names: a folder, which is made when something is written to it, or `s3://bucket/prefix`.
 * @throws {UniFlowError} `BAD_INPUT` where it is no such URL, `NETWORK` where the bucket cannot be reached.
 */
export async function openOutput(out: string): Promise<Output> {
  return isS3(out) ? (await import('./s3-output.js')).S3Output.open(out) : new FolderOutput(resolve(out));
}
