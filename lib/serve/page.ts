/** The page at `/`: one HTML file that shows in a browser what the service's endpoints answer for an image. */
import type { FastifyInstance } from 'fastify';
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { UniFlowError } from '../errors.js';
import { packageRoot } from '../package.js';

/** In the package's sources, because tsc copies no HTML to `dist/`. */
const FILE = join(packageRoot, 'lib', 'serve', 'page.html');

export async function addPage(app: FastifyInstance): Promise<void> {
  const html = await readFile(FILE, 'utf8');
  const headers = {
    'Cache-Control': 'no-cache', // the service may be upgraded
    'Content-Security-Policy': policyOf(html),
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
  };
  app.get('/', (_, reply) => reply.headers(headers).type('text/html; charset=utf-8').send(html));
}

/** Allows the page its own script and style, `data:` images and requests to this service, and nothing else. */
function policyOf(html: string): string {
  return [
    "default-src 'none'",
    `script-src ${hashOf(html, 'script')}`,
    `style-src ${hashOf(html, 'style')}`,
    'img-src data:',
    "connect-src 'self'",
    ...["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"], // default-src does not include these
    "require-trusted-types-for 'script'",
  ].join('; ');
}

/** The CSP source of the page's only element of this name. */
function hashOf(html: string, element: 'script' | 'style'): string {
  const [found, ...others] = html.matchAll(new RegExp(`<${element}\\b[^>]*>(.*?)</${element}>`, 'gs'));
  if (found === undefined || others.length > 0)
    throw UniFlowError.expected('INTERNAL', FILE, `one <${element}>`, String(found === undefined ? 0 : 1 + others.length));
  return `'sha256-${createHash('sha256')
    .update(found[1] as string)
    .digest('base64')}'`;
}
