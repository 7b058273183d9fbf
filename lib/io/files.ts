/** Files that appear complete or not at all. */
import { randomUUID } from 'node:crypto';
import { open, rename, rm, stat, type FileHandle as File } from 'node:fs/promises';

export interface Replacement {
  path: string;
  write: (file: File) => Promise<void>;
}

/** Lets `write` fill a temporary file, makes it durable, and renames it to `path`: a reader sees all of it or the old one. */
export function replaceFile(path: string, write: (file: File) => Promise<void>): Promise<void> {
  return replaceFiles([{ path, write }]);
}

/** The same for several files: none is renamed before all are written. */
export async function replaceFiles(files: readonly Replacement[]): Promise<void> {
  const written = files.map(({ path, write }) => ({ path, write, temporary: `${path}.${randomUUID()}.tmp` }));
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
    for (const { path } of written) await refuseFolder(path); // the one thing that would make a rename fail halfway
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

/** A safetensors header with its length in front, padded so that the elements are aligned. */
export function safetensorsHeader(header: Record<string, unknown>): Buffer {
  const json = Buffer.from(JSON.stringify(header));
  const padding = Buffer.alloc((8 - (json.length % 8)) % 8, ' ');
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length + padding.length));
  return Buffer.concat([length, json, padding]);
}
