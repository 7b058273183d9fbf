/** Pictures in a folder; class sub-folders are labels. */
import type { Dirent } from 'node:fs';
import { readdir, realpath, stat } from 'node:fs/promises';
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
  for await (const id of picturesBelow(root, '', new Set())) {
    throwIfAborted(signal);
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

/** Paths below `root`, with '/' in between; hidden ones are left out. `above` ends a walk through links that lead back. */
async function* picturesBelow(root: string, folder: string, above: ReadonlySet<string>): AsyncGenerator<string> {
  const real = await realpath(join(root, folder));
  if (above.has(real)) return;
  const inside = new Set(above).add(real);
  for (const entry of await entriesOf(real)) {
    const id = folder === '' ? entry.name : `${folder}/${entry.name}`;
    const info = entry.isSymbolicLink() ? await stat(join(root, id)).catch(() => undefined) : entry;
    if (info?.isDirectory()) yield* picturesBelow(root, id, inside);
    else if (info?.isFile() && isPicture(entry.name)) yield id;
  }
}

async function entriesOf(folder: string): Promise<Dirent[]> {
  const entries = await readdir(folder, { withFileTypes: true }).catch((cause: unknown) => {
    throw unreadable(folder, cause);
  });
  return entries.filter(({ name }) => !name.startsWith('.')).sort((a, b) => (a.name < b.name ? -1 : 1));
}
