/** `uniflow encode --queue`: shards encoded by workers on other machines; see lib/queue. */
import { openSource } from '../sources/source.js';
import { UniFlowError } from '../errors.js';
import { encodeOnWorkers, type QueueProgress } from '../queue/index.js';
import { connect } from '../queue/jobs.js';
import { report, runOptions } from './encode-run.js';
import type { EncodeCommandOptions } from './options.js';
import { plural, printJson } from './output.js';
import { Progress } from './progress.js';
import { loadModel, reportSkips } from './shared.js';

export async function encodeOnQueue(
  inputs: readonly string[],
  options: EncodeCommandOptions,
  queue: string,
  signal: AbortSignal,
): Promise<void> {
  const { out, json = false, detach, maxWaiting } = options;
  const source = openSource(inputs, { signal });
  if (!source.repeatable)
    throw new UniFlowError('BAD_INPUT', 'standard input cannot be read by workers: --queue takes files, archives, lists and URLs', {
      subject: 'queue',
    });
  (await connect(queue)).disconnect(); // reports an unreachable server before the model is loaded
  const uniflow = await loadModel(options, signal);
  const progress = new Progress('encode', { unit: 'images' }, json).start(undefined);
  const started = performance.now();
  try {
    const { manifest, before, complete, planned, skips } = await encodeOnWorkers(uniflow, source, out, {
      ...runOptions(options, progress, signal),
      ...{ queue, detach, maxWaiting },
      onProgress: (state) => show(progress, state),
      onState: (text) => !json && progress.line(`uniflow: ${text}`),
    });
    reportSkips(skips, progress, json);
    progress.stop();
    if (!manifest) {
      if (json) printJson({ out, shards: planned, before });
      else process.stdout.write(`${plural(planned, 'shard')} of ${out} planned; the same command without --detach waits for them\n`);
      return;
    }
    if (manifest.failures > 0 && !complete) process.exitCode = 1;
    report(out, { manifest, before, complete, skips }, (performance.now() - started) / 1000, json);
  } finally {
    progress.stop();
    await uniflow.dispose();
  }
}

function show(progress: Progress, { done, before, total, shards, failures, workers }: QueueProgress): void {
  if (total !== undefined) progress.expect(total);
  const failed = failures > 0 ? `, ${failures} failed` : '';
  progress.update(done, `${plural(shards, 'shard')} from ${plural(workers, 'worker')}${failed}`, before);
}
