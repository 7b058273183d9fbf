/** Whether the files of pictures are those that they were: by size and time of change, or by content. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { fileOf, type Item } from '../sources/item.js';

/** Hashes of the files of consecutive pictures, in hex. Pictures without a file, as those of a URL or of standard input, do not count. */
export interface StampRecord {
  /** Of sizes and times. */
  files: string;
  /** Of the bytes, where that was asked for. */
  content?: string | undefined;
}

/** Stamps files one after the other while their pictures are used; an archive that several pictures are in is looked at once. */
export class Stamps {
  private readonly files = createHash('sha256');
  private readonly content = createHash('sha256');
  private last: string | undefined;
  private work: Promise<void> = Promise.resolve();

  /** @param verify reads the files as well. */
  constructor(private readonly verify = false) {}

  add({ image }: Item): void {
    const path = fileOf(image);
    if (path === undefined || path === this.last) return;
    this.last = path;
    this.work = this.work.then(() => this.stamp(path)).catch(() => undefined); // what cannot be read is a failure of its picture
  }

  async record(): Promise<StampRecord> {
    await this.work;
    const files = this.files.copy().digest('hex');
    return this.verify ? { files, content: this.content.copy().digest('hex') } : { files };
  }

  private async stamp(path: string): Promise<void> {
    const { size, mtimeMs } = await stat(path);
    this.files.update(`${size} ${mtimeMs}\n`);
    if (!this.verify) return;
    this.content.update(`${size}\n`);
    for await (const chunk of createReadStream(path) as AsyncIterable<Buffer>) this.content.update(chunk);
  }
}

/** Whether both are of the same files, as far as they tell: by content where both have it. */
export function sameFiles(a: StampRecord | undefined, b: StampRecord): boolean {
  if (a?.content !== undefined && b.content !== undefined) return a.content === b.content;
  return a === undefined || a.files === b.files;
}
