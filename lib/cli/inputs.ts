/** From what the user names to picture files, and from their names to those of the results. */
import { readdir, stat } from 'node:fs/promises';
import { basename, extname, join } from 'node:path';
import { UniFlowError } from '../errors.js';

const EXTENSIONS = ['.jpg', '.jpeg', '.png', '.webp', '.avif', '.tif', '.tiff', '.gif'];

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
    if (info?.isDirectory()) await walk(input, new Set(), found);
    else found.files.push(input); // where it is missing, reading it says so
  }
  if (found.files.length + found.failed.length === 0)
    throw UniFlowError.expected('NOT_FOUND', inputs.join(', '), `pictures (${EXTENSIONS.map((e) => e.slice(1)).join(', ')})`, 'none');
  return found;
}

/** `visited` has the folders on disk that were read, so that links which lead back end the walk. */
async function walk(folder: string, visited: Set<string>, found: Inputs): Promise<void> {
  const { dev, ino } = await stat(folder);
  if (visited.has(`${dev}:${ino}`)) return;
  visited.add(`${dev}:${ino}`);
  let names: string[];
  try {
    names = await readdir(folder);
  } catch (error) {
    found.failed.push({ path: folder, reason: (error as Error).message });
    return;
  }
  for (const name of names.filter((n) => !n.startsWith('.')).sort()) {
    const path = join(folder, name);
    const info = await stat(path).catch(() => undefined);
    if (info?.isDirectory()) await walk(path, visited, found);
    else if (EXTENSIONS.includes(extname(name).toLowerCase())) found.files.push(path);
  }
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
