/** The tokenizer as an HTTP service. The server is loaded on first use, so importing the library stays cheap. */
import { optional } from '../optional.js';
import type { UniFlow } from '../uniflow.js';
import { settingsOf, type ServeOptions, type Service } from './options.js';

export type { ServeOptions, Service } from './options.js';

/**
 * Serves a model over HTTP: `/v1/encode`, `/v1/decode`, `/v1/reconstruct`. Requests and responses are described at `/openapi.json` and in
 * docs/serve.md. Images of concurrent requests share batches.
 *
 * @throws UniFlowError `BAD_INPUT` for an option, `UNSUPPORTED` if the service's packages are not installed; the system's error if it
 * cannot listen.
 */
export async function serve(uniflow: UniFlow, options: ServeOptions = {}): Promise<Service> {
  const settings = settingsOf(options);
  const { startServer } = await optional('serve', () => import('./server.js'));
  return startServer(uniflow, settings);
}
