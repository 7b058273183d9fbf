/** The service as users see it: its options, their defaults and checks. Nothing heavy is loaded here. */
import { checkInteger, checkOptions, describe } from '../check.js';
import { UniFlowError } from '../errors.js';

/** A service that runs. */
export interface Service {
  /** Where it listens, as `http://127.0.0.1:8080`. */
  readonly url: string;
  /** Accepts no more, finishes what is under way within `drain` milliseconds, and stops. The model stays the caller's. */
  close(): Promise<void>;
}

export interface ServeOptions {
  /** Address to listen on. Default: 127.0.0.1, which only this machine can reach. */
  host?: string;
  /** 0 takes a free one. */
  port?: number;
  /** Clients must send `Authorization: Bearer <token>`, but for /healthz and /readyz. Default: anyone may ask. */
  token?: string;
  /** Pictures computed together. Default: as many as make about 4,096 tokens. */
  maxBatch?: number;
  /** A picture waits at most so long for others to be computed with, while the processor is free. Milliseconds. */
  maxWait?: number;
  /** Pictures in the service, from the body's end to the answer; more are refused with 503. */
  maxQueue?: number;
  /** Requests under way, those included that still send; more are refused with 503. */
  maxRequests?: number;
  /** Pictures per request. */
  maxImages?: number;
  /** Bytes of a request's body, and of what its URLs give. */
  maxBody?: number;
  /** Pixels of a picture, as sent. */
  maxPixels?: number;
  /** Patches of a picture, as computed. */
  maxPatches?: number;
  /** Euler steps. */
  maxSteps?: number;
  /** Milliseconds that a client has for sending a request, the service for computing it, and the client for reading the answer. */
  timeout?: number;
  /** Milliseconds that `close` lets requests under way take. */
  drain?: number;
  /** Hosts, as `example.org` or `example.org:8080`, that pictures may be fetched from. Default: none. */
  allowUrls?: readonly string[];
  /** Hears of errors that are the service's own: status 500. */
  onError?: (error: unknown) => void;
  /** @internal Says which addresses may be connected to; for tests, whose hosts are on this machine. */
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
} satisfies ServeOptions;

export type Settings = ServeOptions & typeof defaults & { allowUrls: readonly string[] };

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

/** @throws UniFlowError `BAD_INPUT` naming the option. */
export function settingsOf(options: ServeOptions): Settings {
  checkOptions(options);
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
  const settings: Settings = { ...defaults, ...given };
  for (const [name, [min, max]] of Object.entries(INTEGERS)) {
    const value = settings[name as keyof ServeOptions];
    if (value !== undefined) checkInteger(name, value, min, max);
  }
  if (settings.maxImages > settings.maxQueue) settings.maxImages = settings.maxQueue; // more could never be let in
  if (settings.token !== undefined && (typeof settings.token !== 'string' || settings.token === ''))
    throw UniFlowError.expected('BAD_INPUT', 'token', 'a string that is not empty', 'another value'); // which is not shown
  if (!Array.isArray(settings.allowUrls) || !settings.allowUrls.every((host) => typeof host === 'string'))
    throw UniFlowError.expected('BAD_INPUT', 'allowUrls', 'an array of host names', describe(settings.allowUrls));
  return settings;
}
