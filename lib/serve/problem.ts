/** Error responses: RFC 9457 problem details. */
import type { FastifyReply } from 'fastify';
import { STATUS_CODES } from 'node:http';
import { UniFlowError, type ErrorCode } from '../errors.js';

export const PROBLEM = 'application/problem+json';

/** An error with its own HTTP status. */
export class Refusal extends UniFlowError {
  constructor(
    readonly status: number,
    cause: UniFlowError,
    readonly headers: Readonly<Record<string, string>> = {},
  ) {
    super(cause.code, cause.message, cause);
  }

  static of(status: number, subject: string, expected: string, actual: string, headers: Refusal['headers'] = {}): Refusal {
    return new Refusal(status, UniFlowError.expected('BAD_INPUT', subject, expected, actual), headers);
  }
}

/** Refuses a valid request for lack of capacity. */
export function busy(message: string, seconds: number): Refusal {
  const retryAfter = String(Math.min(60, Math.max(1, Math.ceil(seconds))));
  return new Refusal(503, new UniFlowError('ABORTED', message), { 'Retry-After': retryAfter });
}

/** Several errors of one request. */
export class Refusals extends Refusal {
  constructor(readonly errors: readonly UniFlowError[]) {
    const first = errors[0] as UniFlowError;
    super(Math.max(...errors.map(statusOf)), first);
  }
}

const STATUS: Record<ErrorCode, number> = {
  BAD_INPUT: 422,
  UNSUPPORTED: 422,
  NOT_FOUND: 422,
  NETWORK: 502,
  OUT_OF_MEMORY: 503,
  ABORTED: 503,
  DISPOSED: 503,
  BAD_CHECKPOINT: 500,
  INTERNAL: 500,
};

export function statusOf(error: unknown): number {
  if (error instanceof Refusal) return error.status;
  if (error instanceof UniFlowError) return STATUS[error.code];
  const { statusCode } = error as { statusCode?: unknown }; // an error of Fastify
  return typeof statusCode === 'number' && statusCode >= 400 && statusCode < 500 ? statusCode : 500;
}

export interface Problem {
  type: 'about:blank';
  title: string;
  status: number;
  detail: string;
  code: ErrorCode;
  subject?: string | undefined;
  expected?: string | undefined;
  actual?: string | undefined;
  errors?: Pick<Problem, 'detail' | 'code' | 'subject' | 'expected' | 'actual'>[];
}

/** The error as reported to the client. Internal errors are reported without details. */
export function problemOf(error: unknown): Problem {
  const status = statusOf(error);
  const common = { type: 'about:blank', title: STATUS_CODES[status] ?? 'Error', status } as const;
  if (status === 500) return { ...common, detail: 'the service failed; its operator can see why', code: 'INTERNAL' };
  if (!(error instanceof UniFlowError)) return { ...common, detail: (error as Error).message, code: 'BAD_INPUT' };
  const errors = error instanceof Refusals && error.errors.length > 1 ? { errors: error.errors.map(details) } : {};
  return { ...common, ...details(error), ...errors };
}

function details({
  message,
  code,
  subject,
  expected,
  actual,
}: UniFlowError): Pick<Problem, 'detail' | 'code' | 'subject' | 'expected' | 'actual'> {
  return { detail: message, code, subject, expected, actual };
}

export function sendProblem(reply: FastifyReply, error: unknown): FastifyReply {
  const status = statusOf(error);
  if (status === 503) reply.header('Retry-After', '1'); // the error of busy() overrides this
  if (error instanceof Refusal) reply.headers(error.headers);
  return reply.code(status).type(PROBLEM).send(problemOf(error));
}
