/** Cross-origin requests: which web pages may use the service (the CORS protocol of the Fetch standard). */
import type { FastifyInstance } from 'fastify';

const HOUR = 3600;

/** @param origins as `https://example.org`, or `*` for all. Without any, browsers block pages of all other origins. */
export function allowOrigins(app: FastifyInstance, origins: readonly string[], methods: readonly string[]): void {
  if (origins.length === 0) return;
  const any = origins.includes('*');
  app.addHook('onRequest', async (request, reply) => {
    const { origin, 'access-control-request-method': wanted, 'access-control-request-headers': headers } = request.headers;
    if (!any) reply.header('Vary', 'Origin');
    if (origin === undefined || !(any || origins.includes(origin))) return undefined;
    reply.header('Access-Control-Allow-Origin', any ? '*' : origin);
    reply.header('Access-Control-Expose-Headers', 'Retry-After');
    if (request.method !== 'OPTIONS' || wanted === undefined) return undefined;
    // a preflight request, which never carries a token
    reply.header('Access-Control-Allow-Methods', methods.join(', '));
    if (headers !== undefined) reply.header('Access-Control-Allow-Headers', headers);
    return reply.header('Access-Control-Max-Age', HOUR).code(204).send();
  });
}
