/** From what the user names to picture files, and from their names to those of the results. */
import { stat } from 'node:fs/promises';
import { basename, extname, join } from 'node:path';
import { walk } from '../sources/folder.js';
import { reasonOf, UniFlowError } from '../errors.js';

/** A file or folder that could not be read. */
export interface Failure {
  path: string;
  reason: string;
}

export interface Inputs {
  files: string[];
  failed: Failure[];
}

/**
 * Files as they are given, folders as the pictures below them in the order of their names. Hidden files are left out.
 * @throws UniFlowError `NOT_FOUND` where there is nothing at all.
 */
export async function expandInputs(inputs: readonly string[]): Promise<Inputs> {
  const found: Inputs = { files: [], failed: [] };
  for (const input of inputs) {
    const info = await stat(input).catch(() => undefined);
    if (!info?.isDirectory())
      found.files.push(input); // where it is missing, reading it says so
    else
      for await (const { id, error } of walk(input)) {
        const path = join(input, id);
        if (error) found.failed.push({ path, reason: reasonOf(error, path) });
        else found.files.push(path);
      }
  }
  if (found.files.length + found.failed.length === 0)
    throw UniFlowError.expected('NOT_FOUND', inputs.join(', '), 'pictures (jpg, png, webp, avif, tiff, gif)', 'none');
  return found;
}

/** A file name for each id: its last part with another extension, numbered where several share it. */
export function fileNames(ids: readonly string[], format: string): string[] {
  const taken = new Set<string>(); // without case, as some file systems compare
  return ids.map((id) => {
    const stem = basename(id, extname(id)) || 'image';
    let name = stem;
    for (let n = 2; taken.has(name.toLowerCase()); n++) name = `${stem}-${n}`;
    taken.add(name.toLowerCase());
    return `${name}.${format}`;
  });
}
