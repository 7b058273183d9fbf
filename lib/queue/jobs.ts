/** Shards as BullMQ jobs: their data, and the connection to Redis. */
import { createHash } from 'node:crypto';
import { Queue, type JobsOptions } from 'bullmq';
import { Redis } from 'ioredis';
import { UniFlowError } from '../errors.js';
import type { Header } from '../shards/manifest.js';
import type { Item } from '../sources/item.js';

/** All runs share one queue: a worker takes any job. */
export const QUEUE = 'uniflow';

/** A shard to encode. It holds references to the images, never the images themselves. */
export interface ShardJob {
  /** The {@link runId} of the run. */
  run: string;
  index: number;
  /** Location of the run: a path that is the same on all machines, or a URL. */
  out: string;
  items: Item[];
  /** Whether to record a hash of the files' contents. */
  verify?: boolean | undefined;
}

/** `none` also covers finished shards, which are found in the output. */
export type JobState = 'none' | 'failed' | 'there';

const CONNECT_TIMEOUT = 5_000;
const MAX_RECONNECT_DELAY = 2_000;
const BACKOFF = 1_000;

/** Id of a run, determined by its output and header. */
export function runId(out: string, header: Header): string {
  return createHash('sha256')
    .update(JSON.stringify([out, header]))
    .digest('hex')
    .slice(0, 16);
}

/**
 * Connects to Redis. A lost connection is re-established automatically, and commands wait for it.
 * @param onState called when the connection is lost and when it is back
 * @throws {UniFlowError} `BAD_INPUT` if it is not a Redis URL, `NETWORK` if the server does not answer.
 */
export async function connect(url: string, onState: (text: string) => void = () => undefined): Promise<Redis> {
  const parsed = URL.canParse(url) ? new URL(url) : undefined;
  if (!parsed || !/^rediss?:$/.test(parsed.protocol) || parsed.hostname === '' || !/^\/?\d*$/.test(parsed.pathname))
    throw UniFlowError.expected('BAD_INPUT', 'queue', 'redis://host:port, with /db where it is not 0', `'${url.replace(/\/\/.*@/, '//')}'`);
  const name = `${parsed.protocol}//${parsed.host}${parsed.pathname}`; // omits the password
  let connected = false;
  let failure: Error | undefined;
  const retryStrategy = (times: number): number | null => (connected ? Math.min(100 * times, MAX_RECONNECT_DELAY) : null);
  const client = new Redis(url, { lazyConnect: true, maxRetriesPerRequest: null, connectTimeout: CONNECT_TIMEOUT, retryStrategy });
  client.on('error', (error: Error) => (failure = error)); // the 'close' event reports it
  const silent = setTimeout(() => {
    failure = new Error(`no answer in ${CONNECT_TIMEOUT / 1000} s`);
    client.disconnect();
  }, CONNECT_TIMEOUT);
  try {
    await client.connect();
    await client.select(client.options.db ?? 0); // the client also selects the database, but falls back to database 0 if that fails
  } catch (error) {
    client.disconnect();
    throw new UniFlowError('NETWORK', `${name} cannot be reached: ${(failure ?? (error as Error)).message}`, {
      subject: 'queue',
      cause: error,
    });
  } finally {
    clearTimeout(silent);
  }
  connected = true;
  let lost = false;
  client.on('close', () => {
    if (!lost && client.status !== 'end') onState(`${name}: the connection is lost; waiting for it to come back`);
    lost = true;
  });
  client.on('ready', () => {
    if (lost) onState(`${name}: the connection is back`);
    lost = false;
  });
  return client;
}

/** The jobs of one run. */
export class Jobs {
  private readonly queue: Queue<ShardJob>;
  private readonly options: JobsOptions;

  constructor(
    private readonly redis: Redis,
    private readonly job: Omit<ShardJob, 'index' | 'items'>,
    attempts: number,
  ) {
    this.queue = new Queue(QUEUE, { connection: redis });
    this.queue.on('error', () => undefined); // connection errors are reported by the connection itself
    this.options = { attempts, backoff: { type: 'exponential', delay: BACKOFF }, removeOnComplete: true };
  }

  /** Adds the shard's job, unless it exists. */
  async add(index: number, items: Item[]): Promise<void> {
    await this.queue.add('shard', { ...this.job, index, items }, { ...this.options, jobId: this.idOf(index) });
  }

  async state(index: number): Promise<JobState> {
    const state = await this.queue.getJobState(this.idOf(index));
    return state === 'unknown' || state === 'completed' ? 'none' : state === 'failed' ? 'failed' : 'there';
  }

  /** Reason why the shard's last attempt failed. */
  async reason(index: number): Promise<string> {
    return (await this.queue.getJob(this.idOf(index)))?.failedReason ?? 'unknown';
  }

  async remove(index: number): Promise<void> {
    await this.queue.remove(this.idOf(index));
  }

  /** Number of waiting jobs of all runs. */
  async waiting(): Promise<number> {
    return this.queue.getWaitingCount();
  }

  async workers(): Promise<number> {
    return this.queue.getWorkersCount();
  }

  async close(): Promise<void> {
    this.redis.disconnect(); // pending commands would never end
    await this.queue.close();
  }

  private idOf(index: number): string {
    return `${this.job.run}-${index}`;
  }
}
