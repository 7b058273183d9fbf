/** Walks all files below a folder. */
import type { Dirent } from 'node:fs';
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { UniFlowError } from '../errors.js';
import { unreadable } from './files.js';

/** A file, with its path below the root of the walk, separated by '/'; or an entry that cannot be read. */
export interface Found {
  id: string;
  /** Names of all entries in its folder. */
  siblings: readonly string[];
  /** Reason why a folder cannot be read. */
  error?: UniFlowError;
  /** Reason why it is not a file: a broken link, or a pipe. */
  unusable?: string;
}

/** Whether a name contains the replacement character that Node substitutes for invalid UTF-8. Such a file cannot be opened by this name. */
const garbled = (name: string): boolean => name.includes('\uFFFD');

/**
 * The files below `root`, walked recursively and sorted by name. Hidden entries are skipped. Links are followed, but a folder reached by
 * several links is read once, so circular links end the walk. Only the entries of the folders on the current path are held in memory.
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
