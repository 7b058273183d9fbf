/** Downloads images over HTTP, with retries and limits of size and time. */
import pRetry, { AbortError } from 'p-retry';
import { setTimeout as sleep } from 'node:timers/promises';
import { throwIfAborted, UniFlowError } from '../errors.js';

/** Options for downloading images. */
export interface DownloadOptions {
  /** Number of retries after a transient failure: no connection, a timeout, HTTP 408, 425, 429 or 5xx. Default 5. */
  retries?: number;
  /** Milliseconds before the first retry, doubled for each further one. A longer Retry-After takes precedence. Default 500. */
  backoff?: number;
  /** Timeout of one attempt in milliseconds. Default 30,000. */
  timeout?: number;
  /** Maximum size of an image. Default 64 MiB. */
  maxBytes?: number;
  signal?: AbortSignal | undefined;
}

/** Whether a text is a URL to download. */
export function isRemote(text: string): boolean {
  return /^https?:\/\//i.test(text);
}

const MAX_BACKOFF = 30_000;
const PASSING = new Set([408, 425, 429]);

/** @throws {UniFlowError} `NETWORK` with the URL and the reason; `ABORTED`. */
export async function download(url: string, options: DownloadOptions = {}): Promise<Buffer> {
  const { retries = 5, backoff = 500, timeout = 30_000, maxBytes = 64 * 2 ** 20, signal } = options;
  const attempt = async (): Promise<Buffer> => {
    try {
      const limit = AbortSignal.timeout(timeout);
      const response = await fetch(url, { signal: signal ? AbortSignal.any([signal, limit]) : limit });
      if (!response.ok) throw await refusalOf(response, signal);
      return await bodyOf(response, maxBytes);
    } catch (error) {
      throw error instanceof AbortError ? error : new Error(whyOf(error as Error), { cause: error });
    }
  };
  const refused = (error: Error): UniFlowError => {
    return new UniFlowError('NETWORK', `${url}: cannot be downloaded: ${error.message}`, { subject: url, cause: error });
  };
  if (!URL.canParse(url) || !/^https?:/i.test(url)) throw refused(new Error('expected an http or https URL'));
  try {
    return await pRetry(attempt, { retries, minTimeout: backoff, maxTimeout: MAX_BACKOFF, randomize: true, ...(signal ? { signal } : {}) });
  } catch (error) {
    throwIfAborted(signal);
    throw refused(error as Error);
  }
}

/** fetch gives the reason of a failure only in `cause`. */
function whyOf({ message, cause }: Error): string {
  return cause ? `${message}: ${(cause as Error).message}` : message;
}

/** The error for an HTTP status: final, or retryable after the delay that the server requested. */
async function refusalOf(response: Response, signal: AbortSignal | undefined): Promise<Error> {
  await response.body?.cancel();
  const error = new Error(`HTTP ${response.status} ${response.statusText}`.trimEnd());
  if (response.status < 500 && !PASSING.has(response.status)) return new AbortError(error);
  const after = response.headers.get('retry-after') ?? '';
  const wait = /^\d/.test(after) ? 1000 * Number(after) : Date.parse(after) - Date.now(); // the standard allows seconds or a date
  if (wait > 0) await sleep(Math.min(wait, MAX_BACKOFF), undefined, { signal });
  return error;
}

async function bodyOf(response: Response, maxBytes: number): Promise<Buffer> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  const refuse = (bytes: number): void => {
    if (bytes > maxBytes) throw new AbortError(`more than ${maxBytes} bytes`);
  };
  refuse(Number(response.headers.get('content-length')));
  for await (const chunk of (response.body ?? []) as AsyncIterable<Uint8Array>) {
    refuse((size += chunk.length));
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}
