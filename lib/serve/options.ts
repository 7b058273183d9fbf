/** The service's options, defaults and checks. This module has no heavy imports. */
import { checkInteger, checkOptions, describe } from '../check.js';
import { UniFlowError } from '../errors.js';

/** A running service. */
export interface Service {
  /** Base URL, for example `http://127.0.0.1:8080`. */
  readonly url: string;
  /** Stops accepting requests, finishes active ones within `drain` milliseconds, and stops. The caller keeps ownership of the model. */
  close(): Promise<void>;
}

export interface ServeOptions {
  /** Address to listen on. Default: 127.0.0.1, which only this machine can reach. */
  host?: string;
  /** Port; 0 picks a free one. */
  port?: number;
  /** Clients must send `Authorization: Bearer <token>`, except for /, /healthz and /readyz. Default: no authentication. */
  token?: string;
  /** Maximum number of images per batch. Default: the number that makes about 4,096 tokens, on a GPU 32,000. */
  maxBatch?: number;
  /** Maximum time an image waits for a batch to fill while the device is idle, in milliseconds. */
  maxWait?: number;
  /** Maximum number of images in the service, from the end of the request body to the response; more are refused with 503. */
  maxQueue?: number;
  /** Maximum number of active requests, including those still being received; more are refused with 503. */
  maxRequests?: number;
  /** Maximum number of images per request. */
  maxImages?: number;
  /** Maximum bytes of a request's body, and of the responses of its URLs. */
  maxBody?: number;
  /** Maximum pixels of an image as sent. */
  maxPixels?: number;
  /** Maximum patches of an image as computed. */
  maxPatches?: number;
  /** Maximum number of Euler steps. */
  maxSteps?: number;
  /** Milliseconds for each of: receiving a request, computing it, and sending the response. */
  timeout?: number;
  /** Milliseconds that `close` waits for active requests. */
  drain?: number;
  /** Hosts that images may be fetched from, as `example.org` or `example.org:8080`. Default: none. */
  allowUrls?: readonly string[];
  /** Origins whose web pages may use the service, as `https://example.org`; `*` for all. Default: none. */
  cors?: readonly string[];
  /** Whether `/` answers with a page for browsers, which needs no token to be opened. Default: true. */
  page?: boolean;
  /** Called with internal errors: status 500. */
  onError?: (error: unknown) => void;
  /** @internal Decides which addresses may be connected to; for tests, whose hosts are on this machine. */
  allowAddress?: (address: string) => boolean;
}

export const defaults = {
  host: '127.0.0.1',
  port: 8080,
  maxWait: 5,
  maxQueue: 512,
  maxRequests: 128,
  maxImages: 64,
  maxBody: 32 * 2 ** 20,
  maxPixels: 2 ** 26,
  maxPatches: 4096,
  maxSteps: 100,
  timeout: 60_000,
  drain: 10_000,
  allowUrls: [],
  cors: [],
  page: true,
} satisfies ServeOptions;

export type Settings = ServeOptions & typeof defaults & { allowUrls: readonly string[]; cors: readonly string[] };

const INTEGERS: Partial<Record<keyof ServeOptions, readonly [min: number, max: number]>> = {
  port: [0, 65535],
  maxBatch: [1, 1024],
  maxWait: [0, 60_000],
  maxQueue: [1, 1e6],
  maxRequests: [1, 1e6],
  maxImages: [1, 1e6],
  maxBody: [1, 2 ** 31],
  maxPixels: [1, 2 ** 31],
  maxPatches: [1, 2 ** 20],
  maxSteps: [1, 10_000],
  timeout: [1, 3_600_000],
  drain: [0, 3_600_000],
};

function isOrigin(text: unknown): boolean {
  return text === '*' || (typeof text === 'string' && URL.canParse(text) && new URL(text).origin === text);
}

/** @throws UniFlowError `BAD_INPUT` naming the option. */
export function settingsOf(options: ServeOptions): Settings {
  checkOptions(options);
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
  const settings: Settings = { ...defaults, ...given };
  for (const [name, [min, max]] of Object.entries(INTEGERS)) {
    const value = settings[name as keyof ServeOptions];
    if (value !== undefined) checkInteger(name, value, min, max);
  }
  if (settings.maxImages > settings.maxQueue) settings.maxImages = settings.maxQueue; // larger requests could never be admitted
  if (settings.token !== undefined && (typeof settings.token !== 'string' || settings.token === ''))
    throw UniFlowError.expected('BAD_INPUT', 'token', 'a string that is not empty', 'another value'); // the value is secret
  if (!Array.isArray(settings.allowUrls) || !settings.allowUrls.every((host) => typeof host === 'string'))
    throw UniFlowError.expected('BAD_INPUT', 'allowUrls', 'an array of host names', describe(settings.allowUrls));
  if (!Array.isArray(settings.cors) || !settings.cors.every(isOrigin))
    throw UniFlowError.expected('BAD_INPUT', 'cors', "origins, as 'https://example.org', or '*'", JSON.stringify(settings.cors));
  if (typeof settings.page !== 'boolean') throw UniFlowError.expected('BAD_INPUT', 'page', 'true or false', describe(settings.page));
  return settings;
}
