/** Keeps results from replacing an input, or from becoming inputs when the same command runs again. */
import { realpath, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve, sep } from 'node:path';
import { UniFlowError } from '../errors.js';
import { baseOf, isGlob } from '../sources/glob.js';
import { isRemote } from '../sources/url.js';

/**
 * Call before writing anything.
 * @param inputs as on the command line
 * @throws {UniFlowError} `BAD_INPUT` if `folder` is, or is inside, a folder that is searched for inputs.
 */
export async function refuseInside(folder: string, inputs: readonly string[]): Promise<void> {
  const out = await realPathOf(folder);
  for (const input of inputs.filter((input) => input !== '-' && !isRemote(input))) {
    const searched = await searchedFolder(input);
    if (searched === undefined) continue;
    const from = await realPathOf(searched);
    if (out === from || out.startsWith(from === sep ? sep : from + sep))
      throw refusal(folder, `'${input}', which is searched for images, also when the command is given again`);
  }
}

/** @throws {UniFlowError} `BAD_INPUT` if one of the originals is in `folder`. */
export async function refuseBeside(folder: string, originals: readonly string[]): Promise<void> {
  const out = await realPathOf(folder);
  for (const directory of new Set(originals.filter((path) => !isRemote(path)).map((path) => dirname(path)))) {
    if ((await realPathOf(directory)) !== out) continue;
    for (const path of originals.filter((path) => dirname(path) === directory))
      if (await stat(path).catch(() => undefined)) throw refusal(folder, `the folder of the original '${path}'`);
  }
}

function refusal(folder: string, actual: string): UniFlowError {
  return UniFlowError.expected(
    'BAD_INPUT',
    'out',
    'a folder for results alone, as no result may be or become an input',
    `'${folder}' in ${actual}`,
  );
}

/** The folder that is searched recursively; undefined for a file. */
async function searchedFolder(input: string): Promise<string | undefined> {
  const info = await stat(input).catch(() => undefined);
  if (info) return info.isDirectory() ? input : undefined;
  return isGlob(input) ? baseOf(input) : undefined;
}

/** Resolves links, even if the last parts of the path do not exist yet. */
async function realPathOf(path: string): Promise<string> {
  const whole = resolve(path);
  const real = await realpath(whole).catch(() => undefined);
  if (real !== undefined || whole === dirname(whole)) return real ?? whole;
  return join(await realPathOf(dirname(whole)), basename(whole));
}
