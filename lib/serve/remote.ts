/** Fetches images by URL, only from listed hosts and only from public addresses. */
import ipaddr from 'ipaddr.js';
import { lookup as resolve } from 'node:dns';
import { once } from 'node:events';
import http, { type IncomingMessage } from 'node:http';
import https from 'node:https';
import { isIP, type LookupFunction } from 'node:net';
import { throwIfAborted, UniFlowError } from '../errors.js';

const MAX_REDIRECTS = 3;
const TIMEOUT_MS = 10_000;

export interface RemoteOptions {
  /** As in `URL.host`: with the port unless it is the scheme's default. */
  hosts: readonly string[];
  maxBytes: number;
  allowAddress?: ((address: string) => boolean) | undefined;
}

/** Whether an address is on the public internet. IPv6 addresses that embed an IPv4 address, other than mapped ones, are not. */
export function isPublic(address: string): boolean {
  const ip = ipaddr.process(address); // treats IPv4-mapped IPv6 as IPv4
  if (ip.range() !== 'unicast') return false;
  return ip.kind() === 'ipv4' || (ip as ipaddr.IPv6).match(ipaddr.IPv6.parse('2000::'), 3);
}

/** Number of bytes that may still be fetched. */
export interface Budget {
  left: number;
}

export class Remote {
  private readonly hosts: ReadonlySet<string>;
  private readonly allowed: (address: string) => boolean;

  constructor(private readonly options: RemoteOptions) {
    this.hosts = new Set(options.hosts.map(hostOf));
    this.allowed = options.allowAddress ?? isPublic;
  }

  /**
   * Fetches the bytes at `url`. Checks host and address again at every redirect.
   * @param budget shared by all URLs of a request
   * @throws UniFlowError naming `subject`.
   */
  async fetch(url: string, subject: string, budget: Budget, signal: AbortSignal): Promise<Uint8Array> {
    const until = AbortSignal.any([signal, AbortSignal.timeout(TIMEOUT_MS)]);
    try {
      let target = this.check(url, subject);
      for (let hop = 0; hop <= MAX_REDIRECTS; hop++) {
        const response = await this.get(target, subject, until);
        const { statusCode = 0, headers } = response;
        if (statusCode === 200) return await this.read(response, subject, budget);
        response.destroy();
        if (statusCode < 300 || statusCode >= 400 || headers.location === undefined)
          throw UniFlowError.expected('NETWORK', subject, 'status 200', String(statusCode));
        target = this.check(headers.location, subject, target.href);
      }
      throw UniFlowError.expected('NETWORK', subject, `at most ${MAX_REDIRECTS} redirects`, 'more');
    } catch (error) {
      throwIfAborted(signal);
      if (error instanceof UniFlowError) throw error;
      throw new UniFlowError('NETWORK', `${subject}: the URL cannot be fetched: ${(error as Error).message}`, { subject, cause: error });
    }
  }

  private check(text: string, subject: string, base?: string): URL {
    const url = URL.canParse(text, base) ? new URL(text, base) : undefined;
    if (!url || !['http:', 'https:'].includes(url.protocol) || url.username !== '' || url.password !== '')
      throw UniFlowError.expected('BAD_INPUT', subject, 'an http or https URL', `'${text.slice(0, 80)}'`);
    if (!this.hosts.has(url.host)) throw UniFlowError.expected('UNSUPPORTED', subject, 'a URL of a host that is allowed here', url.host);
    const literal = url.hostname.replace(/^\[|\]$/g, '');
    if (isIP(literal) !== 0) this.checkAddress(literal, subject); // a literal address is connected to without a lookup
    return url;
  }

  private checkAddress(address: string, subject: string): void {
    if (!this.allowed(address)) throw UniFlowError.expected('UNSUPPORTED', subject, 'a host with a public address', address);
  }

  private async get(url: URL, subject: string, signal: AbortSignal): Promise<IncomingMessage> {
    const { get } = url.protocol === 'https:' ? https : http;
    const headers = { 'Accept-Encoding': 'identity' };
    // no agent: a reused connection would bypass the address check
    const request = get(url, { agent: false, lookup: this.lookup(subject), signal, headers });
    const [response] = (await once(request, 'response')) as [IncomingMessage];
    request.on('error', () => undefined); // the response reports it as well
    return response;
  }

  /** Checks the same addresses that the socket connects to, so that a DNS change between check and connection has no effect. */
  private lookup(subject: string): LookupFunction {
    return (hostname, options, callback) => {
      resolve(hostname, { ...options, all: true }, (error, addresses) => {
        if (error) return callback(error, []);
        try {
          for (const { address } of addresses) this.checkAddress(address, subject);
        } catch (refused) {
          return callback(refused as Error, []);
        }
        if (options.all) return callback(null, addresses);
        const [first] = addresses as [(typeof addresses)[number]];
        callback(null, first.address, first.family);
      });
    };
  }

  private async read(response: IncomingMessage, subject: string, budget: Budget): Promise<Uint8Array> {
    const chunks: Buffer[] = [];
    for await (const chunk of response as AsyncIterable<Buffer>) {
      chunks.push(chunk);
      budget.left -= chunk.length;
      if (budget.left < 0)
        // leaving the loop closes the connection
        throw UniFlowError.expected('BAD_INPUT', subject, `at most ${this.options.maxBytes} bytes in all`, 'more');
    }
    return Buffer.concat(chunks);
  }
}

function hostOf(host: string): string {
  const url = `http://${host}`;
  if (URL.canParse(url) && new URL(url).pathname === '/' && !/[/?#@]/.test(host)) return new URL(url).host;
  throw UniFlowError.expected('BAD_INPUT', 'allowUrls', 'a host, as example.org or example.org:8080', `'${host}'`);
}
