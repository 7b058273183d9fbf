/** Files that appear complete or not at all. */
import { randomUUID } from 'node:crypto';
import { open, rename, rm, type FileHandle as File } from 'node:fs/promises';

/** Lets `write` fill a temporary file, makes it durable, and renames it to `path`: a reader sees all of it or the old one. */
export async function replaceFile(path: string, write: (file: File) => Promise<void>): Promise<void> {
  const temporary = `${path}.${randomUUID()}.tmp`;
  const file = await open(temporary, 'w');
  try {
    await write(file);
    await file.sync();
    await file.close();
    await rename(temporary, path);
  } catch (error) {
    await file.close().catch(() => undefined);
    await rm(temporary, { force: true });
    throw error;
  }
}

/** A safetensors header with its length in front, padded so that the elements are aligned. */
export function safetensorsHeader(header: Record<string, unknown>): Buffer {
  const json = Buffer.from(JSON.stringify(header));
  const padding = Buffer.alloc((8 - (json.length % 8)) % 8, ' ');
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length + padding.length));
  return Buffer.concat([length, json, padding]);
}
