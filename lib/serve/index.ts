/** The tokenizer as an HTTP service. The server is loaded when the first one is started: importing the library stays light. */
import { optional } from '../optional.js';
import type { UniFlow } from '../uniflow.js';
import { settingsOf, type ServeOptions, type Service } from './options.js';

export type { ServeOptions, Service } from './options.js';

/**
 * Serves a model over HTTP: `/v1/encode`, `/v1/decode`, `/v1/reconstruct`; what they take and give is at `/openapi.json` and in docs/serve.md.
 * Pictures of requests that come together are computed together.
 *
 * @throws UniFlowError `BAD_INPUT` for an option, `UNSUPPORTED` where the service's packages are not installed; the system's error where it
 * cannot listen.
 */
export async function serve(uniflow: UniFlow, options: ServeOptions = {}): Promise<Service> {
  const settings = settingsOf(options);
  const { startServer } = await optional('serve', () => import('./server.js'));
  return startServer(uniflow, settings);
}
