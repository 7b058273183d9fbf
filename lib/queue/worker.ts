/** A worker: takes shards of any run from the queue and commits them to the run's output. */
import { DelayedError, WaitingError, Worker, type Job } from 'bullmq';
import type { Redis } from 'ioredis';
import type { Server } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { readRun } from '../shards/commits.js';
import { checkSameRun, headerOf, type Header } from '../shards/manifest.js';
import { openOutput } from '../shards/open-output.js';
import type { Output } from '../shards/output.js';
import { fileOf } from '../sources/item.js';
import { loadParquet } from '../sources/load-parquet.js';
import { ShardEncoder, type ShardRecord } from '../shards/shard.js';
import { encodeShard } from '../shards/worker.js';
import { checkInteger, checkOptions } from '../check.js';
import type { DeviceOptions } from '../device.js';
import { UniFlowError } from '../errors.js';
import { pathExists } from '../io/files.js';
import type { ModelType } from '../device.js';
import { MissingPackageError } from '../optional.js';
import { embeddedName } from '../package.js';
import { UniFlow } from '../uniflow.js';
import { connect, QUEUE, type ShardJob } from './jobs.js';
import { Metrics, urlOf } from './metrics.js';

/** Options of {@link startWorker}. */
export interface WorkerOptions {
  /** `redis://host:port/db`, or `rediss://`. */
  queue: string;
  /** Folder or name of the model. Default: the model named by the run. In either case its weights must equal those of the run. */
  model?: string | undefined;
  revision?: string | undefined;
  /** Device of the model. Default 'auto'. */
  device?: DeviceOptions['device'];
  /** Number of concurrent shards: one is written while another is computed. Default 2. */
  concurrency?: number | undefined;
  /** Milliseconds after which the shard of a dead worker is reassigned, at most twice that. Default 30,000. */
  stall?: number | undefined;
  /** Serves /metrics and /healthz. */
  metrics?: { host?: string | undefined; port: number } | undefined;
  /** Called for each shard that this worker has committed. */
  onShard?: ((record: ShardRecord, seconds: number) => void) | undefined;
  /** Called with failed attempts, and with what the work is waiting for. */
  onState?: ((text: string) => void) | undefined;
}

/** A running worker. */
export interface ShardWorker {
  /** URL of the metrics server, if enabled. */
  readonly url: string | undefined;
  /** Resolves once the worker is closed; rejects if its model is not the one that a run needs. */
  readonly ended: Promise<void>;
  /** Takes no more shards, finishes those in progress, and stops. */
  close(): Promise<void>;
}

/** A run that the worker contributes to. */
interface Run {
  encoder: ShardEncoder;
  output: Output;
}

/** Number of cached runs. Models are cached separately. */
const KEPT_RUNS = 4;
/** A shard fails after this many of its workers have died: it may be the cause. */
const MAX_DEATHS = 10;
/** Milliseconds before a shard is offered again after a worker could not start it. */
const PUT_BACK = 10_000;
/**
 * A shard whose files are all missing is left to other workers this many times. After that, the files are considered deleted and recorded
 * as failures.
 */
const UNSEEN = 5;
/** Milliseconds to pause after an error of Redis. */
const REST = 1_000;
/** Poll interval of a stopping worker, in milliseconds. */
const LOOK = 100;

/** @throws {UniFlowError} `BAD_INPUT` for bad options, `NETWORK` if Redis cannot be reached. */
export async function startWorker(options: WorkerOptions): Promise<ShardWorker> {
  checkOptions(options);
  const { queue, concurrency = 2, stall = 30_000, metrics } = options;
  checkInteger('concurrency', concurrency, 1, 1024);
  checkInteger('stall', stall, 100, 3_600_000);
  const redis = await connect(queue, options.onState);
  const tasks = new Tasks(redis, options, concurrency, stall);
  try {
    if (metrics) await tasks.serve(metrics.host ?? '127.0.0.1', metrics.port);
  } catch (error) {
    await tasks.close();
    throw error;
  }
  return tasks;
}

/** The output of a run is not accessible from this machine: not mounted, not permitted, or deleted. */
class OutOfReach extends Error {}

async function openHeader(out: string): Promise<{ output: Output; header: Header }> {
  const output = await openOutput(out);
  return { output, header: await readRun(output) };
}

class Tasks implements ShardWorker {
  readonly ended: Promise<void>;
  private end!: (error?: Error) => void;
  private closing: Promise<void> | undefined;
  private readonly worker: Worker<ShardJob>;
  private readonly runs = new Map<string, Promise<Run>>();
  private readonly models = new Map<string, Promise<UniFlow>>();
  private readonly metrics: Metrics;
  private server: Server | undefined;
  private active = 0;
  private last: ShardEncoder | undefined;

  constructor(
    private readonly redis: Redis,
    private readonly options: WorkerOptions,
    concurrency: number,
    stall: number,
  ) {
    this.ended = new Promise((resolve, reject) => {
      this.end = (error) => (error ? reject(error) : resolve());
    });
    this.ended.catch(() => undefined); // avoids an unhandled rejection if nobody uses `ended`
    this.metrics = new Metrics(
      () => this.active,
      () => this.last?.pipeline.meter.read(),
    );
    const intervals = { lockDuration: stall, stalledInterval: stall, maxStalledCount: MAX_DEATHS };
    this.worker = new Worker<ShardJob>(QUEUE, (job, token) => this.take(job, token), { connection: redis, concurrency, ...intervals });
    this.worker.on('error', (error) => {
      if (this.redis.status !== 'ready') return; // lost connections are reported by the connection itself
      this.options.onState?.(error.message);
      this.rest();
    });
    this.worker.on('failed', (job, error) => {
      this.metrics.ended('failed');
      this.options.onState?.(`shard ${job?.data.index ?? '?'}, attempt ${job?.attemptsMade ?? '?'}: ${error.message}`);
    });
  }

  get url(): string | undefined {
    return this.server && urlOf(this.server);
  }

  async serve(host: string, port: number): Promise<void> {
    this.server = await this.metrics.serve(host, port, () => this.redis.status === 'ready' && !this.closing);
  }

  close(error?: Error): Promise<void> {
    this.closing ??= this.stop().then(
      () => this.end(error),
      (failure: Error) => this.end(error ?? failure),
    );
    return this.closing;
  }

  private async stop(): Promise<void> {
    await Promise.race([this.worker.close(), this.alone()]);
    this.redis.disconnect();
    this.server?.close();
    this.server?.closeAllConnections();
    for (const model of this.models.values()) await (await model.catch(() => undefined))?.dispose();
  }

  /** Resolves once no shard is in progress and Redis is disconnected. BullMQ would wait for the connection to return. */
  private async alone(): Promise<void> {
    while (this.active > 0 || this.redis.status === 'ready') await sleep(LOOK);
  }

  /** Pauses after errors such as a full Redis memory, because BullMQ would retry immediately. */
  private rest(): void {
    if (this.worker.isPaused() || this.closing) return;
    void this.worker.pause(true);
    setTimeout(() => void (this.closing ?? this.worker.resume()), REST).unref();
  }

  private async take(job: Job<ShardJob>, token: string | undefined): Promise<void> {
    let run: Run;
    try {
      run = await this.runOf(job.data);
      await checkReadable(job.data);
      if (job.attemptsStarted <= UNSEEN) await checkSeen(job.data);
    } catch (error) {
      throw await this.giveBack(job, token, error as Error);
    }
    this.active++;
    try {
      await this.make(job.data, run);
    } finally {
      this.active--;
    }
  }

  /** Returns the job to the queue for other workers, without counting it as a failed attempt. @returns the error that BullMQ expects. */
  private async giveBack(job: Job<ShardJob>, token: string | undefined, error: Error): Promise<Error> {
    if (error instanceof OutOfReach) {
      this.options.onState?.(`shard ${job.data.index} is put back: ${error.message}`);
      await job.moveToDelayed(Date.now() + PUT_BACK, token);
      return new DelayedError();
    }
    await job.moveToWait(token);
    void this.close(error);
    return new WaitingError();
  }

  private async make({ index, items, verify }: ShardJob, { encoder, output }: Run): Promise<void> {
    const begin = performance.now();
    const onCount = (images: number): void => this.metrics.computed(images);
    const record = await encodeShard(encoder, output, index, items, { verify, onCount });
    if (!record) return this.metrics.ended('there');
    const seconds = (performance.now() - begin) / 1000;
    this.metrics.made(record, seconds);
    this.options.onShard?.(record, seconds);
  }

  private async runOf({ run, out }: ShardJob): Promise<Run> {
    const found = this.runs.get(run) ?? this.openRun(out);
    this.runs.delete(run);
    this.runs.set(run, found);
    found.catch(() => this.runs.delete(run));
    for (const oldest of this.runs.keys()) {
      if (this.runs.size <= KEPT_RUNS) break;
      this.runs.delete(oldest);
    }
    const { encoder } = await found;
    this.last = encoder;
    return found;
  }

  /** @throws {UniFlowError} if this worker would produce different shards than the run's. */
  private async openRun(out: string): Promise<Run> {
    const { output, header } = await openHeader(out).catch((error: Error) => {
      if (error instanceof MissingPackageError) throw error;
      throw new OutOfReach(error.message, { cause: error });
    });
    const { fit, size, store, format, batchSize, arrays, shardSize, model } = header;
    const array = { latents: arrays.latents !== undefined, codes: arrays.codes !== undefined, tokens: arrays.tokens !== undefined };
    const options = { fit, size, store, format, batchSize, ...array, model: model.name };
    const encoder = new ShardEncoder(await this.load(header), options);
    checkSameRun(output.name, header, await headerOf(encoder, shardSize));
    return { encoder, output };
  }

  private load({ model: { name, dtype } }: Header): Promise<UniFlow> {
    const model = this.options.model ?? name;
    if (model === '') throw UniFlowError.expected('BAD_INPUT', 'model', 'a model, for the run does not name one', 'none');
    const key = `${model}\0${dtype}`;
    const found =
      this.models.get(key) ??
      UniFlow.load(model === embeddedName ? undefined : model, {
        device: this.options.device,
        dtype: dtype as ModelType,
        revision: this.options.revision,
      });
    this.models.set(key, found);
    return found;
  }
}

/** @throws {MissingPackageError} if a package for reading its images is not installed. */
async function checkReadable({ items }: ShardJob): Promise<void> {
  if (items.some(({ image }) => typeof image === 'object' && 'parquet' in image)) await loadParquet();
}

/**
 * Rejects a shard if none of its files exists: if a mount is missing, all of its images would be recorded as failures. @throws OutOfReach
 */
async function checkSeen({ items }: ShardJob): Promise<void> {
  const paths = new Set(items.flatMap(({ image }) => fileOf(image) ?? []));
  for (const path of paths) if (await pathExists(path)) return;
  if (paths.size > 0) throw new OutOfReach(`none of its files is there, as ${[...paths][0]}`);
}
