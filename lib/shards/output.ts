/** Where results go, and are read from: a folder here; a store of objects can be another. */
import { link, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { dirname, join, relative, sep } from 'node:path';
import { unreadable } from '../sources/files.js';
import { makeFolder, replaceFile, temporaryOf, unwritable } from '../io/files.js';

/** Bytes from `begin` up to `end`. */
export interface ByteRange {
  begin: number;
  end: number;
}

/** Files by name, with '/' in between. */
export interface Output {
  /** What it is called in messages. */
  readonly name: string;
  /** A path on this machine: temporary files may be made whose names begin with it. */
  readonly scratch: string;
  /** The file appears complete or not at all, and lasts; one of that name is replaced. The chunks may be asked for once. */
  write(name: string, chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<void>;
  /** The same, but a file of that name is left as it is. @returns whether there was none: of several that try at once, one is told so. */
  create(name: string, chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<boolean>;
  /** Gives a file another name, at which one is replaced. @throws where there is no such file. */
  move(from: string, to: string): Promise<void>;
  /** @throws {UniFlowError} `NOT_FOUND`, or `BAD_INPUT` where the range is not there. */
  read(name: string, range?: ByteRange): Promise<Buffer>;
  /** Names that begin with `prefix`, sorted. */
  list(prefix: string): Promise<string[]>;
  /** Bytes; undefined where there is none. */
  size(name: string): Promise<number | undefined>;
  remove(name: string): Promise<void>;
}

/** Read at once: Node aborts the process where it is 2 GiB or more. */
const READ_BYTES = 2 ** 30;

/** A folder of this machine, or one that several share. */
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
      if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false;
      throw unwritable(this.pathOf(name), error);
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
      if (end > size) throw new Error(`expected ${end} bytes or more, but got ${size}`); // no memory is taken for what damage claims
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

  private pathOf(name: string): string {
    return join(this.name, name);
  }
}

/** A name lasts when its folder is on disk. */
export async function syncFolder(path: string): Promise<void> {
  const folder = await open(path);
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}
