/** All files below a folder. */
import type { Dirent } from 'node:fs';
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { UniFlowError } from '../errors.js';
import { unreadable } from './files.js';

/** A file, by its path below where the walk began, with '/' in between; or what cannot be read. */
export interface Found {
  id: string;
  /** Names of all entries of its folder. */
  siblings: readonly string[];
  /** Why a folder cannot be read. */
  error?: UniFlowError;
  /** Why it is no file: a link that leads nowhere, a pipe. */
  unusable?: string;
}

/** Whether a name has the character that Node puts in place of bytes that are no UTF-8. Such a file cannot be opened by the name we have. */
const garbled = (name: string): boolean => name.includes('\uFFFD');

/**
 * The files below `root`, folder by folder in the order of their names. Hidden entries are left out; links are followed, and a folder that
 * several links lead to is read once, so that circular links end the walk. Only the names of the folders on the way are held in memory.
 */
export async function* walk(root: string): AsyncGenerator<Found, void, undefined> {
  yield* walkInto(root, '', [], new Set());
}

async function* walkInto(root: string, folder: string, siblings: readonly string[], visited: Set<string>): AsyncGenerator<Found> {
  const path = join(root, folder);
  const { dev, ino } = await stat(path, { bigint: true }).catch((cause: unknown) => {
    throw unreadable(path, cause);
  });
  if (visited.has(`${dev}:${ino}`)) return;
  visited.add(`${dev}:${ino}`);
  const entries: Dirent[] | UniFlowError = await readdir(path, { withFileTypes: true }).catch((cause: unknown) => unreadable(path, cause));
  if (!Array.isArray(entries)) {
    yield { id: folder, siblings, error: entries };
    return;
  }
  const seen = entries.filter(({ name }) => !name.startsWith('.')).sort((a, b) => (a.name < b.name ? -1 : 1));
  const names = seen.map(({ name }) => name);
  for (const entry of seen) {
    const id = folder === '' ? entry.name : `${folder}/${entry.name}`;
    const info = entry.isSymbolicLink() || garbled(entry.name) ? await stat(join(root, id)).catch(() => undefined) : entry;
    if (!info && garbled(entry.name)) yield { id, siblings: names, unusable: 'its name is not UTF-8: rename it' };
    else if (!info) yield { id, siblings: names, unusable: 'a link that leads nowhere' };
    else if (info.isDirectory()) yield* walkInto(root, id, names, visited);
    else if (info.isFile()) yield { id, siblings: names };
    else yield { id, siblings: names, unusable: 'a pipe, a socket or a device' };
  }
}
