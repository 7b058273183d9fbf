/** The server around the routes: who may ask, how much, for how long; what it tells of itself; how it stops. */
import accepts from '@fastify/accepts';
import multipart from '@fastify/multipart';
import { fastify, type FastifyInstance, type FastifyRequest } from 'fastify';
import { createHash, timingSafeEqual } from 'node:crypto';
import { STATUS_CODES } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { packageVersion } from '../package.js';
import type { UniFlow } from '../uniflow.js';
import { JSON_TYPE, SAFETENSORS_TYPE } from './answers.js';
import { Batcher } from './batcher.js';
import type { ModelLane } from './lanes.js';
import { Metrics } from './metrics.js';
import { openApi } from './openapi.js';
import type { Service, Settings } from './options.js';
import { whenOver } from './over.js';
import { busy, PROBLEM, problemOf, Refusal, sendProblem, statusOf } from './problem.js';
import { addRoutes, Traffic } from './routes.js';
import { checkJson } from './schemas.js';

/** Of a connection without a request on it. */
const IDLE_MS = 75_000;
/** How often Node looks for requests that take too long to arrive. */
const MAX_CHECK_INTERVAL_MS = 1000;
/** From telling what is under way to end until its connections are cut. */
const LAST_WORDS_MS = 500;

const METHODS = ['GET', 'HEAD', 'POST'] as const;

const PUBLIC: ReadonlySet<string> = new Set(['/healthz', '/readyz']);

export async function startServer(uniflow: UniFlow, settings: Settings): Promise<Service> {
  const metrics = new Metrics(() => traffic.images);
  const batcher = new Batcher(settings.maxWait, (lane, images, seconds) =>
    metrics.computed((lane as ModelLane<never, unknown>).work, images, seconds),
  );
  const traffic = new Traffic(settings, batcher);
  const stopping = { now: false };
  const app = makeApp(settings);
  await app.register(accepts);
  await app.register(multipart, { throwFileSizeLimit: true });
  app.removeContentTypeParser('text/plain');
  const parseJson = app.getDefaultJsonParser('error', 'error');
  app.addContentTypeParser(JSON_TYPE, { parseAs: 'string' }, (request, body, done) => {
    checkJson(body as string, 'body');
    return parseJson(request, body as string, done);
  });
  for (const type of [/^image\//, SAFETENSORS_TYPE])
    app.addContentTypeParser(type, { parseAs: 'buffer' }, (_, body, done) => done(null, body));
  answerErrors(app, settings);
  observe(app, metrics);
  guard(app, settings, stopping);
  cutSlowReaders(app, settings);
  addRoutes(app, uniflow, settings, traffic, batcher);
  addPages(app, settings, metrics, () => !stopping.now && !traffic.full());

  await app.listen({ host: settings.host, port: settings.port });
  const { address, port, family } = app.server.address() as AddressInfo;
  let closed: Promise<void> | undefined;
  return {
    url: `http://${family === 'IPv6' ? `[${address}]` : address}:${port}`,
    close: () => (closed ??= stop(app, settings, stopping, traffic)),
  };
}

function makeApp({ maxBody, timeout }: Settings): FastifyInstance {
  return fastify({
    bodyLimit: maxBody,
    requestTimeout: timeout, // to send all of a request
    connectionTimeout: 2 * (timeout + MAX_CHECK_INTERVAL_MS), // without a byte in either direction: also who does not read the answer
    keepAliveTimeout: IDLE_MS,
    http: { headersTimeout: timeout, connectionsCheckingInterval: Math.min(MAX_CHECK_INTERVAL_MS, timeout) },
    return503OnClosing: false, // guard() does, in our form
    clientErrorHandler: refuseMalformed,
    frameworkErrors: (error, _, reply) => void sendProblem(reply, error), // a path that cannot be decoded
  });
}

/** What is not HTTP, or did not arrive in time. */
function refuseMalformed(error: NodeJS.ErrnoException, socket: Socket): void {
  if (error.code === 'ECONNRESET' || socket.destroyed) return;
  const status = { ERR_HTTP_REQUEST_TIMEOUT: 408, HPE_HEADER_OVERFLOW: 431 }[error.code ?? ''] ?? 400;
  const body = JSON.stringify(problemOf(Refusal.of(status, 'request', 'a complete HTTP request in time', error.message)));
  const head = `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\nConnection: close\r\nContent-Type: ${PROBLEM}`;
  if (socket.writable) socket.write(`${head}\r\nContent-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`);
  socket.destroySoon();
}

function answerErrors(app: FastifyInstance, { onError }: Settings): void {
  app.setErrorHandler((error, request, reply) => {
    if (statusOf(error) === 500) onError?.(error);
    if (!request.raw.complete) request.raw.unpipe().resume(); // the rest of the body has no reader any more
    return sendProblem(reply, error);
  });
  app.setNotFoundHandler((request, reply) => {
    const { method, url } = request;
    const [path = ''] = url.split('?');
    const allowed = METHODS.filter((other) => app.hasRoute({ method: other, url: path })).join(', ');
    if (allowed !== '') return sendProblem(reply, Refusal.of(405, 'method', allowed, method, { Allow: allowed }));
    return sendProblem(reply, Refusal.of(404, 'path', 'one that /openapi.json lists', `${method} ${url.slice(0, 80)}`));
  });
}

function observe(app: FastifyInstance, metrics: Metrics): void {
  app.addHook('onRequest', async (request, reply) => {
    const started = performance.now();
    whenOver(reply, () => {
      const status = reply.raw.writableFinished ? reply.statusCode : 499; // as nginx counts clients that left
      metrics.answered(request.routeOptions.url ?? 'unknown', status, (performance.now() - started) / 1000);
    });
  });
}

/** Before a body is read: the token, then whether there is room for it. */
function guard(app: FastifyInstance, { token, maxRequests }: Settings, stopping: { now: boolean }): void {
  let requests = 0;
  app.addHook('onRequest', async (request, reply) => {
    const { url = '' } = request.routeOptions; // the path as we write it; clients can in several ways
    if (PUBLIC.has(url)) return;
    if (token !== undefined && !hasToken(request, token)) {
      const challenge = { 'WWW-Authenticate': 'Bearer' };
      throw Refusal.of(401, 'Authorization', "'Bearer' and the service's token", 'none, or another one', challenge);
    }
    if (!url.startsWith('/v1/')) return;
    const { 'content-encoding': encoding = 'identity' } = request.headers;
    if (encoding !== 'identity')
      throw Refusal.of(415, 'Content-Encoding', 'a body that is not compressed', `'${encoding}'`, { 'Accept-Encoding': 'identity' });
    if (stopping.now) throw busy('the service stops', 1);
    if (requests >= maxRequests) throw busy(`${requests} requests are under way`, 1);
    requests++;
    whenOver(reply, () => requests--);
  });
  app.addHook('onSend', async (_, reply) => {
    if (stopping.now) reply.header('Connection', 'close');
  });
}

/** An answer that is not read takes a place, and memory, as long as its connection is there. */
function cutSlowReaders(app: FastifyInstance, { timeout }: Settings): void {
  app.addHook('onSend', async (request, reply) => {
    const timer = setTimeout(() => request.raw.socket.destroy(), timeout);
    whenOver(reply, () => clearTimeout(timer));
  });
}

/** In a time that does not depend on how much of the token is right. */
function hasToken(request: FastifyRequest, token: string): boolean {
  const digest = (text: string): Buffer => createHash('sha256').update(text).digest();
  const [, given = ''] = /^Bearer +(.+)$/i.exec(request.headers.authorization ?? '') ?? [];
  return timingSafeEqual(digest(given), digest(token));
}

function addPages(app: FastifyInstance, settings: Settings, metrics: Metrics, ready: () => boolean): void {
  const document = openApi(settings, packageVersion);
  app.get('/openapi.json', () => document);
  app.get('/metrics', async (_, reply) => reply.type(metrics.contentType).send(await metrics.text()));
  app.get('/healthz', (_, reply) => reply.type('text/plain').send('ok\n'));
  app.get('/readyz', (_, reply) => {
    if (!ready()) throw busy('the service is full, or stops', 1);
    return reply.type('text/plain').send('ok\n');
  });
}

/** Waits for what is under way; past the bound, ends it with 503 and cuts what is still connected. */
async function stop(app: FastifyInstance, { drain }: Settings, stopping: { now: boolean }, traffic: Traffic): Promise<void> {
  stopping.now = true;
  const end = setTimeout(() => traffic.abort(), drain);
  const cut = setTimeout(() => app.server.closeAllConnections(), drain + LAST_WORDS_MS);
  try {
    await app.close();
  } finally {
    clearTimeout(end);
    clearTimeout(cut);
  }
}
