/** Observes the effect of a long call on the surrounding process. */
import { monitorEventLoopDelay } from 'node:perf_hooks';
import type { Figures } from './harness.js';

const RESOLUTION_MS = 1;
const RSS_EVERY_MS = 20;

/** Maximum event loop delay, and peak resident memory. */
export function watchProcess(): () => Figures {
  const delays = monitorEventLoopDelay({ resolution: RESOLUTION_MS });
  let peak = process.memoryUsage.rss();
  const sampler = setInterval(() => (peak = Math.max(peak, process.memoryUsage.rss())), RSS_EVERY_MS);
  delays.enable();
  return () => {
    delays.disable();
    clearInterval(sampler);
    // The monitor records the time between ticks, which equals the resolution if there is no delay.
    return { 'event loop late ms': Math.max(0, delays.max / 1e6 - RESOLUTION_MS), 'RSS MiB': peak / 2 ** 20 };
  };
}
