/** `uniflow encode`: pictures to a file of latents, or to a folder of shards (encode-shards.ts). */
import { dirname } from 'node:path';
import { UniFlowError } from '../errors.js';
import { ArraySpool } from '../io/arrays.js';
import { makeFolder } from '../io/files.js';
import { embeddedName } from '../package.js';
import type { Grid } from '../tensor.js';
import { encodeShards, isFolder, refuseShardOptions, type ShardCommandOptions } from './encode-shards.js';
import { refuseMissing } from './inputs.js';
import { latentFormat, writeLatents } from './latents.js';
import type { ModelOptions, PictureOptions } from './options.js';
import { failures, plural, printJson } from './output.js';
import { overImages } from './shared.js';

export interface EncodeCommandOptions extends ModelOptions, PictureOptions, ShardCommandOptions {
  out: string;
  tokens?: true;
}

function refuseStandardOutput(out: string): void {
  if (out === '-')
    throw UniFlowError.expected(
      'BAD_INPUT',
      'out',
      'a file or a folder',
      "'-': latents are not written to standard output (./- is a folder)",
    );
}

/** A file, or a folder of shards. */
export async function encode(inputs: readonly string[], options: EncodeCommandOptions, signal: AbortSignal): Promise<void> {
  refuseStandardOutput(options.out);
  if (await isFolder(options.out)) return encodeShards(inputs, options, signal);
  latentFormat(options.out, 'out');
  refuseShardOptions(options);
  await refuseMissing(inputs);
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
      begin: () => makeFolder(dirname(options.out)),
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
