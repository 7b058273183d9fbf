/** Reads files and streams, with errors that name them. */
import { readFile, stat } from 'node:fs/promises';
import { UniFlowError } from '../errors.js';

/** The error for a file or folder that cannot be read. */
export function unreadable(path: string, cause: unknown): UniFlowError {
  const { code, message } = cause as NodeJS.ErrnoException;
  if (code === 'ENOENT') return UniFlowError.expected('NOT_FOUND', path, 'a file or folder', 'nothing of that name', cause);
  return new UniFlowError('BAD_INPUT', `${path}: cannot be read: ${message}`, { subject: path, cause });
}

/**
 * Rejects pipes, sockets and devices, which may block forever. Missing files pass; the read reports them.
 * @throws {UniFlowError} `BAD_INPUT` for a pipe, a socket or a device.
 */
export async function refuseEndless(path: string): Promise<void> {
  const info = await stat(path).catch(() => undefined);
  if (info && !info.isFile() && !info.isDirectory()) throw UniFlowError.expected('BAD_INPUT', path, 'a file', 'a pipe or device');
}

export async function readBytes(path: string): Promise<Buffer> {
  try {
    return await readFile(path);
  } catch (error) {
    throw unreadable(path, error);
  }
}

/** Reads a stream at increasing offsets; skips the bytes in between. */
export class StreamBytes {
  readonly size = undefined;
  private readonly chunks: AsyncIterator<Buffer>;
  private chunk: Buffer = Buffer.alloc(0);
  /** Offset of the chunk's first byte. */
  private begin = 0;

  constructor(
    readonly name: string,
    stream: AsyncIterable<Buffer>,
  ) {
    this.chunks = stream[Symbol.asyncIterator]();
  }

  /** @throws {UniFlowError} `BAD_INPUT` if the stream ends early or cannot be read. */
  async read(offset: number, size: number): Promise<Buffer> {
    const out = Buffer.allocUnsafe(size);
    for (let done = 0; done < size;) {
      while (this.begin + this.chunk.length <= offset + done) if (!(await this.advance())) throw this.incomplete(offset + size);
      done += this.chunk.copy(out, done, offset + done - this.begin);
    }
    return out;
  }

  /** Whether the stream ends at or before this offset. */
  async endsAt(offset: number): Promise<boolean> {
    while (this.begin + this.chunk.length <= offset) if (!(await this.advance())) return true;
    return false;
  }

  /** Reads the next chunk. @returns false at the end. */
  private async advance(): Promise<boolean> {
    const next = await this.chunks.next().catch((cause: unknown) => {
      throw unreadable(this.name, cause);
    });
    this.begin += this.chunk.length;
    this.chunk = next.done ? Buffer.alloc(0) : next.value;
    return !next.done;
  }

  private incomplete(wanted: number): UniFlowError {
    return UniFlowError.expected('BAD_INPUT', this.name, `${wanted} bytes or more`, `${this.begin}: it is incomplete`);
  }

  /** Closes the stream. */
  async close(): Promise<void> {
    await this.chunks.return?.();
  }
}
