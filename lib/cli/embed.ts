/** `uniflow embed`: one vector per image, in one file. */
import { embeddedModel, embeddedName } from '../package.js';
import { embedToFile } from '../shards/embeddings.js';
import { Skips } from '../sources/skips.js';
import { namedItems, refuseMissing, type Failure } from './inputs.js';
import type { EmbedCommandOptions } from './options.js';
import { failures as failed, plural, printJson } from './output.js';
import { Progress, stageDetails } from './progress.js';
import { estimating, loadAny, reportFailure, reportSkips } from './shared.js';

export async function embed(inputs: readonly string[], options: EmbedCommandOptions, signal: AbortSignal): Promise<void> {
  const { out, pool, normalize, size, batch, json = false } = options;
  await refuseMissing(inputs);
  const { model } = await loadAny(options.model ?? embeddedModel, options, signal);
  const progress = new Progress('embed', { unit: 'images' }, json).start(undefined);
  const detailOf = stageDetails();
  const skips = new Skips();
  const started = performance.now();
  const broken: Failure[] = [];
  let done = 0;
  await estimating(inputs, progress, json, async () => {
    const { files, shape } = await embedToFile(model, namedItems(inputs, skips, signal), out, {
      ...{ pool, normalize, size, batchSize: batch, signal, model: options.model ?? embeddedName },
      onFailure: ({ id, reason }) => {
        const failure = { path: id, reason };
        broken.push(failure);
        reportFailure(failure, progress, json);
      },
      onCount: (images, utilisation) =>
        progress.update((done += images) + broken.length, detailOf({ failures: broken.length, utilisation })),
    });
    reportSkips(skips, progress, json);
    progress.stop();
    const seconds = (performance.now() - started) / 1000;
    if (json) return printJson({ files, shape, images: shape[0], failed: broken, skipped: skips.count, seconds });
    process.stdout.write(`${plural(shape[0], 'image')} as vectors [${shape.join(', ')}] in ${files.join(', ')}${failed(broken)}\n`);
  });
}
