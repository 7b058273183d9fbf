/** All shard formats by name. */
import { describe } from '../../check.js';
import { UniFlowError } from '../../errors.js';
import type { Format } from './format.js';
import { npy } from './npy.js';
import { parquet } from './parquet.js';
import { safetensors } from './safetensors.js';
import { tar } from './tar.js';

export type FormatName = 'safetensors' | 'npy' | 'tar' | 'parquet';

export const FORMATS: Record<FormatName, Format> = { safetensors, npy, tar, parquet };

export function checkFormat(format: unknown): asserts format is FormatName {
  if (!Object.hasOwn(FORMATS, format as string))
    throw UniFlowError.expected('BAD_INPUT', 'format', Object.keys(FORMATS).join(', '), describe(format));
}
