/**
 * The protocol of a run, on one machine or many. All of its state is in the output: a process may be killed at any time, and a queue may
 * lose its jobs.
 *
 *     run.json                     the run: its header
 *     staging/ID.shard-000003...   uncommitted files of an attempt
 *     records/shard-000003.json    the commit: written once, it names the files that form the shard and the images they were made of
 *     shard-000003...              the files, moved here by the first process that sees the commit
 */
import { randomUUID } from 'node:crypto';
import { UniFlowError } from '../errors.js';
import { isTemporary } from '../io/files.js';
import { prefetch } from '../prefetch.js';
import { checkSameRun, type Header } from './manifest.js';
import type { Output } from './output.js';
import { stemOf, type ShardRecord, type ShardSink } from './shard.js';

const RUN = 'run.json';
const RECORDS = 'records/';
const STAGING = 'staging/';
/** Attempts of runs on one machine. A run that holds the lock of its folder may delete those of its predecessors. */
const LOCAL = `${STAGING}local-`;
/** File in which earlier versions recorded a run of one machine. */
const EARLIER_JOURNAL = 'manifest.jsonl';

/** Records read at once: a store may take long to answer. */
const READ_AT_ONCE = 16;

/** A committed shard: its record, and the attempt that wrote its files. */
interface Commit {
  staged: string;
  record: ShardRecord;
}

/** Starts or resumes a run. @returns its header. @throws {UniFlowError} `BAD_INPUT` if the output holds a different run. */
export async function beginRun(output: Output, header: Header): Promise<Header> {
  if ((await output.size(RUN)) === undefined) {
    await refuseEarlier(output);
    if (await output.create(RUN, [json(header)])) return header;
  }
  const there = await readRun(output);
  checkSameRun(output.name, there, header);
  return there;
}

async function refuseEarlier(output: Output): Promise<void> {
  if ((await output.size(EARLIER_JOURNAL)) === undefined) return;
  throw UniFlowError.expected(
    'BAD_INPUT',
    output.name,
    'an empty folder, or a run of this version',
    `${EARLIER_JOURNAL}, which an unfinished run of an earlier version has left. Choose another folder, or delete this file to encode all images again`,
  );
}

/**
 * Locks a run in a folder until the returned function is called or the process ends; object stores have no locks.
 * @throws {UniFlowError} `BAD_INPUT` if another process holds the lock.
 */
export async function lockRun(output: Output): Promise<(() => Promise<void>) | undefined> {
  if (!output.lock) return undefined;
  const release = await output.lock(RUN);
  if (release) return release;
  throw new UniFlowError('BAD_INPUT', `${output.name} is in use: another run is writing to it`);
}

/** Deletes a run without shards, so that the output can be used for another. */
export async function clearRun(output: Output): Promise<void> {
  for (const index of await committed(output)) await output.remove(recordOf(index));
  await output.remove(RUN);
}

/** @throws {UniFlowError} `NOT_FOUND` if there is no run. */
export async function readRun(output: Output): Promise<Header> {
  return parse<Header>(output, RUN, await output.read(RUN));
}

/** One attempt at a shard. Its files stay invisible until they are committed. */
export class Attempt implements ShardSink {
  private readonly staged: string;
  private readonly names: string[] = [];

  /** @param local whether the run is one of a single machine. */
  constructor(
    private readonly output: Output,
    local = false,
  ) {
    this.staged = `${local ? LOCAL : STAGING}${randomUUID()}.`;
  }

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
    await publishAll(this.output, commit);
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
  if (commit) await publishAll(output, commit);
  return commit !== undefined;
}

/** Whether the shard is committed, regardless of the state of its files. */
export async function isRecorded(output: Output, index: number): Promise<boolean> {
  return (await output.size(recordOf(index))) !== undefined;
}

/** Indices of the committed shards. */
async function committed(output: Output): Promise<number[]> {
  const names = await output.list(RECORDS);
  return names.flatMap((name) => /shard-(\d+)\.json$/.exec(name)?.[1] ?? []).map(Number);
}

/** Records of the committed shards, except those that are known. */
export async function* readRecords(output: Output, known: ReadonlyMap<number, unknown>): AsyncGenerator<ShardRecord, void, undefined> {
  const indices = (await committed(output)).filter((index) => !known.has(index));
  yield* prefetch(indices, READ_AT_ONCE, (index) => readRecord(output, index));
}

/** @throws {UniFlowError} `NOT_FOUND` if the shard is not committed. */
export async function readRecord(output: Output, index: number): Promise<ShardRecord> {
  const name = recordOf(index);
  return parse<Commit>(output, name, await output.read(name)).record;
}

/**
 * Continues a run on one machine: completes commits of processes that were killed halfway, and drops shards whose files were deleted, so
 * that they are encoded again.
 * @param locked whether this is the only run on one machine, so that files of attempts can be deleted
 */
export async function recover(output: Output, records: Map<number, ShardRecord>, locked: boolean): Promise<void> {
  const there = new Set(await output.list(''));
  for (const [index, { files }] of records) {
    if (files.every(({ name }) => there.has(name))) continue;
    const commit = await readCommit(output, index);
    if (commit && (await publish(output, commit)) === undefined) continue;
    await output.remove(recordOf(index));
    records.delete(index);
  }
  if (locked) for (const name of there) if (name.startsWith(LOCAL)) await output.remove(name);
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

/**
 * Moves the files of a commit into place. Several processes may do this at once: a file that is no longer staged has already been moved.
 * @returns a file that is missing or has another size, if there is one.
 */
async function publish(output: Output, { staged, record }: Commit): Promise<{ name: string; bytes: number; size?: number } | undefined> {
  for (const { name, bytes } of record.files) {
    if ((await output.size(staged + name)) === undefined) continue;
    await output.move(staged + name, name).catch(async (error: unknown) => {
      if ((await output.size(name)) !== bytes) throw error;
    });
  }
  for (const { name, bytes } of record.files) {
    const size = await output.size(name);
    if (size !== bytes) return { name, bytes, ...(size === undefined ? {} : { size }) };
  }
  return undefined;
}

/** @throws {UniFlowError} `BAD_INPUT` if a file is missing or has another size. */
async function publishAll(output: Output, commit: Commit): Promise<void> {
  const wrong = await publish(output, commit);
  if (!wrong) return;
  const { name, bytes, size } = wrong;
  const advice = `. To encode its shard again, delete ${recordOf(commit.record.index)}`;
  throw UniFlowError.expected('BAD_INPUT', `${output.name}: ${name}`, `${bytes} bytes`, `${size ?? 'none'}${advice}`);
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
