/** The shards of a run that are there, as a file that only grows: manifest.jsonl, the header and then a line a shard. */
import { open, readFile, truncate, type FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import { UniFlowError } from '../errors.js';
import { unwritable } from '../io/files.js';
import { checkSameRun, JOURNAL, type Header } from './manifest.js';
import type { FolderOutput } from './output.js';
import type { ShardRecord } from './shard.js';

export class Journal {
  private constructor(
    private readonly path: string,
    private readonly file: FileHandle,
    /** By index. */
    readonly records: Map<number, ShardRecord>,
  ) {}

  /**
   * Opens the journal of a folder, or begins one. A last line that was not written to its end is cut off. Shards whose files are not there are
   * left out.
   * @throws {UniFlowError} `BAD_INPUT` where it is of another run, damaged, or cannot be written.
   */
  static async open(output: FolderOutput, header: Header): Promise<Journal> {
    const path = join(output.name, JOURNAL);
    const bytes = await readFile(path).catch(() => undefined); // where it is there but unreadable, opening it says so
    if (!bytes) await output.write(JOURNAL, [lineOf(header)]);
    const [first, ...shards] = bytes ? await complete(path, bytes) : [header];
    checkSameRun(output.name, first as Header, header);
    const records = new Map<number, ShardRecord>();
    for (const record of shards as ShardRecord[]) if (await isThere(output, record)) records.set(record.index, record);
    return new Journal(path, await writing(path, () => open(path, 'a')), records);
  }

  /** Enters a shard that is there; it lasts when this resolves. */
  async append(record: ShardRecord): Promise<void> {
    await writing(this.path, async () => {
      await this.file.appendFile(lineOf(record));
      await this.file.datasync();
    });
    this.records.set(record.index, record);
  }

  async close(): Promise<void> {
    await this.file.close();
  }
}

const lineOf = (value: object): Buffer => Buffer.from(`${JSON.stringify(value)}\n`);

async function writing<T>(path: string, work: () => Promise<T>): Promise<T> {
  return work().catch((error: unknown) => {
    throw unwritable(path, error);
  });
}

/** The values of the lines that are complete; the rest of the file is cut off. */
async function complete(path: string, bytes: Buffer): Promise<unknown[]> {
  const end = bytes.lastIndexOf('\n') + 1;
  if (end === 0) throw UniFlowError.expected('BAD_INPUT', path, 'a line of JSON', `${bytes.length} other bytes`);
  if (end < bytes.length) await writing(path, () => truncate(path, end));
  const lines = bytes.subarray(0, end).toString().trimEnd().split('\n');
  return lines.map((line, i) => {
    try {
      return JSON.parse(line) as unknown;
    } catch (cause) {
      throw UniFlowError.expected('BAD_INPUT', `${path}, line ${i + 1}`, 'JSON', (cause as Error).message, cause);
    }
  });
}

async function isThere(output: FolderOutput, { files }: ShardRecord): Promise<boolean> {
  for (const { name, bytes } of files) if ((await output.size(name)) !== bytes) return false;
  return true;
}
