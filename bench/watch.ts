/** What a long call does to the process around it. */
import { monitorEventLoopDelay } from 'node:perf_hooks';
import type { Figures } from './harness.js';

const RESOLUTION_MS = 1;
const RSS_EVERY_MS = 20;

/** The longest time that the event loop was late, and the highest resident memory seen. */
export function watchProcess(): () => Figures {
  const delays = monitorEventLoopDelay({ resolution: RESOLUTION_MS });
  let peak = process.memoryUsage.rss();
  const sampler = setInterval(() => (peak = Math.max(peak, process.memoryUsage.rss())), RSS_EVERY_MS);
  delays.enable();
  return () => {
    delays.disable();
    clearInterval(sampler);
    // It records the time from tick to tick, which is the resolution where nothing is late.
    return { 'event loop late ms': Math.max(0, delays.max / 1e6 - RESOLUTION_MS), 'RSS MiB': peak / 2 ** 20 };
  };
}
