/** Detects changes of image files, by size and modification time or by content. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { resolve } from 'node:path';
import { fileOf, type Item } from '../sources/item.js';

/** Hashes of the files of consecutive images, in hex. Images without a file, such as those of a URL or of standard input, are ignored. */
export interface StampRecord {
  /** Hash of sizes and modification times. */
  files: string;
  /** Hash of the contents, if requested. */
  content?: string | undefined;
}

/** Stamps the files of images in order, while the images are encoded. An archive with several consecutive images is stamped once. */
export class Stamps {
  private readonly files = createHash('sha256');
  private readonly content = createHash('sha256');
  private last: string | undefined;
  private work: Promise<void> = Promise.resolve();

  /** @param verify also hashes the contents. */
  constructor(private readonly verify = false) {}

  add({ image }: Item): void {
    const file = fileOf(image);
    const path = file === undefined ? undefined : resolve(file); // a worker is given the absolute path
    if (path === undefined || path === this.last) return;
    this.last = path;
    this.work = this.work.then(() => this.stamp(path)).catch(() => undefined); // an unreadable file is reported as the failure of its image
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

/** Whether both stamps describe the same files. Compares contents if both have them. */
export function sameFiles(a: StampRecord | undefined, b: StampRecord): boolean {
  if (a?.content !== undefined && b.content !== undefined) return a.content === b.content;
  return a === undefined || a.files === b.files;
}
