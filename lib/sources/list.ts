/** A text file that names images: one path or URL per line, or CSV and TSV with more columns. */
import { parse } from 'csv-parse/sync';
import { access } from 'node:fs/promises';
import { dirname, resolve } from 'node:path';
import { prefetch } from '../prefetch.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import type { Item, Items, Reading } from './item.js';
import { linesOf, type Line } from './lines.js';
import { isImageName } from './names.js';
import { isRemote } from './url.js';

/** Column names that identify a header line. */
const IMAGE_COLUMNS = ['path', 'file', 'filename', 'file_name', 'filepath', 'file_path', 'image', 'img', 'image_path', 'url', 'image_url'];
const LABEL_COLUMNS = ['label', 'class', 'category', 'target', 'label_id', 'class_id'];
const LOOKED_FOR_AT_ONCE = 16;
/** A quoted field still open after this many lines is treated as an error in its first line. */
const MAX_LINES = 100;

/** A record of a list, with the number of its first line. */
interface Row {
  fields: string[];
  /** Original text in the file. */
  text: string;
  number: number;
  error?: string;
}

/**
 * The images named by a list. Paths are relative to the list's folder. Ids are the paths as written in the list. A line that cannot be
 * parsed is an unreadable image.
 * @throws {UniFlowError} `NOT_FOUND` if the list is empty or, for a data set, names missing files.
 */
export async function* inList(list: string, { strict, signal }: Reading): Items {
  let none = true;
  const items = itemsOf(list);
  for await (const { item, where } of strict ? prefetch(items, LOOKED_FOR_AT_ONCE, checkThere) : items) {
    throwIfAborted(signal);
    if (strict && typeof item.image === 'object' && 'error' in item.image)
      throw new UniFlowError('BAD_INPUT', `${where}: ${item.image.error}`);
    none = false;
    yield item;
  }
  if (none) throw UniFlowError.expected('NOT_FOUND', list, 'an image in each line', 'no lines');
}

interface Named {
  item: Item;
  where: string;
}

async function* itemsOf(list: string): AsyncGenerator<Named, void, undefined> {
  let columns: Columns | undefined;
  for await (const row of rowsOf(list)) {
    const where = `${list}, line ${row.number}`;
    if (!columns) {
      const header = headerOf(row);
      columns = header ?? { image: 0, label: 1 };
      if (header) continue;
    }
    yield { item: itemOf(row, columns, where, dirname(list)), where };
  }
}

function itemOf(row: Row, columns: Columns, where: string, folder: string): Item {
  if (row.error !== undefined) return { id: where, image: { error: row.error } };
  const name = row.fields[columns.image] ?? '';
  // an unquoted path that contains a comma
  const whole = columns.image === 0 && row.fields.length > 1 && !isImageName(name) && isImageName(row.text);
  const path = whole ? row.text : name;
  if (path === '') return { id: where, image: { error: `expected a path or URL, but got '${row.text.slice(0, 80)}'` } };
  const label = whole ? undefined : (columns.label === undefined ? undefined : row.fields[columns.label]) || undefined;
  return { id: path, image: isRemote(path) ? { url: path } : resolve(folder, path), label };
}

interface Columns {
  image: number;
  label: number | undefined;
}

/** Columns named by a header; undefined if the row is not a header. */
function headerOf({ fields, error }: Row): Columns | undefined {
  const names = fields.map((field) => field.toLowerCase());
  const image = names.findIndex((name) => IMAGE_COLUMNS.includes(name));
  if (error !== undefined || image === -1) return undefined;
  const label = names.findIndex((name) => LABEL_COLUMNS.includes(name));
  return { image, label: label === -1 ? undefined : label };
}

async function* rowsOf(list: string): AsyncGenerator<Row, void, undefined> {
  let delimiter: string | undefined;
  let open: Line[] = [];
  for await (const line of linesOf(list)) {
    if (open.length === 0 && line.line.trim() === '') continue;
    delimiter ??= delimiterOf(list, line.line);
    open.push(line);
    const row = rowOf(open, delimiter);
    if (row) yield row;
    else if (open.length < MAX_LINES) continue;
    else yield* salvaged(open, delimiter);
    open = [];
  }
  if (open.length > 0) yield* salvaged(open, delimiter as string);
}

/** Undefined if a quoted field is still open. */
function rowOf(lines: readonly Line[], delimiter: string): Row | undefined {
  const [{ number }] = lines as [Line];
  const text = lines
    .map(({ line }) => line)
    .join('\n')
    .trim();
  // without quotes, CSV is a plain split
  if (!text.includes('"')) return { fields: text.split(delimiter).map((field) => field.trim()), text, number };
  try {
    const [fields = []] = parse(text, { delimiter, relax_quotes: true, relax_column_count: true, trim: true });
    return { fields, text, number };
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    return code === 'CSV_QUOTE_NOT_CLOSED' ? undefined : { fields: [], text, number, error: message };
  }
}

/** Reports the first line as an error and parses the others again. */
function* salvaged(lines: readonly Line[], delimiter: string): Generator<Row> {
  const [{ line, number }, ...others] = lines as [Line, ...Line[]];
  yield { fields: [], text: line, number, error: `expected a quote at the end of a field, but got '${line.slice(0, 80)}'` };
  let open: Line[] = [];
  for (const other of others) {
    if (open.length === 0 && other.line.trim() === '') continue;
    const row = rowOf([...open, other], delimiter);
    open = row ? [] : [...open, other];
    if (row) yield row;
  }
  if (open.length > 0) yield* salvaged(open, delimiter);
}

/** A tab if there is one, else a comma, or the semicolon of spreadsheets that use decimal commas. */
function delimiterOf(list: string, first: string): string {
  if (first.includes('\t') || /\.tsv$/i.test(list)) return '\t';
  return /\.csv$/i.test(list) && first.includes(';') && !first.includes(',') ? ';' : ',';
}

async function checkThere(named: Named): Promise<Named> {
  const { id, image } = named.item;
  if (typeof image === 'string')
    await access(image).catch((cause: unknown) => {
      throw UniFlowError.expected('NOT_FOUND', named.where, 'a file', `'${id}', which is not there`, cause);
    });
  return named;
}
