/** The names and grids of the pictures in a file of latents, where they are beside it: `a.ids.json` of a file, `shard-000000.jsonl` of a run. */
import { UniFlowError } from '../errors.js';
import type { Grid } from '../tensor.js';
import type { Output } from './output.js';

/** What belongs to latents besides numbers. */
export interface Labels {
  /** The picture that each row came from. */
  ids?: string[];
  /** Of all pictures. */
  grid?: Grid;
  /** Of each. */
  grids?: Grid[];
}

/** Patch rows and columns as `16x32`. */
export function parseGrid(text: string): Grid | undefined {
  const match = /^([1-9]\d*)x([1-9]\d*)$/i.exec(text);
  return match ? { rows: Number(match[1]), cols: Number(match[2]) } : undefined;
}

/** The name of what is beside a file of latents, in place of its extension. */
export function besideOf(name: string, ending: string): string {
  return name.replace(/(\.latents)?\.[^./]*$/i, ending);
}

/** As far as there are any: an array alone will do. */
export async function readLabels(input: Output, name: string): Promise<Record<string, unknown> | undefined> {
  const [ids, list] = [besideOf(name, '.ids.json'), besideOf(name, '.jsonl')];
  if ((await input.size(ids)) !== undefined)
    return parsed(ids, (await input.read(ids)).toString(), (text) => JSON.parse(text) as Record<string, unknown>);
  if ((await input.size(list)) === undefined) return undefined;
  return parsed(list, (await input.read(list)).toString().trimEnd(), (text) => {
    const lines = text.split('\n').map((line) => JSON.parse(line) as { id: string; grid: Grid });
    return { ids: lines.map(({ id }) => id), grids: lines.map(({ grid }) => grid) };
  });
}

/** Ids in metadata. @throws {UniFlowError} `BAD_INPUT` for what is no JSON. */
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

/** @throws {UniFlowError} `BAD_INPUT` where the ids are no strings. */
export function labelsOf(name: string, { ids, grid, grids }: Record<string, unknown>): Labels {
  if (ids !== undefined && !(Array.isArray(ids) && ids.every((id) => typeof id === 'string')))
    throw UniFlowError.expected('BAD_INPUT', `${name}: ids`, 'an array of strings', JSON.stringify(ids).slice(0, 80));
  const one = typeof grid === 'string' ? parseGrid(grid) : undefined;
  return { ...(ids ? { ids } : {}), ...(one ? { grid: one } : {}), ...(Array.isArray(grids) ? { grids: grids as Grid[] } : {}) };
}
