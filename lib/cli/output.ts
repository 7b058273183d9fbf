/** Formats the output of the commands. */
import type { Failure } from './inputs.js';

/** For example ` (2 failed)`. */
export function failures(failed: readonly Failure[]): string {
  return failed.length > 0 ? ` (${failed.length} failed)` : '';
}

export function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? '' : 's'}`;
}

/** A rate per second with three significant digits. */
export function rateText(perSecond: number): string {
  return perSecond < 100 ? perSecond.toPrecision(3) : String(Math.round(perSecond));
}

export function printJson(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value, null, 2)}\n`);
}
