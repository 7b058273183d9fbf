/** Storage of results. This file implements a folder; object stores implement the same interface. */
import { link, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { dirname, join, relative, sep } from 'node:path';
import { unreadable } from '../sources/files.js';
import { native } from '../native.js';
import { makeFolder, replaceFile, temporaryOf, unwritable } from '../io/files.js';

/** Bytes from `begin` up to `end`. */
export interface ByteRange {
  begin: number;
  end: number;
}

/** A set of files. Names may contain '/'. */
export interface Output {
  /** Name of the output for messages. */
  readonly name: string;
  /** A local path prefix for temporary files. */
  readonly scratch: string;
  /** Writes a file atomically and durably, replacing any file of that name. `chunks` is iterated only once. */
  write(name: string, chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<void>;
  /**
   * Like {@link write}, but keeps an existing file. @returns whether the file was created. Of several concurrent calls, exactly one returns
   * true.
   */
  create(name: string, chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<boolean>;
  /** Renames a file, replacing any file at the new name. @throws if the file does not exist. */
  move(from: string, to: string): Promise<void>;
  /** @throws {UniFlowError} `NOT_FOUND`, or `BAD_INPUT` if the range exceeds the file. */
  read(name: string, range?: ByteRange): Promise<Buffer>;
  /** Names starting with `prefix`, sorted. */
  list(prefix: string): Promise<string[]>;
  /** Size in bytes; undefined if the file does not exist. */
  size(name: string): Promise<number | undefined>;
  remove(name: string): Promise<void>;
  /**
   * Locks an existing file until the returned function is called or the process ends. @returns undefined if another process holds the
   * lock. Missing if the store has no locks.
   */
  lock?(name: string): Promise<(() => Promise<void>) | undefined>;
}

/** Maximum size of one read: Node aborts the process for reads of 2 GiB or more. */
const READ_BYTES = 2 ** 30;

/** Errors of file systems without hard links, such as FAT. */
const NO_LINKS = ['EPERM', 'ENOTSUP', 'EOPNOTSUPP', 'ENOSYS'];

/** A folder on this machine or on a shared file system. */
export class FolderOutput implements Output {
  constructor(readonly name: string) {}

  get scratch(): string {
    return join(this.name, 'scratch');
  }

  async write(name: string, chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<void> {
    const path = this.pathOf(name);
    await makeFolder(dirname(path));
    await replaceFile(path, async (file) => {
      for await (const chunk of chunks) await file.writeFile(chunk);
    });
    await syncFolder(dirname(path));
  }

  async create(name: string, chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<boolean> {
    const temporary = temporaryOf(name);
    await this.write(temporary, chunks);
    try {
      await link(this.pathOf(temporary), this.pathOf(name));
      await syncFolder(dirname(this.pathOf(name)));
      return true;
    } catch (error) {
      const { code = '' } = error as NodeJS.ErrnoException;
      if (code === 'EEXIST' || (NO_LINKS.includes(code) && (await this.size(name)) !== undefined)) return false;
      if (!NO_LINKS.includes(code)) throw unwritable(this.pathOf(name), error);
      await this.move(temporary, name); // of several calls at once, more than one may return true
      return true;
    } finally {
      await this.remove(temporary);
    }
  }

  async move(from: string, to: string): Promise<void> {
    const path = this.pathOf(to);
    await rename(this.pathOf(from), path).catch((error: unknown) => {
      throw unwritable(path, error);
    });
    await syncFolder(dirname(path));
  }

  async read(name: string, range?: ByteRange): Promise<Buffer> {
    const path = this.pathOf(name);
    const file = await open(path).catch((cause: unknown) => {
      throw unreadable(path, cause);
    });
    try {
      const { size } = await file.stat();
      const { begin, end } = range ?? { begin: 0, end: size };
      if (end > size) throw new Error(`expected ${end} bytes or more, but got ${size}`); // damaged metadata must not cause huge allocations
      const buffer = Buffer.allocUnsafe(end - begin);
      for (let done = 0; done < buffer.length;) {
        const { bytesRead } = await file.read(buffer, done, Math.min(READ_BYTES, buffer.length - done), begin + done);
        if (bytesRead === 0) throw new Error(`expected ${end} bytes or more, but got ${begin + done}`);
        done += bytesRead;
      }
      return buffer;
    } catch (cause) {
      throw unreadable(path, cause);
    } finally {
      await file.close();
    }
  }

  async list(prefix: string): Promise<string[]> {
    const entries = await readdir(this.name, { recursive: true, withFileTypes: true });
    return entries
      .filter((entry) => entry.isFile())
      .map((entry) => relative(this.name, join(entry.parentPath, entry.name)).replaceAll(sep, '/'))
      .filter((name) => name.startsWith(prefix))
      .sort();
  }

  async size(name: string): Promise<number | undefined> {
    const info = await stat(this.pathOf(name)).catch(() => undefined);
    return info?.isFile() ? info.size : undefined;
  }

  async remove(name: string): Promise<void> {
    await rm(this.pathOf(name), { force: true });
  }

  async lock(name: string): Promise<(() => Promise<void>) | undefined> {
    const path = this.pathOf(name);
    const file = await open(path, 'r+').catch((cause: unknown) => {
      throw unwritable(path, cause);
    });
    if (native.lockFile(file.fd)) return () => file.close();
    await file.close();
    return undefined;
  }

  private pathOf(name: string): string {
    return join(this.name, name);
  }
}

/** Flushes a folder to disk, which makes new names in it durable. */
async function syncFolder(path: string): Promise<void> {
  const folder = await open(path);
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}
