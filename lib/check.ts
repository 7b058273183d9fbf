/** Argument checks. All errors have the same form: name, expected, actual. */
import { UniFlowError } from './errors.js';

/** Describes a value in words. */
export function describe(value: unknown): string {
  if (value === null) return 'null';
  if (typeof value === 'string') return `'${value.slice(0, 80)}'`;
  if (typeof value === 'number' || typeof value === 'boolean' || typeof value === 'bigint' || value === undefined) return String(value);
  return typeof value === 'function' ? 'a function' : Object.prototype.toString.call(value).slice(8, -1);
}

/** Option names of encode and of decode; reconstruct accepts both. */
export const ENCODE_OPTIONS = ['size', 'tokens', 'codes', 'hiddenStates', 'batchSize', 'signal'] as const;
export const DECODE_OPTIONS = [
  'grid',
  'steps',
  'schedule',
  'guidance',
  'seed',
  'imageIds',
  'noise',
  'output',
  'batchSize',
  'signal',
] as const;

/** Checks an options object: its signal must be an AbortSignal and its names must be in `known`, to catch misspelt ones. */
export function checkOptions(options: unknown, known?: readonly string[]): void {
  if (typeof options !== 'object' || options === null || Array.isArray(options))
    throw UniFlowError.expected('BAD_INPUT', 'options', 'an object', describe(options));
  const signal = (options as { signal?: unknown }).signal;
  if (signal !== undefined && !(typeof signal === 'object' && signal !== null && 'aborted' in signal && 'addEventListener' in signal))
    throw UniFlowError.expected('BAD_INPUT', 'signal', 'an AbortSignal', describe(signal));
  const unknown = known && Object.keys(options).find((name) => !known.includes(name));
  if (unknown !== undefined) throw UniFlowError.expected('BAD_INPUT', 'options', `only ${[...new Set(known)].join(', ')}`, `'${unknown}'`);
}

export function checkInteger(name: string, value: unknown, min: number, max: number): void {
  if (!Number.isInteger(value) || (value as number) < min || (value as number) > max)
    throw UniFlowError.expected('BAD_INPUT', name, `an integer from ${min} to ${max}`, describe(value));
}

export function checkNumber(name: string, value: unknown, min: number, max: number): void {
  if (typeof value !== 'number' || Number.isNaN(value) || value < min || value > max)
    throw UniFlowError.expected('BAD_INPUT', name, `a number from ${min}${max === Infinity ? ' on' : ` to ${max}`}`, describe(value));
}
