/** The server around the routes: authentication, limits, timeouts, metrics and shutdown. */
import accepts from '@fastify/accepts';
import multipart from '@fastify/multipart';
import { fastify, type FastifyError, type FastifyInstance, type FastifyRequest } from 'fastify';
import { createHash, timingSafeEqual } from 'node:crypto';
import { STATUS_CODES } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { packageVersion } from '../package.js';
import type { UniFlow } from '../uniflow.js';
import { JSON_TYPE, SAFETENSORS_TYPE } from './answers.js';
import { Batcher } from './batcher.js';
import { idleCloser } from './connections.js';
import { allowOrigins } from './cors.js';
import type { ModelLane } from './lanes.js';
import { Metrics } from './metrics.js';
import { openApi } from './openapi.js';
import type { Service, Settings } from './options.js';
import { whenOver } from './over.js';
import { addPage } from './page.js';
import { busy, PROBLEM, problemOf, Refusal, sendProblem, statusOf } from './problem.js';
import { addRoutes, Traffic } from './routes.js';
import { checkJson } from './schemas.js';

/** Timeout of an idle connection. */
const IDLE_MS = 75_000;
/** Interval at which Node checks for requests that arrive too slowly. */
const MAX_CHECK_INTERVAL_MS = 1000;
/** Time between aborting active requests and cutting their connections. */
const LAST_WORDS_MS = 500;

const METHODS = ['GET', 'HEAD', 'POST'] as const;

const PUBLIC: ReadonlySet<string> = new Set(['/', '/healthz', '/readyz']);

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
  allowOrigins(app, settings.cors, METHODS);
  guard(app, settings, stopping);
  cutSlowReaders(app, settings);
  addRoutes(app, uniflow, settings, traffic, batcher);
  if (settings.page) await addPage(app);
  addStatus(app, settings, metrics, () => !stopping.now && !traffic.full());

  const closeIdle = idleCloser(app.server);
  await app.listen({ host: settings.host, port: settings.port });
  const { address, port, family } = app.server.address() as AddressInfo;
  let closed: Promise<void> | undefined;
  return {
    url: `http://${family === 'IPv6' ? `[${address}]` : address}:${port}`,
    close: () => (closed ??= stop(app, settings, stopping, traffic, closeIdle)),
  };
}

function makeApp({ maxBody, timeout }: Settings): FastifyInstance {
  return fastify({
    bodyLimit: maxBody,
    requestTimeout: timeout, // to receive a complete request
    connectionTimeout: 2 * (timeout + MAX_CHECK_INTERVAL_MS), // without traffic in either direction, which includes clients that do not read
    keepAliveTimeout: IDLE_MS,
    http: { headersTimeout: timeout, connectionsCheckingInterval: Math.min(MAX_CHECK_INTERVAL_MS, timeout) },
    return503OnClosing: false, // guard() handles it with our error format
    clientErrorHandler: refuseMalformed,
    frameworkErrors: (error, _, reply) => void sendProblem(reply, error), // for example a path that cannot be decoded
  });
}

/** Handles malformed HTTP and requests that did not arrive in time. */
function refuseMalformed(error: NodeJS.ErrnoException, socket: Socket): void {
  if (error.code === 'ECONNRESET' || socket.destroyed) return;
  const status = { ERR_HTTP_REQUEST_TIMEOUT: 408, HPE_HEADER_OVERFLOW: 431 }[error.code ?? ''] ?? 400;
  const body = JSON.stringify(problemOf(Refusal.of(status, 'request', 'a complete HTTP request in time', error.message)));
  const head = `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\nConnection: close\r\nContent-Type: ${PROBLEM}`;
  if (socket.writable) socket.write(`${head}\r\nContent-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`);
  socket.destroySoon();
}

function answerErrors(app: FastifyInstance, settings: Settings): void {
  const { onError } = settings;
  app.setErrorHandler((error, request, reply) => {
    if (statusOf(error) === 500) onError?.(error);
    if (!request.raw.complete) request.raw.unpipe().resume(); // resume, because nothing else reads the rest of the body
    return sendProblem(reply, refusalOf(error as FastifyError, request, settings));
  });
  app.setNotFoundHandler((request, reply) => {
    const { method, url } = request;
    const [path = ''] = url.split('?');
    const allowed = METHODS.filter((other) => app.hasRoute({ method: other, url: path })).join(', ');
    if (allowed !== '') return sendProblem(reply, Refusal.of(405, 'method', allowed, method, { Allow: allowed }));
    return sendProblem(reply, Refusal.of(404, 'path', 'one that /openapi.json lists', `${method} ${url.slice(0, 80)}`));
  });
}

/** Converts errors of Fastify and its form parser into refusals that name the accepted input. Other errors pass unchanged. */
function refusalOf(error: FastifyError, { headers, url }: FastifyRequest, { maxBody, maxImages }: Settings): Error {
  const taken = [/decode$/.test(url.split('?')[0] ?? '') ? [] : 'image/*', SAFETENSORS_TYPE, 'multipart/form-data', JSON_TYPE]
    .flat()
    .join(', ');
  const { 'content-type': type = 'none', 'content-length': length = 'more' } = headers;
  switch (error.code) {
    case 'FST_ERR_CTP_INVALID_MEDIA_TYPE':
      return Refusal.of(415, 'Content-Type', taken, type === 'none' ? type : `'${type.slice(0, 80)}'`, { 'Accept-Post': taken });
    case 'FST_ERR_CTP_BODY_TOO_LARGE':
    case 'FST_REQ_FILE_TOO_LARGE':
      return Refusal.of(413, 'body', `at most ${maxBody} bytes`, Number(length) > maxBody ? length : 'more');
    case 'FST_FILES_LIMIT':
      return Refusal.of(413, 'body', `at most ${maxImages} files`, 'more');
    case 'FST_FIELDS_LIMIT':
      return Refusal.of(413, 'body', "files, and one field 'options'", 'more fields');
    default:
      return error;
  }
}

function observe(app: FastifyInstance, metrics: Metrics): void {
  app.addHook('onRequest', async (request, reply) => {
    const started = performance.now();
    whenOver(reply, () => {
      const status = reply.raw.writableFinished ? reply.statusCode : 499; // nginx's status for clients that disconnected
      metrics.answered(request.routeOptions.url ?? 'unknown', status, (performance.now() - started) / 1000);
    });
  });
}

/** Checks the token and the capacity before a body is read. */
function guard(app: FastifyInstance, { token, maxRequests }: Settings, stopping: { now: boolean }): void {
  let requests = 0;
  app.addHook('onRequest', async (request, reply) => {
    const { url = '' } = request.routeOptions; // the route's own path, because clients can spell it in several ways
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

/** Disconnects clients that do not read their response, because it holds memory and a slot. */
function cutSlowReaders(app: FastifyInstance, { timeout }: Settings): void {
  app.addHook('onSend', async (request, reply) => {
    const timer = setTimeout(() => request.raw.socket.destroy(), timeout);
    whenOver(reply, () => clearTimeout(timer));
  });
}

/** Compares in constant time, so that timing reveals nothing about the token. */
function hasToken(request: FastifyRequest, token: string): boolean {
  const digest = (text: string): Buffer => createHash('sha256').update(text).digest();
  const [, given = ''] = /^Bearer +(.+)$/i.exec(request.headers.authorization ?? '') ?? [];
  return timingSafeEqual(digest(given), digest(token));
}

function addStatus(app: FastifyInstance, settings: Settings, metrics: Metrics, ready: () => boolean): void {
  const document = openApi(settings, packageVersion);
  app.get('/openapi.json', () => document);
  app.get('/metrics', async (_, reply) => reply.type(metrics.contentType).send(await metrics.text()));
  app.get('/healthz', (_, reply) => reply.type('text/plain').send('ok\n'));
  app.get('/readyz', (_, reply) => {
    if (!ready()) throw busy('the service is full, or stops', 1);
    return reply.type('text/plain').send('ok\n');
  });
}

/** Closes idle connections at once and waits for active requests; after `drain`, ends them with 503 and cuts the remaining connections. */
async function stop(
  app: FastifyInstance,
  { drain }: Settings,
  stopping: { now: boolean },
  traffic: Traffic,
  closeIdle: () => void,
): Promise<void> {
  stopping.now = true;
  closeIdle();
  const end = setTimeout(() => traffic.abort(), drain);
  const cut = setTimeout(() => app.server.closeAllConnections(), drain + LAST_WORDS_MS);
  try {
    await app.close();
  } finally {
    clearTimeout(end);
    clearTimeout(cut);
  }
}
