/** Opens outputs by name. */
import { resolve } from 'node:path';
import { optional } from '../optional.js';
import { FolderOutput, type Output } from './output.js';

/** Whether `out` names an object store. */
export function isS3(out: string): boolean {
  return out.startsWith('s3://');
}

/**
 * The output named by `out`: a folder, created on the first write, or `s3://bucket/prefix`.
 * @throws {UniFlowError} `BAD_INPUT` for a malformed URL, `NETWORK` if the bucket cannot be reached, `UNSUPPORTED` if the AWS SDK is not
 * installed.
 */
export async function openOutput(out: string): Promise<Output> {
  if (!isS3(out)) return new FolderOutput(resolve(out));
  const { S3Output } = await optional('s3', () => import('./s3-output.js'));
  return S3Output.open(out);
}
