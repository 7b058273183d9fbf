/** Files that appear complete or not at all. */
import { randomUUID } from 'node:crypto';
import { mkdir, open, readdir, rename, rm, stat, type FileHandle as File } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { UniFlowError } from '../errors.js';

export interface Replacement {
  path: string;
  write: (file: File) => Promise<void>;
}

/**
 * Lets `write` fill a temporary file, makes it durable, and renames it to `path`, so a reader sees either the whole new file or the old one.
 * @throws UniFlowError `BAD_INPUT` naming a file that cannot be written (a full disk, no permission).
 */
export async function replaceFile(path: string, write: (file: File) => Promise<void>): Promise<void> {
  await replaceFiles([{ path, write }]).catch((error: unknown) => {
    throw error instanceof UniFlowError ? error : unwritable(path, error);
  });
}

/** Whether a file or folder exists. */
export async function pathExists(path: string): Promise<boolean> {
  return stat(path).then(Boolean, () => false);
}

/** The error of a file that cannot be written. */
export function unwritable(path: string, cause: unknown): UniFlowError {
  return new UniFlowError('BAD_INPUT', `${path} cannot be written: ${(cause as Error).message}`, { subject: path, cause });
}

/** Removes temporary files left in `folder` by killed processes. Nothing may be writing there. */
export async function removeTemporaries(folder: string): Promise<void> {
  const left = (await readdir(folder)).filter(isTemporary);
  await Promise.all(left.map((name) => rm(join(folder, name), { force: true })));
}

/**
 * Creates a folder and its parents. Node's own recursive mkdir loops forever, and cannot be interrupted, if the system answers ENOENT
 * although the parent exists, as in /proc.
 * @throws UniFlowError `BAD_INPUT` naming a folder that cannot be created.
 */
export async function makeFolder(path: string): Promise<void> {
  try {
    await makeBelow(path);
  } catch (error) {
    throw unwritable(path, error);
  }
}

async function makeBelow(path: string): Promise<void> {
  try {
    await mkdir(path);
  } catch (error) {
    const there = await stat(path).catch(() => undefined);
    if (there?.isDirectory()) return;
    const above = dirname(path);
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT' || above === path || (await pathExists(above))) throw error;
    await makeBelow(above);
    await mkdir(path).catch(async (late: unknown) => {
      if (!(await stat(path).catch(() => undefined))?.isDirectory()) throw late; // another process may have created it
    });
  }
}

/** Maximum length of a file name in bytes, on common file systems. */
export const MAX_NAME = 255;

/** The temporary name of a file until it is complete: the start of its own name, truncated to fit, and a unique ending. */
export function temporaryOf(path: string): string {
  const ending = `.${randomUUID()}.tmp`;
  const name = basename(path);
  const cut = cutName(name, MAX_NAME - ending.length);
  return path.slice(0, path.length - name.length) + cut + ending;
}

/** Truncates a text to at most `bytes` bytes of UTF-8. */
export function cutName(text: string, bytes: number): string {
  let size = 0;
  let cut = '';
  for (const character of text) {
    size += Buffer.byteLength(character);
    if (size > bytes) break;
    cut += character;
  }
  return cut;
}

export function isTemporary(path: string): boolean {
  return TEMPORARY.test(path);
}

const TEMPORARY = /\.[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}\.tmp$/;

/** Like {@link replaceFile} for several files: none is renamed before all are written. */
export async function replaceFiles(files: readonly Replacement[]): Promise<void> {
  const written = files.map(({ path, write }) => ({ path, write, temporary: temporaryOf(path) }));
  try {
    for (const { write, temporary } of written) {
      const file = await open(temporary, 'w');
      try {
        await write(file);
        await file.sync();
      } finally {
        await file.close();
      }
    }
    for (const { path } of written) await refuseFolder(path); // the only thing that could make a rename fail halfway
    for (const { path, temporary } of written) await rename(temporary, path);
  } catch (error) {
    for (const { temporary } of written) await rm(temporary, { force: true });
    throw error;
  }
}

async function refuseFolder(path: string): Promise<void> {
  const there = await stat(path).catch(() => undefined);
  if (there?.isDirectory()) throw new Error(`${path} is a folder`);
}

/** Element size in bytes of each type that we store. */
const ELEMENT_BYTES = { F64: 8, F32: 4, I32: 4, F16: 2, BF16: 2, U16: 2, U8: 1, I8: 1 } as const;

export interface SafetensorsEntry {
  dtype: keyof typeof ELEMENT_BYTES;
  shape: readonly number[];
  /** For types of other files that we do not store ourselves. */
  bytes?: number;
}

/** Header of a safetensors file whose tensors follow in this order: length and JSON, padded to align the elements. */
export function safetensorsHeader(tensors: Iterable<readonly [name: string, SafetensorsEntry]>, metadata: Record<string, string>): Buffer {
  const header: Record<string, unknown> = { __metadata__: metadata };
  let end = 0;
  for (const [name, { dtype, shape, bytes }] of tensors) {
    const begin = end;
    end += bytes ?? shape.reduce((a, b) => a * b, ELEMENT_BYTES[dtype]);
    header[name] = { dtype, shape, data_offsets: [begin, end] };
  }
  const json = Buffer.from(JSON.stringify(header));
  const padding = Buffer.alloc((8 - (json.length % 8)) % 8, ' ');
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length + padding.length));
  return Buffer.concat([length, json, padding]);
}
