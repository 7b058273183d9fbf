/** A text file that names pictures, one a line. */
import { access } from 'node:fs/promises';
import { dirname, resolve } from 'node:path';
import pLimit from 'p-limit';
import { throwIfAborted, UniFlowError } from '../errors.js';
import type { Samples } from './dataset.js';
import { readBytes } from './files.js';
import { numberLabels } from './labels.js';

/** A path, and after a tab or comma its label. */
const LINE = /^(?<path>.*?)(?:[\t,]\s*(?<label>[^\t,]*))?$/;
const LOOKED_FOR_AT_ONCE = 16;

/** A line's parts; the path of an empty line is empty. */
export function lineOf(line: string): { path: string; label: string | undefined } {
  return LINE.exec(line.trim())?.groups as { path: string; label: string | undefined };
}

/** Whether a file's name is that of a list. */
export function isList(path: string): boolean {
  return /\.(txt|csv|tsv)$/i.test(path);
}

/** The pictures that a list names. @throws {UniFlowError} `NOT_FOUND` where one is missing. */
export async function openList(path: string, signal: AbortSignal | undefined): Promise<Samples> {
  const text = (await readBytes(path)).toString().replace(/^\ufeff/, '');
  const lines = text.split(/\r?\n/).map((line, i) => ({ ...lineOf(line), number: i + 1 }));
  const rows = lines.filter((line) => line.path !== '');
  if (rows.length === 0) throw UniFlowError.expected('NOT_FOUND', path, 'a picture in each line', 'no lines');
  const folder = dirname(path);
  await pLimit(LOOKED_FOR_AT_ONCE).map(rows, async ({ path: name, number }) => {
    throwIfAborted(signal);
    await access(resolve(folder, name)).catch((cause: unknown) => {
      throw UniFlowError.expected('NOT_FOUND', `${path}, line ${number}`, 'a file', `'${name}', which is not there`, cause);
    });
  });
  const ids = rows.map((row) => row.path);
  const { labels, classes } = numberLabels(
    path,
    ids,
    rows.map(({ label }) => label || undefined),
  );
  return {
    length: ids.length,
    classes,
    read: (i) => ({ id: ids[i] as string, label: labels[i], image: resolve(folder, ids[i] as string) }),
  };
}
