/** The shards of a run that are there, as a file that only grows: manifest.jsonl, the header and then a line a shard. */
import { open, type FileHandle } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import pLimit from 'p-limit';
import { unreadable } from '../sources/files.js';
import { UniFlowError } from '../errors.js';
import { removeTemporaries, unwritable } from '../io/files.js';
import { native } from '../native.js';
import { checkSameRun, JOURNAL, type Header } from './manifest.js';
import { syncFolder, type FolderOutput } from './output.js';
import type { ShardRecord } from './shard.js';

export class Journal {
  private readonly inTurn = pLimit(1);

  private constructor(
    private readonly path: string,
    private readonly file: FileHandle,
    /** Of the run as it began. */
    readonly header: Header,
    /** By index. */
    readonly records: Map<number, ShardRecord>,
  ) {}

  /**
   * Opens the journal of a folder, or begins one. Until it is closed, nobody else can open it: what killed processes left in the folder is
   * removed. A last line that was not written to its end is cut off. Shards whose files are not there are left out.
   * @throws {UniFlowError} `BAD_INPUT` where it is of another run, damaged, in use, or cannot be written.
   */
  static async open(output: FolderOutput, header: Header): Promise<Journal> {
    const path = join(output.name, JOURNAL);
    const file = await writing(path, () => open(path, 'a+'));
    try {
      if (!native.lockFile(file.fd)) throw new UniFlowError('BAD_INPUT', `${output.name} is in use: another run is writing to it`);
      await writing(output.name, () => removeTemporaries(output.name));
      const [first, ...shards] = await complete(path, file, header);
      checkSameRun(output.name, first as Header, header);
      const records = new Map<number, ShardRecord>();
      for (const record of shards as ShardRecord[]) if (await isThere(output, record)) records.set(record.index, record);
      return new Journal(path, file, first as Header, records);
    } catch (error) {
      await file.close();
      throw error;
    }
  }

  /** Enters a shard that is there; it lasts when this resolves. */
  async append(record: ShardRecord): Promise<void> {
    await this.inTurn(() => writing(this.path, () => this.write(lineOf(record))));
    this.records.set(record.index, record);
  }

  private async write(line: Buffer): Promise<void> {
    const { size } = await this.file.stat();
    try {
      await this.file.appendFile(line);
      await this.file.datasync();
    } catch (error) {
      await this.file.truncate(size); // the disk may be full, and what is left of a line would spoil the next
      throw error;
    }
  }

  /** Forgets all: the folder can be used for another run. */
  async clear(): Promise<void> {
    await writing(this.path, () => this.file.truncate());
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

/** The values of the lines that are complete; the rest of the file is cut off. Where it had no header yet, it has it now. */
async function complete(path: string, file: FileHandle, header: Header): Promise<unknown[]> {
  const bytes = await file.readFile().catch((cause: unknown) => {
    throw unreadable(path, cause);
  });
  const end = bytes.lastIndexOf('\n') + 1;
  const begin = lineOf(header);
  if (end === 0 && !begin.subarray(0, bytes.length).equals(bytes))
    throw UniFlowError.expected('BAD_INPUT', path, 'a line of JSON', `${bytes.length} other bytes`);
  await writing(path, async () => {
    if (end < bytes.length) await file.truncate(end);
    if (end > 0) return;
    await file.appendFile(begin);
    await file.sync();
    await syncFolder(dirname(path));
  });
  if (end === 0) return [header];
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
