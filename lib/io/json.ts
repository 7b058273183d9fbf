/** Reads and writes the JSON files of a model. */
import { readFile } from 'node:fs/promises';
import { UniFlowError } from '../errors.js';
import { refuseForeign } from './foreign.js';

/** @throws UniFlowError `BAD_CHECKPOINT` if the file is not a JSON object. */
export async function readJson(path: string): Promise<Record<string, unknown>> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (cause) {
    throw new UniFlowError('BAD_CHECKPOINT', `${path} cannot be read: a model is a folder with config.json and model.safetensors`, {
      subject: path,
      cause,
    });
  }
  try {
    const value: unknown = JSON.parse(text);
    if (value && typeof value === 'object' && !Array.isArray(value)) return value as Record<string, unknown>;
  } catch (cause) {
    await refuseForeign(path);
    throw UniFlowError.expected('BAD_CHECKPOINT', path, 'a JSON object', (cause as Error).message, cause);
  }
  throw UniFlowError.expected('BAD_CHECKPOINT', path, 'a JSON object', 'another JSON value');
}

/** Fields that are floats in transformers, which refuses to load some of them as integers. */
const FLOATS = `attention_dropout attention_probs_dropout_prob diversity_penalty drop_path_rate dropout hidden_dropout_prob
  initializer_factor initializer_range layer_norm_eps layer_scale_init_value layerscale_value length_penalty logit_scale_init_value
  pos_embed_jitter pos_embed_rescale pos_embed_shift projection_dropout repetition_penalty rope_theta temperature top_p
  typical_p`.split(/\s+/);

/** Matches a line with such a field. JavaScript drops the ".0" of 1.0, so it is added back. */
const FLOAT_LINE = new RegExp(`^( *"(?:${FLOATS.join('|')})": -?\\d+)(,?)$`, 'gm');

/** The text of a config.json, with float fields written as floats. */
export function jsonText(value: Record<string, unknown>): string {
  return JSON.stringify(value, null, 2).replace(FLOAT_LINE, '$1.0$2') + '\n';
}
