/** Batch encoding on many machines. What it takes is loaded when it is used: importing the library stays light. */
import { optional } from '../optional.js';
import type { Item } from '../sources/item.js';
import type { UniFlow } from '../uniflow.js';
import type { QueueOptions, QueueResult } from './plan.js';
import type { ShardWorker, WorkerOptions } from './worker.js';

export type { QueueOptions, QueueProgress, QueueResult } from './plan.js';
export type { ShardWorker, WorkerOptions } from './worker.js';

/**
 * Has the pictures of a source encoded by workers on as many machines as there are, into the shards and the manifest that
 * {@link encodeToShards} makes. Workers read the pictures by their paths or URLs, which have to be the same for them. It may be stopped and
 * called again at any time.
 *
 * @param out a folder that all machines see at the same path, or `s3://bucket/prefix`
 * @throws {UniFlowError} as encodeToShards; `NETWORK` where Redis cannot be reached; `UNSUPPORTED` for pictures that have no path or URL,
 * and where BullMQ is not installed;
 * `INTERNAL` where shards failed on all attempts: calling it again tries them again.
 */
export async function encodeOnWorkers(
  uniflow: UniFlow,
  source: AsyncIterable<Item> | Iterable<Item>,
  out: string,
  options: QueueOptions,
): Promise<QueueResult> {
  return (await optional('queue', () => import('./plan.js'))).encodeOnWorkers(uniflow, source, out, options);
}

/**
 * Starts a worker that encodes shards of any run in the queue, until it is closed.
 * @throws {UniFlowError} `BAD_INPUT` for bad options, `NETWORK` where Redis cannot be reached, `UNSUPPORTED` where BullMQ is not installed.
 */
export async function startWorker(options: WorkerOptions): Promise<ShardWorker> {
  return (await optional('queue', () => import('./worker.js'))).startWorker(options);
}
