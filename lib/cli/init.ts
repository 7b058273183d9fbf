/** `uniflow init`: creates a model folder with random weights, or with the linear codec of photographs. */
import { join } from 'node:path';
import type { Preset } from '../config.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { pathExists } from '../io/files.js';
import type { FloatType } from '../native.js';
import { capacity, shortfalls } from '../start/index.js';
import { UniFlow } from '../uniflow.js';
import type { ReportOptions } from './options.js';
import { printJson } from './output.js';

export interface InitCommandOptions extends ReportOptions {
  preset: Preset;
  seed?: number;
  dtype?: FloatType;
  photos?: string;
  force?: true;
}

const MODEL_FILES = ['config.json', 'model.safetensors', 'model.safetensors.index.json'];

export async function init(folder: string, options: InitCommandOptions, signal: AbortSignal): Promise<void> {
  const { preset, seed, dtype, photos } = options;
  if (!options.force) await refuseModel(folder);
  const uniflow = await UniFlow.random(preset, { seed, dtype, photos, signal });
  throwIfAborted(signal);
  await uniflow.save(folder, { signal });
  const warnings = photos === undefined ? [] : shortfalls(capacity(uniflow.config));
  if (options.json)
    return printJson({ folder, preset, seed: seed ?? 0, dtype: uniflow.dtype, ...(photos === undefined ? {} : { photos, warnings }) });
  for (const warning of warnings) process.stderr.write(`warning: ${warning}\n`);
  const start = photos === undefined ? 'random weights' : `the linear codec of ${photos}`;
  process.stdout.write(`${folder} is a UniFlow model of size '${preset}' with ${start} (see: uniflow info ${folder})\n`);
}

async function refuseModel(folder: string): Promise<void> {
  for (const name of MODEL_FILES) {
    const path = join(folder, name);
    if (await pathExists(path))
      throw new UniFlowError('BAD_INPUT', `${path} is there already; --force overwrites the model`, { subject: path });
  }
}
