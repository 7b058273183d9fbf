/** The kind of an error. Stable: compare against it. */
export type ErrorCode =
  'BAD_INPUT' | 'BAD_CHECKPOINT' | 'UNSUPPORTED' | 'OUT_OF_MEMORY' | 'ABORTED' | 'DISPOSED' | 'NOT_FOUND' | 'NETWORK' | 'INTERNAL';

export interface ErrorDetails {
  /** The checked thing: an argument, a file, a tensor of a checkpoint. */
  subject?: string | undefined;
  expected?: string | undefined;
  actual?: string | undefined;
  /** The native operation that failed. */
  op?: string | undefined;
  cause?: unknown;
}

/** Every error thrown by this library, and every rejection. */
export class UniFlowError extends Error {
  override readonly name = 'UniFlowError';
  readonly subject: string | undefined;
  readonly expected: string | undefined;
  readonly actual: string | undefined;
  readonly op: string | undefined;

  constructor(
    readonly code: ErrorCode,
    message: string,
    details: ErrorDetails = {},
  ) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.subject = details.subject;
    this.expected = details.expected;
    this.actual = details.actual;
    this.op = details.op;
  }

  /** `subject: expected E, but got A`. */
  static expected(code: ErrorCode, subject: string, expected: string, actual: string, cause?: unknown): UniFlowError {
    return new UniFlowError(code, `${subject}: expected ${expected}, but got ${actual}`, { subject, expected, actual, cause });
  }
}

/** Throws the signal's reason as an `ABORTED` error if it has fired. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw aborted(signal);
}

/** The error of work aborted by `signal`. */
export function aborted(signal: AbortSignal): UniFlowError {
  return new UniFlowError('ABORTED', 'the work was aborted', { cause: signal.reason });
}

/** The reason of a failure without the leading name, for callers that already print the name. */
export function reasonOf(error: unknown, name: string): string {
  const message = error instanceof Error ? error.message : String(error);
  return message.startsWith(`${name}: `) ? message.slice(name.length + 2) : message;
}
