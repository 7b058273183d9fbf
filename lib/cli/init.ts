/** `uniflow init`: a model folder with random weights. */
import { join } from 'node:path';
import type { Preset } from '../config.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { pathExists } from '../io/files.js';
import type { FloatType } from '../native.js';
import { UniFlow } from '../uniflow.js';
import type { ReportOptions } from './options.js';
import { printJson } from './output.js';

export interface InitCommandOptions extends ReportOptions {
  preset: Preset;
  seed?: number;
  dtype?: FloatType;
  force?: true;
}

const MODEL_FILES = ['config.json', 'model.safetensors', 'model.safetensors.index.json'];

export async function init(folder: string, options: InitCommandOptions, signal: AbortSignal): Promise<void> {
  const { preset, seed, dtype } = options;
  if (!options.force) await refuseModel(folder);
  const uniflow = UniFlow.random(preset, { seed, dtype });
  throwIfAborted(signal);
  await uniflow.save(folder, { signal });
  if (options.json) printJson({ folder, preset, seed: seed ?? 0, dtype: uniflow.dtype });
  else process.stdout.write(`${folder} is a UniFlow model of size '${preset}' with random weights (see: uniflow info ${folder})\n`);
}

async function refuseModel(folder: string): Promise<void> {
  for (const name of MODEL_FILES) {
    const path = join(folder, name);
    if (await pathExists(path))
      throw new UniFlowError('BAD_INPUT', `${path} is there already; --force overwrites the model`, { subject: path });
  }
}
