/** Encodes shards of a run: the same function on one machine and on many, and the driver of one machine. */
import { checkOptions, describe } from '../check.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import type { UniFlow } from '../uniflow.js';
import { Attempt, isCommitted, lockRun, readRecord, recover } from './commits.js';
import { headerOf } from './manifest.js';
import { openOutput } from './open-output.js';
import type { Output } from './output.js';
import type { PlannedShard } from './plan.js';
import { checkRun, Run, type Driver, type ItemSource, type RunOptions, type RunResult } from './run.js';
import { ShardEncoder, type EncodeShardOptions, type ShardRecord } from './shard.js';

/** Shards computed or written concurrently: the next can start while one waits for the disk. */
const SHARDS_AT_ONCE = 3;
const OPTIONS: readonly (keyof RunOptions)[] = [
  ...([
    'shardSize',
    'maxFailures',
    'verify',
    'signal',
    'onFailure',
    'onProgress',
    'latents',
    'codes',
    'tokens',
    'store',
    'format',
  ] as const),
  ...(['model', 'fit', 'size', 'batchSize', 'download'] as const),
];

export interface EncodeOneOptions extends Omit<EncodeShardOptions, 'layout'> {
  /** Whether the run is one of a single machine. */
  local?: boolean | undefined;
}

/** Encodes shard `index` of a run and commits it. @returns undefined if another attempt was committed first. */
export async function encodeShard(
  encoder: ShardEncoder,
  output: Output,
  index: number,
  items: Parameters<ShardEncoder['encode']>[1],
  { local, ...options }: EncodeOneOptions,
): Promise<ShardRecord | undefined> {
  if (await isCommitted(output, index)) return undefined;
  const attempt = new Attempt(output, local);
  const record = await encoder.encode(index, items, attempt, options).catch(async (error: unknown) => {
    await attempt.drop().catch(() => undefined); // files that remain are removed when the run is resumed or complete
    throw error;
  });
  return (await attempt.commit(record)) ? record : undefined;
}

/**
 * Encodes the images of a source into shards, and writes a manifest at the end. Calling it again with the same images and options resumes
 * a run that was stopped or killed; the resulting shards are identical, byte for byte. Images that cannot be read are skipped and listed in
 * failures.jsonl.
 *
 * @param out a folder, or `s3://bucket/prefix`
 * @throws {UniFlowError} `BAD_INPUT` for bad options, if the folder holds another run, is in use or cannot be written, if the images differ
 * from those of the run, and after `maxFailures`; `NETWORK` if the bucket cannot be reached; `ABORTED`. Completed shards are kept.
 */
export async function encodeToShards(uniflow: UniFlow, source: ItemSource, out: string, options: RunOptions = {}): Promise<RunResult> {
  checkOptions(options, OPTIONS);
  if (typeof out !== 'string' || out === '') throw UniFlowError.expected('BAD_INPUT', 'folder', 'a path', describe(out));
  const shardSize = checkRun(options);
  const encoder = new ShardEncoder(uniflow, options);
  const output = await openOutput(out);
  const run = new Run(output, await headerOf(encoder, shardSize), source, options, ({ done, before, failures }) =>
    options.onProgress?.({ done, before, failures, utilisation: () => encoder.pipeline.meter.read() }),
  );
  const complete = await run.completed();
  if (complete) return complete;
  await run.begin();
  const unlock = await lockRun(output);
  try {
    const meanwhile = await run.completed(); // another process may have completed the run before releasing the lock
    if (meanwhile) return meanwhile;
    await run.resume();
    await recover(output, run.records, unlock !== undefined);
    const result = await run.encode(new InProcess(encoder, run, options.verify));
    return { ...result, manifest: result.manifest as RunResult['manifest'] };
  } finally {
    await unlock?.();
  }
}

/** Encodes several shards at once in this process. */
class InProcess implements Driver {
  private readonly underWay = new Set<Promise<void>>();

  constructor(
    private readonly encoder: ShardEncoder,
    private readonly run: Run,
    private readonly verify: boolean | undefined,
  ) {}

  /** Resolves once all items of the shard are taken, while its computation may still be running. */
  async encode(shard: PlannedShard): Promise<void> {
    const work: Promise<void> = this.work(shard)
      .catch((error: unknown) => this.run.fail(error))
      .finally(() => this.underWay.delete(work));
    this.underWay.add(work);
    await Promise.race([shard.taken, work]);
    if (this.underWay.size >= SHARDS_AT_ONCE) await Promise.race(this.underWay);
  }

  async settled(): Promise<boolean> {
    await this.close();
    throwIfAborted(this.run.signal);
    return true;
  }

  async close(): Promise<void> {
    await Promise.all(this.underWay);
  }

  private async work(shard: PlannedShard): Promise<void> {
    const { encoder, run, verify } = this;
    const { output, signal } = run;
    let counted = 0;
    const count = (images: number): void => {
      counted += images;
      run.count(images);
    };
    const record = await encodeShard(encoder, output, shard.index, shard, {
      ...{ local: true, signal, verify, onCount: count },
      onFailure: (failure) => {
        run.addFailure(failure);
        count(1);
      },
    });
    run.add(record ?? (await readRecord(output, shard.index)), counted);
  }
}
