/**
 * The protocol between workers and planners. All of its state is in the output: Redis only hands out work, and may lose it.
 *
 *     run.json                     the run: its header
 *     staging/ID.shard-000003...   uncommitted files of a worker
 *     records/shard-000003.json    the commit: written once, it names the files that form the shard
 *     shard-000003...              the files, moved here by the first process that sees the commit
 */
import { randomUUID } from 'node:crypto';
import { UniFlowError } from '../errors.js';
import { isTemporary } from '../io/files.js';
import { checkSameRun, JOURNAL, type Header } from '../shards/manifest.js';
import type { Output } from '../shards/output.js';
import { stemOf, type ShardRecord, type ShardSink } from '../shards/shard.js';

const RUN = 'run.json';
const RECORDS = 'records/';
const STAGING = 'staging/';

/** A committed shard: its record, and the attempt that wrote its files. */
interface Commit {
  staged: string;
  record: ShardRecord;
}

/** Starts or resumes a run. @returns its header. @throws {UniFlowError} `BAD_INPUT` if the output holds a different run. */
export async function beginRun(output: Output, header: Header): Promise<Header> {
  if ((await output.size(JOURNAL)) !== undefined)
    throw new UniFlowError('BAD_INPUT', `${output.name} has a run of one machine: go on without --queue, or choose another folder`);
  if ((await output.size(RUN)) === undefined && (await output.create(RUN, [json(header)]))) return header;
  const there = await readRun(output);
  checkSameRun(output.name, there, header);
  return there;
}

/** @throws {UniFlowError} `NOT_FOUND` if there is no run. */
export async function readRun(output: Output): Promise<Header> {
  return parse<Header>(output, RUN, await output.read(RUN));
}

/** One attempt at a shard. Its files stay invisible until they are committed. */
export class Attempt implements ShardSink {
  private readonly staged = `${STAGING}${randomUUID()}.`;
  private readonly names: string[] = [];

  constructor(private readonly output: Output) {}

  get scratch(): string {
    return this.output.scratch;
  }

  async write(name: string, chunks: Parameters<Output['write']>[1]): Promise<void> {
    this.names.push(name);
    await this.output.write(this.staged + name, chunks);
  }

  /** @returns false if another attempt was committed first; this attempt's files are then deleted. */
  async commit(record: ShardRecord): Promise<boolean> {
    const commit: Commit = { staged: this.staged, record };
    if (!(await this.output.create(recordOf(record.index), [json(commit)]))) {
      const there = await readCommit(this.output, record.index);
      if (there?.staged !== this.staged) {
        await this.drop(); // if the commit is ours, the store retried the request and found it
        return false;
      }
    }
    await publish(this.output, commit);
    return true;
  }

  /** Deletes the files written so far. */
  async drop(): Promise<void> {
    for (const name of this.names) await this.output.remove(this.staged + name);
  }
}

/** Whether the shard is committed. If so, its files are in place once this resolves. */
export async function isCommitted(output: Output, index: number): Promise<boolean> {
  const commit = await readCommit(output, index);
  if (commit) await publish(output, commit);
  return commit !== undefined;
}

/** Whether the shard is committed, regardless of the state of its files. */
export async function isRecorded(output: Output, index: number): Promise<boolean> {
  return (await output.size(recordOf(index))) !== undefined;
}

/** Indices of the committed shards. */
export async function committed(output: Output): Promise<number[]> {
  const names = await output.list(RECORDS);
  return names.flatMap((name) => /shard-(\d+)\.json$/.exec(name)?.[1] ?? []).map(Number);
}

/** @throws {UniFlowError} `NOT_FOUND` if the shard is not committed. */
export async function readRecord(output: Output, index: number): Promise<ShardRecord> {
  const name = recordOf(index);
  return parse<Commit>(output, name, await output.read(name)).record;
}

/** Completes commits of workers that were killed halfway, and deletes files that were never committed. */
export async function tidy(output: Output, records: Iterable<ShardRecord>): Promise<void> {
  const there = new Set(await output.list(''));
  for (const { index, files } of records) if (files.some(({ name }) => !there.has(name))) await isCommitted(output, index);
  for (const name of there) if (name.startsWith(STAGING) || isTemporary(name)) await output.remove(name);
}

async function readCommit(output: Output, index: number): Promise<Commit | undefined> {
  const name = recordOf(index);
  return (await output.size(name)) === undefined ? undefined : parse<Commit>(output, name, await output.read(name));
}

/** Several processes may do this at once: a file that is no longer staged has already been moved. */
async function publish(output: Output, { staged, record }: Commit): Promise<void> {
  for (const { name, bytes } of record.files) {
    if ((await output.size(staged + name)) === undefined) continue;
    await output.move(staged + name, name).catch(async (error: unknown) => {
      if ((await output.size(name)) !== bytes) throw error;
    });
  }
  for (const { name, bytes } of record.files) {
    const size = await output.size(name);
    if (size !== bytes)
      throw UniFlowError.expected('BAD_INPUT', `${output.name}: ${name}`, `${bytes} bytes`, size === undefined ? 'none' : `${size}`);
  }
}

const recordOf = (index: number): string => `${RECORDS}${stemOf(index)}.json`;
const json = (value: object): Buffer => Buffer.from(`${JSON.stringify(value)}\n`);

function parse<T>(output: Output, name: string, bytes: Buffer): T {
  try {
    return JSON.parse(bytes.toString()) as T;
  } catch (cause) {
    throw UniFlowError.expected('BAD_INPUT', `${output.name}: ${name}`, 'JSON', (cause as Error).message, cause);
  }
}
