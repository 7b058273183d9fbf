/** Pictures in a folder; class sub-folders are labels. */
import type { Dirent } from 'node:fs';
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { throwIfAborted, UniFlowError } from '../errors.js';
import type { Samples } from './dataset.js';
import { unreadable } from './files.js';
import { numberNames } from './labels.js';

const PICTURE = /\.(jpe?g|png|webp|avif|tiff?|gif)$/i;

/** Whether a file's name is that of a picture that we can decode. */
export function isPicture(name: string): boolean {
  return PICTURE.test(name);
}

/** All pictures below `root`. @throws {UniFlowError} `NOT_FOUND` where there is none. */
export async function openFolder(root: string, signal: AbortSignal | undefined): Promise<Samples> {
  const ids: string[] = [];
  for await (const { id, error } of walk(root)) {
    throwIfAborted(signal);
    if (error) throw error;
    ids.push(id);
  }
  if (ids.length === 0) throw UniFlowError.expected('NOT_FOUND', root, 'pictures (jpg, png, webp, avif, tiff, gif)', 'none');
  // A picture beside the sub-folders has no class, and then nobody has: they are no classes.
  const classed = ids.every((id) => id.includes('/'));
  const { labels, classes } = classed ? numberNames(ids.map((id) => id.slice(0, id.indexOf('/')))) : { labels: [], classes: undefined };
  return {
    length: ids.length,
    classes,
    read: (i) => ({ id: ids[i] as string, label: labels[i], image: join(root, ids[i] as string) }),
  };
}

/** A file, by its path below where the walk began, with '/' in between; or a folder, with why it cannot be read. */
export interface Found {
  id: string;
  error?: UniFlowError;
}

/**
 * The files below `root` that are `wanted`, folder by folder in the order of their names. Hidden ones are left out; links are followed,
 * and a folder that several lead to is read once, so that links which lead back end the walk. Only the names of the folders on the way are
 * held in memory.
 */
export async function* walk(root: string, wanted: (id: string) => boolean = isPicture): AsyncGenerator<Found, void, undefined> {
  yield* walkInto(root, '', wanted, new Set());
}

async function* walkInto(root: string, folder: string, wanted: (id: string) => boolean, visited: Set<string>): AsyncGenerator<Found> {
  const path = join(root, folder);
  const { dev, ino } = await stat(path, { bigint: true }).catch((cause: unknown) => {
    throw unreadable(path, cause);
  });
  if (visited.has(`${dev}:${ino}`)) return;
  visited.add(`${dev}:${ino}`);
  const entries: Dirent[] | UniFlowError = await readdir(path, { withFileTypes: true }).catch((cause: unknown) => unreadable(path, cause));
  if (entries instanceof UniFlowError) {
    yield { id: folder, error: entries };
    return;
  }
  for (const entry of entries.sort((a, b) => (a.name < b.name ? -1 : 1))) {
    if (entry.name.startsWith('.')) continue;
    const id = folder === '' ? entry.name : `${folder}/${entry.name}`;
    const info = entry.isSymbolicLink() ? await stat(join(root, id)).catch(() => undefined) : entry;
    if (info?.isDirectory()) yield* walkInto(root, id, wanted, visited);
    else if (info?.isFile() && wanted(id)) yield { id };
  }
}
