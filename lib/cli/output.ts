/** What the commands print. */
import type { Failure } from './inputs.js';

/** ` (2 failed)` */
export function failures(failed: readonly Failure[]): string {
  return failed.length > 0 ? ` (${failed.length} failed)` : '';
}

export function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? '' : 's'}`;
}

/** How many a second, with three digits that say something. */
export function rateText(perSecond: number): string {
  return perSecond < 100 ? perSecond.toPrecision(3) : String(Math.round(perSecond));
}

export function printJson(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value, null, 2)}\n`);
}
