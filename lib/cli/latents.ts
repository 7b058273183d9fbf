/** Files of latents: .safetensors with everything inside, or .npy with an .ids.json beside it. */
import type { NdArray } from 'ndarray';
import { readFile } from 'node:fs/promises';
import { UniFlowError } from '../errors.js';
import { ArrayFile, type ArraySpool } from '../io/arrays.js';
import { replaceFile } from '../io/files.js';
import { readNpy } from '../io/npy.js';
import type { Grid } from '../tensor.js';
import { parseGrid } from './options.js';

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
  if (!format) throw UniFlowError.expected('BAD_INPUT', subject, 'a name ending in .safetensors or .npy', `'${path}'`);
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
  await spool.writeNpy(path, 'latents');
  return [path, ...(spool.has('tokens') ? [tokens] : []), labels];
}

/** Latents [B,N,Z], and what the file says of them. */
export async function readLatents(path: string): Promise<{ latents: NdArray } & Partial<Labels>> {
  if (latentFormat(path, 'latents') === 'safetensors') {
    const file = new ArrayFile(path);
    const { ids, ...text } = file.metadata;
    return { latents: await file.read('latents'), ...labelsOf(path, { ...text, ...(ids === undefined ? {} : { ids: parse(path, ids) }) }) };
  }
  const beside = besideNpy(path, '.ids.json');
  const text = await readFile(beside, 'utf8').catch(() => '{}'); // an array alone will do
  return { latents: await readNpy(path), ...labelsOf(beside, parse(beside, text)) };
}

function parse(path: string, text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw UniFlowError.expected('BAD_INPUT', path, 'ids in JSON', (cause as Error).message, cause);
  }
}

function labelsOf(path: string, value: unknown): Partial<Labels> {
  const { ids, grid, model } = (value ?? {}) as Record<string, unknown>;
  if (ids !== undefined && !(Array.isArray(ids) && ids.every((id) => typeof id === 'string')))
    throw UniFlowError.expected('BAD_INPUT', `${path}: ids`, 'an array of strings', JSON.stringify(ids).slice(0, 80));
  return {
    ...(ids ? { ids } : {}),
    ...(typeof grid === 'string' ? { grid: parseGrid(grid) } : {}),
    ...(typeof model === 'string' ? { model } : {}),
  };
}
