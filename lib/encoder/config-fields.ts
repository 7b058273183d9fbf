/** The fields of a Hugging Face config.json: which ones affect the result, and how they are checked. */
import { z } from 'zod';
import { UniFlowError } from '../errors.js';

/**
 * Fields without effect on anything computed here: those of transformers' PretrainedConfig and GenerationConfig, which older versions wrote in full for every
 * part of a model, and training-only ones. Any other unknown field is refused, because it may change the result.
 */
const inert = new Set(
  `add_cross_attention architectures attention_dropout attention_implementation attention_probs_dropout_prob attn_implementation auto_map
  bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
  diversity_penalty do_sample drop_path_rate dropout dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
  exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout_prob
  id2label initializer_factor initializer_range is_decoder is_encoder_decoder label2id layer_scale_init_value layerscale_value
  length_penalty logit_scale_init_value max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams
  num_labels num_return_sequences out_features out_indices output_attentions output_hidden_states output_scores pad_token_id
  pos_embed_jitter pos_embed_rescale pos_embed_shift prefix problem_type projection_dim projection_dropout remove_invalid_values
  repetition_penalty reshape_hidden_states return_dict return_dict_in_generate sep_token_id stage_names suppress_tokens
  task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
  torchscript transformers.js_config transformers_version typical_p use_bfloat16 use_cache use_flash_attn use_mask_token
  use_return_dict vision_use_head xla_device`.split(/\s+/),
);

/** Generic fields that change the result if they are set. */
const everywhere = z.object({
  pruned_heads: z
    .record(z.string(), z.unknown())
    .refine((heads) => Object.keys(heads).length === 0, 'models with pruned attention heads are not supported')
    .optional(),
});

/** Fields whose values do not matter, for the schema of a family that has them. */
export function unused(names: string): Record<string, z.ZodOptional<z.ZodUnknown>> {
  return Object.fromEntries(names.split(/\s+/).map((name) => [name, z.unknown().optional()]));
}

/** The fields that are set: Python writes None as null. */
export function withoutNulls(json: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(json).filter(([, value]) => value !== null && value !== undefined));
}

export function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** The problems found by zod, each starting with the field's name. */
export function problemsOf(error: z.ZodError | undefined): string[] {
  return error?.issues.map((issue) => `${issue.path.join('.')}: ${issue.message}`) ?? [];
}

/**
 * Checks `config` against `schema`.
 * @throws UniFlowError `BAD_CHECKPOINT` naming every missing, invalid or unknown field.
 */
export function parseConfig<T extends z.ZodRawShape>(
  schema: z.ZodObject<T>,
  config: Record<string, unknown>,
  subject: string,
): z.infer<z.ZodObject<T>> {
  const given = withoutNulls(config);
  const known = (name: string): boolean =>
    Object.hasOwn(schema.shape, name) || Object.hasOwn(everywhere.shape, name) || inert.has(name) || name.startsWith('_');
  const parsed = schema.safeParse(given);
  const problems = [
    ...Object.keys(given)
      .filter((name) => !known(name))
      .map((name) => `${name}: unknown field`),
    ...problemsOf(parsed.error),
    ...problemsOf(everywhere.safeParse(given).error),
  ];
  if (problems.length > 0 || !parsed.success)
    throw new UniFlowError('BAD_CHECKPOINT', `${subject} config.json: ${problems.join('; ')}`, { subject, actual: problems.join('; ') });
  return parsed.data;
}
