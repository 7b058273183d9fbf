/** Ids and grids of the images of a latents file, stored beside it: `a.ids.json` for a file, `shard-000000.jsonl` for a run. */
import { UniFlowError } from '../errors.js';
import type { Grid } from '../tensor.js';
import type { Output } from './output.js';

/** Labels of latents. */
export interface Labels {
  /** Id of the image of each row. */
  ids?: string[];
  /** Grid shared by all images. */
  grid?: Grid;
  /** Grid of each image. */
  grids?: Grid[];
}

/** Parses patch rows and columns written as `16x32`. */
export function parseGrid(text: string): Grid | undefined {
  const match = /^([1-9]\d*)x([1-9]\d*)$/i.exec(text);
  return match ? { rows: Number(match[1]), cols: Number(match[2]) } : undefined;
}

/** The name of a companion of a latents file: replaces its extension. */
export function besideOf(name: string, ending: string): string {
  return name.replace(/(\.latents)?\.[^./]*$/i, ending);
}

/** Reads the labels if they exist; a bare array is valid without them. */
export async function readLabels(input: Output, name: string): Promise<Record<string, unknown> | undefined> {
  const [ids, list] = [besideOf(name, '.ids.json'), besideOf(name.replace(/\.codes\.npy$/i, '.npy'), '.jsonl')];
  if ((await input.size(ids)) !== undefined)
    return parsed(ids, (await input.read(ids)).toString(), (text) => JSON.parse(text) as Record<string, unknown>);
  if ((await input.size(list)) === undefined) return undefined;
  return parsed(list, (await input.read(list)).toString().trimEnd(), (text) => {
    const lines = text.split('\n').map((line) => JSON.parse(line) as { id: string; grid: Grid });
    return { ids: lines.map(({ id }) => id), grids: lines.map(({ grid }) => grid) };
  });
}

/** Parses ids from metadata. @throws {UniFlowError} `BAD_INPUT` if they are not JSON. */
export function parseIds(name: string, text: string): unknown {
  return parsed(name, text, (ids) => JSON.parse(ids) as unknown);
}

function parsed<T>(name: string, text: string, parse: (text: string) => T): T {
  try {
    return parse(text);
  } catch (cause) {
    throw UniFlowError.expected('BAD_INPUT', name, 'ids in JSON', (cause as Error).message, cause);
  }
}

/** @throws {UniFlowError} `BAD_INPUT` if the ids are not strings. */
export function labelsOf(name: string, { ids, grid, grids }: Record<string, unknown>): Labels {
  if (ids !== undefined && !(Array.isArray(ids) && ids.every((id) => typeof id === 'string')))
    throw UniFlowError.expected('BAD_INPUT', `${name}: ids`, 'an array of strings', JSON.stringify(ids).slice(0, 80));
  const one = typeof grid === 'string' ? parseGrid(grid) : undefined;
  return { ...(ids ? { ids } : {}), ...(one ? { grid: one } : {}), ...(Array.isArray(grids) ? { grids: grids as Grid[] } : {}) };
}
