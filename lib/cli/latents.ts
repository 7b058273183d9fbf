/** Files of latents: .safetensors with everything inside, or .npy with an .ids.json beside it. */
import { rm } from 'node:fs/promises';
import { UniFlowError } from '../errors.js';
import type { ArraySpool } from '../io/arrays.js';
import { replaceFile } from '../io/files.js';
import type { Grid } from '../tensor.js';

export type LatentFormat = 'safetensors' | 'npy';

/** What belongs to the latents besides numbers. */
export interface Labels {
  /** The picture that each row came from. */
  ids: string[];
  grid: Grid;
  model: string;
}

/** @throws UniFlowError `BAD_INPUT` for a path that ends otherwise. */
export function latentFormat(path: string, subject: string): LatentFormat {
  const format = /\.(safetensors|npy)$/i.exec(path)?.[1]?.toLowerCase();
  if (!format)
    throw UniFlowError.expected('BAD_INPUT', subject, 'a name ending in .safetensors or .npy, or in / for a folder of shards', `'${path}'`);
  return format as LatentFormat;
}

const besideNpy = (path: string, ending: string): string => path.replace(/\.npy$/i, ending);

/** Writes the spool's `latents`, and `tokens` where it has them. @returns the files. */
export async function writeLatents(path: string, spool: ArraySpool, { ids, grid, model }: Labels): Promise<string[]> {
  const text = { grid: `${grid.rows}x${grid.cols}`, model };
  if (latentFormat(path, 'out') === 'safetensors') {
    await spool.writeSafetensors(path, { ids: JSON.stringify(ids), ...text });
    return [path];
  }
  const labels = besideNpy(path, '.ids.json');
  const tokens = besideNpy(path, '.tokens.npy');
  await replaceFile(labels, (file) => file.writeFile(`${JSON.stringify({ ids, ...text }, null, 2)}\n`));
  if (spool.has('tokens')) await spool.writeNpy(tokens, 'tokens');
  else await rm(tokens, { force: true }); // of other latents
  await spool.writeNpy(path, 'latents');
  return [path, ...(spool.has('tokens') ? [tokens] : []), labels];
}
