/** The completed shards of a run in an append-only file: manifest.jsonl holds the header, then one line per shard. */
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
    /** Header that the run started with. */
    readonly header: Header,
    /** Records by shard index. */
    readonly records: Map<number, ShardRecord>,
  ) {}

  /**
   * Opens the journal of a folder, or creates it. The journal is locked until closed, so leftovers of killed processes can be removed
   * safely. An incomplete last line is cut off. Shards with missing files are ignored.
   * @throws {UniFlowError} `BAD_INPUT` if the journal belongs to another run, is damaged, is in use, or cannot be written.
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

  /** Records a completed shard; the record is on disk once this resolves. */
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
      await this.file.truncate(size); // the disk may be full, and a partial line would corrupt the next
      throw error;
    }
  }

  /** Empties the journal, so that the folder can be used for another run. */
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

/** Parses the complete lines and truncates the file after them. Writes the header if it is missing. */
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
