/** Holds the rows of a shard in an unnamed temporary file until all have been computed. */
import { open, rm, type FileHandle } from 'node:fs/promises';
import { temporaryOf, unwritable } from '../io/files.js';

const CHUNK = 1 << 20;

export class Spool {
  private constructor(
    private readonly beside: string,
    private readonly file: FileHandle,
  ) {}

  /** @param beside prefix of the temporary name that the file has until it is unlinked. */
  static async open(beside: string): Promise<Spool> {
    try {
      const path = temporaryOf(beside);
      const file = await open(path, 'wx+');
      await rm(path); // an unlinked file is freed when it is closed, even if the process is killed
      return new Spool(beside, file);
    } catch (error) {
      throw unwritable(beside, error);
    }
  }

  /** @throws {UniFlowError} `BAD_INPUT` if the disk is full. */
  async write(bytes: Uint8Array, at: number): Promise<void> {
    try {
      for (let done = 0; done < bytes.length;) done += (await this.file.write(bytes, done, bytes.length - done, at + done)).bytesWritten;
    } catch (error) {
      throw unwritable(this.beside, error);
    }
  }

  async read(begin: number, end: number): Promise<Buffer> {
    return (await this.file.read(Buffer.allocUnsafe(end - begin), 0, end - begin, begin)).buffer;
  }

  /** Reads the first `end` bytes in chunks. */
  async *chunks(end: number): AsyncGenerator<Buffer, void, undefined> {
    for (let begin = 0; begin < end; begin += CHUNK) yield await this.read(begin, Math.min(end, begin + CHUNK));
  }

  async close(): Promise<void> {
    await this.file.close();
  }
}
