/** `uniflow worker`: encodes shards planned by `uniflow encode --queue`, until it is stopped. */
import { setThreads, type DeviceOptions } from '../device.js';
import { startWorker } from '../queue/index.js';
import type { HubModelOptions } from './options.js';
import { plural, rateText } from './output.js';

export interface WorkerCommandOptions extends HubModelOptions {
  queue: string;
  model?: string;
  device?: DeviceOptions['device'];
  threads?: number;
  concurrency?: number;
  /** Seconds. */
  stall?: number;
  metricsPort?: number;
  metricsHost?: string;
}

export async function workerCommand(options: WorkerCommandOptions, signal: AbortSignal): Promise<void> {
  const { queue, model, revision, device, threads, concurrency, stall, metricsPort, metricsHost, json } = options;
  if (threads !== undefined) setThreads(threads);
  const say = (text: string): void => void (json || process.stderr.write(`uniflow: ${text}\n`));
  const worker = await startWorker({
    ...{ queue, model, revision, device, concurrency },
    stall: stall === undefined ? undefined : Math.round(1000 * stall),
    metrics: metricsPort === undefined ? undefined : { host: metricsHost, port: metricsPort },
    onShard: ({ index, count, items }, seconds) =>
      say(
        `shard ${index}: ${plural(items, 'image')}${count < items ? ` (${items - count} failed)` : ''}, ${rateText(count / seconds)} images/s`,
      ),
    onState: say,
  });
  const { url } = worker;
  if (json) process.stdout.write(`${JSON.stringify({ pid: process.pid, metrics: url })}\n`);
  else process.stdout.write(`uniflow worker waits for shards${url ? `; metrics at ${url}/metrics` : ''}\n`);

  const stop = (): void => void worker.close();
  signal.addEventListener('abort', stop);
  if (signal.aborted) stop();
  await worker.ended;
  process.exit(0); // exits with 0, because stopping a worker is not an interruption, as main.ts would report
}
