/** Prometheus metrics of the service. */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import { memoryStats } from '../device.js';
import type { Work } from './lanes.js';

const SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30];
const SIZES = [1, 2, 4, 8, 16, 32, 64, 128];

export class Metrics {
  private readonly registry = new Registry();
  private readonly requests = this.counter('uniflow_requests_total', 'Requests answered.', ['route', 'status']);
  private readonly latency = this.histogram('uniflow_request_seconds', 'From the headers to the end of the answer.', ['route'], SECONDS);
  private readonly batches = this.histogram('uniflow_batch_images', 'Images computed together.', ['work'], SIZES);
  private readonly computing = this.histogram('uniflow_batch_seconds', 'From the start of a batch to its end.', ['work'], SECONDS);
  private readonly images = this.counter('uniflow_images_total', 'Images computed.', ['work']);

  /** @param queue returns the number of images in the service. */
  constructor(queue: () => number) {
    this.gauge('uniflow_queue_images', 'Images in the service: read, waiting and computed.', queue);
    this.gauge('uniflow_native_memory_bytes', 'In live tensors, weights included.', () => memoryStats().host.active);
    this.gauge('uniflow_native_pool_bytes', 'Native memory kept for reuse.', () => memoryStats().host.pool);
    this.gauge('process_resident_memory_bytes', 'Resident memory of the process.', () => process.memoryUsage.rss());
  }

  answered(route: string, status: number, seconds: number): void {
    this.requests.inc({ route, status });
    this.latency.observe({ route }, seconds);
  }

  computed(work: Work, images: number, seconds: number): void {
    this.images.inc({ work }, images);
    this.batches.observe({ work }, images);
    this.computing.observe({ work }, seconds);
  }

  get contentType(): string {
    return this.registry.contentType;
  }

  text(): Promise<string> {
    return this.registry.metrics();
  }

  private counter<L extends string>(name: string, help: string, labelNames: L[]): Counter<L> {
    return new Counter({ name, help, labelNames, registers: [this.registry] });
  }

  private histogram<L extends string>(name: string, help: string, labelNames: L[], buckets: number[]): Histogram<L> {
    return new Histogram({ name, help, labelNames, buckets, registers: [this.registry] });
  }

  private gauge(name: string, help: string, read: () => number): Gauge {
    const gauge: Gauge = new Gauge({ name, help, registers: [this.registry], collect: () => gauge.set(read()) });
    return gauge;
  }
}
