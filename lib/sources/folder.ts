/** Finds the images or archives in a folder. */
import { readdir } from 'node:fs/promises';
import { basename, dirname, extname, join } from 'node:path';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { unreadable } from './files.js';
import type { Reading } from './item.js';
import { loadParquet } from './load-parquet.js';
import { formatOf, isArchive, isImageFile, isImageName, mayBeImages, stemOf, type Format } from './names.js';
import { walk, type Found } from './walk.js';

/** A file to read. */
export interface Part {
  path: string;
  format: Format;
  /** Id, if the file is an image. */
  id: string;
  /** Prefix of the ids in an archive. */
  prefix: string;
  /** The first-level folder of an image. */
  label?: string | undefined;
}

/** A folder or file that cannot be read. */
export interface Failed {
  path: string;
  error: unknown;
}

export const NO_IMAGES = 'images (jpg, png, webp, avif, tiff, gif, bmp)';

/**
 * The contents of a folder at any depth, sorted by name: the images, or the archives if the first level has some or there are no images.
 * Other files are skipped. If a folder has both images and archives, an error follows at the end.
 * @throws {UniFlowError} `NOT_FOUND` if there are neither.
 */
export async function* partsIn(folder: string, reading: Reading): AsyncGenerator<Part | Failed, void, undefined> {
  const archives: string[] = [];
  let image: string | undefined;
  const first = await hasArchive(folder);
  for await (const found of walk(folder)) {
    throwIfAborted(reading.signal);
    const path = join(folder, found.id);
    if (found.error) yield { path, error: found.error };
    else if (found.unusable !== undefined) reading.skip({ path, reason: found.unusable, lost: mayBeImages(path) });
    else if (isArchive(path) && !(await isMetadata(found, path))) archives.push(found.id);
    else if (await isImageFile(path)) {
      image ??= found.id;
      if (!first) yield { path, format: 'image', id: found.id, prefix: '.', label: classOf(found.id) };
    } else if (!describesAnother(found)) reading.skip({ path, reason: 'not an image', lost: false });
  }
  if (archives.length === 0 && image === undefined) throw UniFlowError.expected('NOT_FOUND', folder, NO_IMAGES, 'none');
  if (first || image === undefined)
    for (const id of archives) yield { path: join(folder, id), format: formatOf(id), id, prefix: dirname(id) };
  if (archives.length === 0 || image === undefined) return;
  // The intended kind is ambiguous, so the files of the other kind are reported instead of being skipped silently.
  const other = first ? image : (archives[0] as string);
  const both = `${basename(archives[0] as string)} and ${image}; the ${first ? 'images' : 'archives'} are left out`;
  const advice = `name what is meant: '${join(folder, '**', `*${extname(other)}`)}'`;
  yield { path: folder, error: UniFlowError.expected('BAD_INPUT', folder, 'archives or images', `${both} (${advice})`) };
}

/** Whether the first level of the folder has an archive. */
async function hasArchive(folder: string): Promise<boolean> {
  const entries = await readdir(folder, { withFileTypes: true }).catch((cause: unknown) => {
    throw unreadable(folder, cause);
  });
  const siblings = entries.map(({ name }) => name);
  for (const entry of entries)
    if (!entry.isDirectory() && !entry.name.startsWith('.') && isArchive(entry.name))
      if (!(await isMetadata({ id: entry.name, siblings }, join(folder, entry.name)))) return true;
  return false;
}

/** Whether a Parquet file only describes images stored elsewhere, like those that img2dataset writes beside each shard. */
async function isMetadata({ siblings }: Found, path: string): Promise<boolean> {
  if (formatOf(path) !== 'parquet') return false;
  const stem = stemOf(path);
  if (siblings.includes(stem) || siblings.includes(`${stem}.tar`)) return true;
  return !(await (await loadParquet()).hasImages(path));
}

/** Whether a file describes another: `a.txt` describes `a.jpg`; `0_stats.json` and `0.parquet` describe `0.tar` or the folder `0`. */
function describesAnother({ id, siblings }: Found): boolean {
  if (stemsOf(siblings).has(stemOf(id))) return true;
  const shard = /^(.+?)(?:_stats\.json|\.parquet)$/.exec(basename(id))?.[1];
  if (shard === undefined) return false;
  const tables = id.endsWith('.json') ? [`${shard}.parquet`] : [];
  return [shard, `${shard}.tar`, ...tables].some((name) => siblings.includes(name));
}

const stems = new WeakMap<readonly string[], ReadonlySet<string>>();

/** Names of the images in a folder, with and without extension. */
function stemsOf(siblings: readonly string[]): ReadonlySet<string> {
  let found = stems.get(siblings);
  if (!found) stems.set(siblings, (found = new Set(siblings.filter(isImageName).flatMap((name) => [name, stemOf(name)]))));
  return found;
}

function classOf(id: string): string | undefined {
  return id.includes('/') ? id.slice(0, id.indexOf('/')) : undefined;
}
