/** Reading files, with errors that name them. */
import { readFile } from 'node:fs/promises';
import { UniFlowError } from '../errors.js';

/** The error of a file or folder that the system does not let us read. */
export function unreadable(path: string, cause: unknown): UniFlowError {
  const { code, message } = cause as NodeJS.ErrnoException;
  if (code === 'ENOENT') return UniFlowError.expected('NOT_FOUND', path, 'a file or folder', 'nothing of that name', cause);
  return new UniFlowError('BAD_INPUT', `${path}: cannot be read: ${message}`, { subject: path, cause });
}

export async function readBytes(path: string): Promise<Buffer> {
  try {
    return await readFile(path);
  } catch (error) {
    throw unreadable(path, error);
  }
}
