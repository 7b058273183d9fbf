/** `uniflow serve`: runs the HTTP service until it is stopped. */
import { once } from 'node:events';
import { optional } from '../optional.js';
import { serve, type ServeOptions } from '../serve/index.js';
import type { ModelOptions } from './options.js';
import { loadModel } from './shared.js';

type Same =
  | 'host'
  | 'port'
  | 'token'
  | 'maxBatch'
  | 'maxWait'
  | 'maxQueue'
  | 'maxRequests'
  | 'maxImages'
  | 'maxPixels'
  | 'maxPatches'
  | 'maxSteps'
  | 'page';

export interface ServeCommandOptions extends ModelOptions, Pick<ServeOptions, Same> {
  /** MiB */
  maxBody?: number;
  /** Seconds. */
  timeout?: number;
  drain?: number;
  allowUrl?: string[];
  cors?: string[];
}

export async function serveCommand(options: ServeCommandOptions, signal: AbortSignal): Promise<void> {
  await optional('serve', () => import('../serve/server.js')); // reports missing packages before a model is loaded
  const uniflow = await loadModel(options, signal);
  const times = (value: number | undefined, factor: number): number | undefined => (value === undefined ? undefined : value * factor);
  const service = await serve(uniflow, {
    ...options,
    maxBody: times(options.maxBody, 2 ** 20),
    timeout: times(options.timeout, 1000),
    drain: times(options.drain, 1000),
    allowUrls: options.allowUrl,
    onError: (error) => process.stderr.write(`uniflow: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`),
  });
  if (options.token === undefined && !/^http:\/\/(127\.|\[::1\])/.test(service.url))
    process.stderr.write('uniflow: other machines can reach this service, and it asks for no --token\n');
  process.stdout.write(options.json ? `${JSON.stringify({ url: service.url, pid: process.pid })}\n` : `uniflow serves at ${service.url}\n`);

  if (!signal.aborted) await once(signal, 'abort');
  await service.close();
  await uniflow.dispose();
  process.exit(0); // exits with 0, because stopping a service is not an interruption, as main.ts would report
}
