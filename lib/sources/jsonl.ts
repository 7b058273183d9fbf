/** Reads JSON Lines, where each line names an image. */
import { dirname, resolve } from 'node:path';
import { throwIfAborted, UniFlowError } from '../errors.js';
import type { Item, Items, Reading } from './item.js';
import { linesOf } from './lines.js';
import { isRemote } from './url.js';

/** One URL or path per line, as a string or as `{ "url": ..., "id": ..., "label": ... }`. Any other line is an unreadable image. */
export async function* inJsonLines(path: string, { strict, signal }: Reading): Items {
  for await (const { line, number } of linesOf(path)) {
    throwIfAborted(signal);
    if (line.trim() === '') continue;
    const where = `${path}, line ${number}`;
    const item = itemOf(line, dirname(path));
    const error = `expected a URL, or { "url": ..., "id": ... }, but got ${line.slice(0, 80)}`;
    if (!item && strict) throw new UniFlowError('BAD_INPUT', `${where}: ${error}`, { subject: where });
    yield item ?? { id: where, image: { error } };
  }
}

function itemOf(line: string, folder: string): Item | undefined {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch {
    return undefined;
  }
  const row = (typeof value === 'string' ? { url: value } : (value ?? {})) as Record<string, unknown>;
  const url = row['url'] ?? row['path'] ?? row['file_name'] ?? row['image'];
  const { id = url, label } = row;
  if (typeof url !== 'string' || url === '' || !(typeof id === 'string' || typeof id === 'number')) return undefined;
  // `path` and similar keys name files; `url` has always been a URL
  const image = isRemote(url) || typeof row['url'] === 'string' ? { url } : resolve(folder, url);
  return { id: String(id), image, label: typeof label === 'string' || typeof label === 'number' ? String(label) : undefined };
}
