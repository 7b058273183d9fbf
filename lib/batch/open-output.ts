/** Outputs by name. */
import { mkdir } from 'node:fs/promises';
import { resolve } from 'node:path';
import { unwritable } from '../io/files.js';
import { FolderOutput, type Output } from './output.js';

/** Whether it names a place in a store of objects. */
export function isS3(out: string): boolean {
  return out.startsWith('s3://');
}

/**
 * The output that `out` names: `s3://bucket/prefix`, or a folder, which is made if it is missing.
 * @throws {UniFlowError} `BAD_INPUT` where it cannot be made, `NETWORK` where it cannot be reached.
 */
export async function openOutput(out: string): Promise<Output> {
  if (isS3(out)) return (await import('./s3-output.js')).S3Output.open(out);
  const folder = resolve(out);
  await mkdir(folder, { recursive: true }).catch((error: unknown) => {
    throw unwritable(folder, error);
  });
  return new FolderOutput(folder);
}
