/** `uniflow encode`: pictures to a file of latents, or to a folder of shards (encode-shards.ts). */
import { mkdir } from 'node:fs/promises';
import { dirname } from 'node:path';
import { UniFlowError } from '../errors.js';
import { ArraySpool } from '../io/arrays.js';
import { optional } from '../optional.js';
import { embeddedName } from '../package.js';
import type { Grid } from '../tensor.js';
import { checkFolder, encodeShards, isFolder, refuseShardOptions } from './encode-shards.js';
import { latentFormat, writeLatents } from './latents.js';
import type { EncodeCommandOptions } from './options.js';
import { failures, plural, printJson } from './output.js';
import { overImages } from './shared.js';

/** A file, or a folder of shards. */
export async function encode(inputs: readonly string[], options: EncodeCommandOptions, signal: AbortSignal): Promise<void> {
  if (await isFolder(options.out)) return encodeFolder(inputs, options, signal);
  latentFormat(options.out, 'out');
  refuseShardOptions(options);
  const { tokens } = options;
  const spool = new ArraySpool(options.out);
  const ids: string[] = [];
  let grid: Grid = { rows: 0, cols: 0 };
  try {
    const outcome = await overImages({
      inputs,
      label: 'encode',
      options,
      signal,
      begin: async () => void (await mkdir(dirname(options.out), { recursive: true })),
      work: (uniflow, images, batchSize) => uniflow.encode(images, { tokens, batchSize, signal }),
      finish: async (encoded, found) => {
        await spool.append('latents', encoded.latents);
        if (encoded.tokens) await spool.append('tokens', encoded.tokens);
        grid = encoded.grid;
        ids.push(...found);
      },
    });
    if (outcome.images === 0)
      throw new UniFlowError('BAD_INPUT', `nothing is written: no picture could be read${failures(outcome.failed)}`);
    const files = await writeLatents(options.out, spool, { ids, grid, model: options.model ?? embeddedName });
    const shape = spool.shape('latents');
    if (options.json) printJson({ files, shape, grid, ...outcome });
    else
      process.stdout.write(
        `${plural(outcome.images, 'picture')} as latents [${shape.join(', ')}] in ${files.join(', ')}${failures(outcome.failed)}\n`,
      );
  } finally {
    await spool.close();
  }
}

async function encodeFolder(inputs: readonly string[], options: EncodeCommandOptions, signal: AbortSignal): Promise<void> {
  await checkFolder(inputs, options);
  if (options.queue === undefined) return encodeShards(inputs, options, signal);
  const { encodeOnQueue } = await optional('queue', () => import('./encode-queue.js'));
  await encodeOnQueue(inputs, options, options.queue, signal);
}
