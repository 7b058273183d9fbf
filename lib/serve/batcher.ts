/** Groups the work of concurrent requests into batches. */
import { aborted, UniFlowError } from '../errors.js';

/** Work that can share a batch: all items submitted under one key. */
export interface Lane<Item, Result> {
  /** Identifies everything that `run` depends on besides the items. */
  key: string;
  maxBatch: number;
  /** Returns one result per item, in order. */
  run(items: Item[], signal: AbortSignal): Promise<Result[]>;
}

interface Job {
  item: unknown;
  arrived: number;
  signal: AbortSignal;
  settle(outcome: { result: unknown } | { error: Error }): void;
  done: boolean;
}

interface Group {
  lane: Lane<unknown, unknown>;
  jobs: Job[];
}

/** One batch computes while another is queued behind it, so that the device never waits for this thread. */
const IN_FLIGHT = 2;

/** Weight of a new batch in the moving average of the time per item. */
const RECENT = 0.2;

/**
 * A batch starts as soon as the device has room and the batch is full or its first item has waited `maxWait` ms; while the device is busy,
 * batches grow. A job whose signal aborts leaves immediately; a batch is stopped once all of its jobs have left.
 */
export class Batcher {
  private readonly groups = new Map<string, Group>();
  private running = 0;
  private timer: NodeJS.Timeout | undefined;
  private average = 0;

  constructor(
    private readonly maxWait: number,
    private readonly onBatch: (lane: Lane<never, unknown>, items: number, seconds: number) => void = () => undefined,
  ) {}

  /** Moving average. */
  get secondsPerItem(): number {
    return this.average;
  }

  submit<Item, Result>(lane: Lane<Item, Result>, item: Item, signal: AbortSignal): Promise<Result> {
    return new Promise<Result>((resolve, reject) => {
      if (signal.aborted) return reject(aborted(signal));
      const leave = (): void => {
        job.settle({ error: aborted(signal) });
        this.drop(lane.key, job);
      };
      const job: Job = {
        ...{ item, signal, arrived: performance.now(), done: false },
        settle: (outcome) => {
          job.done = true;
          signal.removeEventListener('abort', leave);
          if ('error' in outcome) reject(outcome.error);
          else resolve(outcome.result as Result);
        },
      };
      signal.addEventListener('abort', leave, { once: true });
      const group = this.groups.get(lane.key) ?? { lane, jobs: [] };
      this.groups.set(lane.key, group);
      group.jobs.push(job);
      this.pump();
    });
  }

  /** Removes a waiting job. A job in a running batch is left to {@link run}. */
  private drop(key: string, job: Job): void {
    const group = this.groups.get(key);
    const place = group?.jobs.indexOf(job) ?? -1;
    if (!group || place < 0) return;
    group.jobs.splice(place, 1);
    if (group.jobs.length === 0) this.groups.delete(key);
    this.pump(); // clears the timer if no job needs it
  }

  private pump(): void {
    clearTimeout(this.timer);
    this.timer = undefined;
    while (this.running < IN_FLIGHT) {
      const now = performance.now();
      const [group] = [...this.groups.values()]
        .filter((g) => g.jobs.length >= g.lane.maxBatch || dueOf(g, this.maxWait) <= now)
        .sort((a, b) => arrivalOf(a) - arrivalOf(b));
      if (!group) return this.wait(now);
      void this.start(group);
    }
  }

  /** Sets the timer for the first group that is due. */
  private wait(now: number): void {
    const due = Math.min(...[...this.groups.values()].map((group) => dueOf(group, this.maxWait)));
    if (due < Infinity) this.timer = setTimeout(() => this.pump(), Math.ceil(due - now));
  }

  private async start(group: Group): Promise<void> {
    const { lane } = group;
    const jobs = group.jobs.splice(0, lane.maxBatch);
    if (group.jobs.length === 0) this.groups.delete(lane.key);
    this.running++;
    const started = performance.now();
    await run(lane, jobs);
    const seconds = (performance.now() - started) / 1000;
    this.running--;
    this.average += (this.average === 0 ? 1 : RECENT) * (seconds / jobs.length / IN_FLIGHT - this.average);
    this.onBatch(lane, jobs.length, seconds);
    this.pump();
  }
}

function arrivalOf({ jobs }: Group): number {
  return jobs[0]?.arrived ?? Infinity;
}

function dueOf(group: Group, maxWait: number): number {
  return arrivalOf(group) + maxWait;
}

/** Computes a batch. If it fails, retries each job alone, so that no request fails because of another one. */
async function run(lane: Lane<unknown, unknown>, jobs: readonly Job[]): Promise<void> {
  const items = jobs.map((job) => job.item);
  const controller = new AbortController();
  const left = (): void => {
    if (jobs.every((job) => job.done)) controller.abort();
  };
  for (const { signal } of jobs) signal.addEventListener('abort', left);
  try {
    const results = await lane.run(items, controller.signal);
    if (results.length !== jobs.length) throw new UniFlowError('INTERNAL', `a batch of ${jobs.length} gave ${results.length} results`);
    jobs.forEach((job, i) => job.settle({ result: results[i] }));
  } catch (error) {
    const rest = jobs.filter((job) => !job.done);
    if (jobs.length > 1) for (const job of rest) await run(lane, [job]);
    else for (const job of rest) job.settle({ error: error as Error });
  } finally {
    for (const { signal } of jobs) signal.removeEventListener('abort', left);
  }
}
