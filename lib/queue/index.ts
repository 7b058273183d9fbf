/** Batch encoding on many machines. Dependencies are loaded on first use, so importing the library stays cheap. */
import { optional } from '../optional.js';
import type { Item } from '../sources/item.js';
import type { UniFlow } from '../uniflow.js';
import type { QueueOptions, QueueResult } from './planner.js';
import type { ShardWorker, WorkerOptions } from './worker.js';

export type { QueueOptions, QueueProgress, QueueResult } from './planner.js';
export type { ShardWorker, WorkerOptions } from './worker.js';

/**
 * Encodes the images of a source on any number of machines, into the same shards and manifest as {@link encodeToShards}. Workers read the
 * images by their paths or URLs, which must be valid on their machines too. The call may be stopped and repeated at any time.
 *
 * @param out a folder that all machines see at the same path, or `s3://bucket/prefix`
 * @throws {UniFlowError} as encodeToShards; `NETWORK` if Redis cannot be reached; `UNSUPPORTED` for images without a path or URL, and if
 * BullMQ is not installed; `INTERNAL` if shards failed on all attempts: calling it again retries them.
 */
export async function encodeOnWorkers(
  uniflow: UniFlow,
  source: AsyncIterable<Item> | Iterable<Item>,
  out: string,
  options: QueueOptions,
): Promise<QueueResult> {
  return (await optional('queue', () => import('./planner.js'))).encodeOnWorkers(uniflow, source, out, options);
}

/**
 * Starts a worker that encodes shards of all runs in the queue until it is closed.
 * @throws {UniFlowError} `BAD_INPUT` for bad options, `NETWORK` if Redis cannot be reached, `UNSUPPORTED` if BullMQ is not installed.
 */
export async function startWorker(options: WorkerOptions): Promise<ShardWorker> {
  return (await optional('queue', () => import('./worker.js'))).startWorker(options);
}
