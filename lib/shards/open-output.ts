/** Outputs by name. */
import { resolve } from 'node:path';
import { optional } from '../optional.js';
import { FolderOutput, type Output } from './output.js';

/** Whether it names a place in a store of objects. */
export function isS3(out: string): boolean {
  return out.startsWith('s3://');
}

/**
 * The output that `out` names: a folder, which is made when something is written to it, or `s3://bucket/prefix`.
 * @throws {UniFlowError} `BAD_INPUT` where it is no such URL, `NETWORK` where the bucket cannot be reached, `UNSUPPORTED` where the AWS SDK is
 * not installed.
 */
export async function openOutput(out: string): Promise<Output> {
  if (!isS3(out)) return new FolderOutput(resolve(out));
  const { S3Output } = await optional('s3', () => import('./s3-output.js'));
  return S3Output.open(out);
}
