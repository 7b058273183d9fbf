/** Prometheus metrics and health of a worker. */
import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { Utilisation } from '../shards/meter.js';
import type { ShardRecord } from '../shards/shard.js';
import { memoryStats } from '../device.js';

/** Result of a job: the shard was encoded, it was already committed, or the attempt failed. */
export type Outcome = 'made' | 'there' | 'failed';

const SECONDS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000];

export class Metrics {
  private readonly registry = new Registry();
  private readonly shards = this.counter('uniflow_worker_shards_total', 'Jobs, by what became of them.', ['outcome']);
  private readonly images = this.counter('uniflow_worker_images_total', 'Pictures computed.');
  private readonly unreadable = this.counter('uniflow_worker_unreadable_total', 'Pictures of shards made that could not be read.');
  private readonly seconds = new Histogram({
    name: 'uniflow_worker_shard_seconds',
    help: 'From the start of a shard to its commit.',
    buckets: SECONDS,
    registers: [this.registry],
  });

  /**
   * @param active returns the number of shards in progress
   * @param utilisation returns the utilisation of the most recently opened run
   */
  constructor(active: () => number, utilisation: () => Utilisation | undefined) {
    this.gauge('uniflow_worker_shards_active', 'Shards under way.', active);
    this.gauge('uniflow_native_memory_bytes', 'In live tensors, weights included.', () => memoryStats().host.active);
    this.gauge('process_resident_memory_bytes', 'Resident memory of the process.', () => process.memoryUsage.rss());
    const stages: Gauge<'stage'> = new Gauge({
      name: 'uniflow_worker_stage_utilisation',
      help: 'Share of the time since the last reading in which a stage was busy.',
      labelNames: ['stage'],
      registers: [this.registry],
      collect: () => Object.entries(utilisation() ?? {}).forEach(([stage, share]: [string, number]) => stages.set({ stage }, share)),
    });
    for (const outcome of ['made', 'there', 'failed']) this.shards.inc({ outcome }, 0);
  }

  computed(images: number): void {
    this.images.inc(images);
  }

  ended(outcome: Outcome): void {
    this.shards.inc({ outcome });
  }

  made({ failures }: ShardRecord, seconds: number): void {
    this.ended('made');
    this.unreadable.inc(failures.length);
    this.seconds.observe(seconds);
  }

  /** Serves /metrics and /healthz, which answers 503 if the worker is unhealthy. @throws the system's error if it cannot listen. */
  async serve(host: string, port: number, healthy: () => boolean): Promise<Server> {
    const server = createServer((request, response) => {
      const path = request.url?.split('?')[0];
      const text = (status: number, body: string, type = 'text/plain'): unknown =>
        response.writeHead(status, { 'content-type': type }).end(body);
      if (path === '/healthz') text(healthy() ? 200 : 503, healthy() ? 'ok\n' : 'not connected to Redis, or stopping\n');
      else if (path === '/metrics') void this.registry.metrics().then((body) => text(200, body, this.registry.contentType));
      else text(404, 'there are /metrics and /healthz\n');
    }).listen(port, host);
    await once(server, 'listening');
    return server.unref();
  }

  private counter<L extends string>(name: string, help: string, labelNames: L[] = []): Counter<L> {
    return new Counter({ name, help, labelNames, registers: [this.registry] });
  }

  private gauge(name: string, help: string, read: () => number): void {
    const gauge: Gauge = new Gauge({ name, help, registers: [this.registry], collect: () => gauge.set(read()) });
  }
}

export function urlOf(server: Server): string {
  const { address, family, port } = server.address() as AddressInfo;
  return `http://${family === 'IPv6' ? `[${address}]` : address}:${port}`;
}
