/** Converts a Hugging Face config.json to the encoder's configuration. */
import { z } from 'zod';
import { describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import type { Activation } from '../native.js';
import type { Rope } from '../ops.js';
import { isObject, parseConfig, unused, withoutNulls } from './config-fields.js';

export type Family = 'internvit' | 'internvl' | 'dinov2' | 'dinov3' | 'siglip' | 'clip';

/** A vision transformer of any family. */
export interface EncoderConfig {
  family: Family;
  /** D */
  width: number;
  layers: number;
  heads: number;
  /** Width of the MLP; if gated, of each half. */
  hidden: number;
  patch: number;
  /** Height and width for which the position table was trained. The patches may not fill them: see {@link gridOf}. */
  imageSize: readonly [number, number];
  eps: number;
  norm: 'layer' | 'rms';
  /** RMSNorm of q and k over the whole width (InternViT-6B). */
  qkNorm: boolean;
  /** Epsilon of that norm. */
  qkEps: number;
  activation: Activation;
  /** SwiGLU: silu(a) * b. */
  gated: boolean;
  layerScale: boolean;
  /** Number of register tokens, after the class token. */
  registers: number;
  finalNorm: boolean;
  /** Whether position tables are resized with antialiasing. */
  antialiasPositions: boolean;
  /** Rotary positions; undefined if positions are a table. */
  rope: Rope | undefined;
  bias: { q: boolean; k: boolean; v: boolean; proj: boolean; mlp: boolean };
}

export const MAX_LAYERS = 1024;
const positive = z
  .number()
  .int()
  .positive()
  .max(1 << 20);
const layers = positive.max(MAX_LAYERS);
export const size = z.union([positive, z.tuple([positive, positive])]);
const activations = {
  gelu: 'gelu',
  gelu_python: 'gelu',
  gelu_accurate: 'gelu_tanh',
  gelu_fast: 'gelu_tanh',
  gelu_new: 'gelu_tanh',
  gelu_pytorch_tanh: 'gelu_tanh',
  quick_gelu: 'quick_gelu',
  silu: 'silu',
  swish: 'silu',
} as const;

/** Fields shared by all families. */
const common = {
  hidden_size: positive,
  num_hidden_layers: layers,
  num_attention_heads: positive,
  image_size: size,
  patch_size: size,
  num_channels: z.literal(3).default(3),
  hidden_act: z.enum(Object.keys(activations) as (keyof typeof activations)[]).default('gelu'),
};

export const square = (s: number | [number, number]): readonly [number, number] => (typeof s === 'number' ? [s, s] : s);

/** The most common settings; each family overrides what differs. */
function base(family: Family, c: z.infer<z.ZodObject<typeof common>>, hidden: number, eps: number): EncoderConfig {
  const [patch, patchWidth] = square(c.patch_size);
  if (patch !== patchWidth) throw UniFlowError.expected('UNSUPPORTED', 'patch_size', 'square patches', `${patch}x${patchWidth}`);
  const imageSize = square(c.image_size);
  if (imageSize.some((n) => n < patch))
    throw UniFlowError.expected('BAD_CHECKPOINT', 'image_size', `at least patch_size ${patch}`, imageSize.join('x'));
  if (c.hidden_size % c.num_attention_heads !== 0)
    throw UniFlowError.expected(
      'BAD_CHECKPOINT',
      'hidden_size',
      `a multiple of num_attention_heads ${c.num_attention_heads}`,
      `${c.hidden_size}`,
    );
  return {
    family,
    width: c.hidden_size,
    layers: c.num_hidden_layers,
    heads: c.num_attention_heads,
    hidden,
    patch,
    imageSize,
    eps,
    norm: 'layer',
    qkNorm: false,
    qkEps: eps,
    activation: activations[c.hidden_act],
    gated: false,
    layerScale: false,
    registers: 0,
    finalNorm: false,
    antialiasPositions: false,
    rope: undefined,
    bias: { q: true, k: true, v: true, proj: true, mlp: true },
  };
}

/** InternViT's own layout. UniFlow's encoder is an InternViT and adds fields of its own. */
export const internVitFields = {
  ...common,
  intermediate_size: positive,
  layer_norm_eps: z.number().positive().default(1e-6),
  norm_type: z.enum(['layer_norm', 'rms_norm']).default('layer_norm'),
  qk_normalization: z.boolean().default(false),
  qkv_bias: z.boolean().default(true),
  /** An addition of this library: rotary positions, counted in patches, instead of tables. Attention to neighbours then works alike in images of all sizes. */
  position_embedding_type: z.enum(['absolute', 'rope']).default('absolute'),
  rope_theta: z.number().positive().default(100),
  /** InternVL3 has settings for a mixture of experts that no published model uses. */
  use_moe: z.literal(false).default(false),
  ...unused(
    `capacity_factor eval_capacity_factor laux_allreduce moe_coeff_ratio moe_intermediate_size moe_output_scale noisy_gate_policy
    num_experts num_routed_experts num_shared_experts shared_expert_intermediate_size use_residual use_rts use_weighted_residual`,
  ),
};

export function internVitConfig(c: z.infer<z.ZodObject<typeof internVitFields>>): EncoderConfig {
  return {
    ...base('internvit', c, c.intermediate_size, c.layer_norm_eps),
    norm: c.norm_type === 'rms_norm' ? 'rms' : 'layer',
    qkNorm: c.qk_normalization,
    layerScale: true,
    rope: c.position_embedding_type === 'rope' ? { theta: c.rope_theta, unit: 'patch' } : undefined,
    bias: { q: c.qkv_bias, k: c.qkv_bias, v: c.qkv_bias, proj: true, mlp: true },
  };
}

function internVl(config: Record<string, unknown>): EncoderConfig {
  const c = parseConfig(
    z.object({
      ...common,
      intermediate_size: positive,
      layer_norm_eps: z.number().positive().default(1e-6),
      norm_type: z.enum(['layer_norm', 'rms_norm']).default('layer_norm'),
      attention_bias: z.boolean().default(false),
      use_qk_norm: z.boolean().default(false),
      use_absolute_position_embeddings: z.literal(true).default(true),
      use_mean_pooling: z.boolean().default(true),
    }),
    config,
    'internvl_vision',
  );
  return {
    ...base('internvl', c, c.intermediate_size, c.layer_norm_eps),
    norm: c.norm_type === 'rms_norm' ? 'rms' : 'layer',
    qkNorm: c.use_qk_norm,
    qkEps: 1e-6, // transformers passes layer_norm_eps only to the other norms
    layerScale: true,
    finalNorm: !c.use_mean_pooling,
    bias: { q: c.attention_bias, k: c.attention_bias, v: c.attention_bias, proj: true, mlp: true },
  };
}

function dinoV2(config: Record<string, unknown>): EncoderConfig {
  const c = parseConfig(
    z.object({
      ...common,
      mlp_ratio: z.number().positive().default(4),
      layer_norm_eps: z.number().positive().default(1e-6),
      qkv_bias: z.boolean().default(true),
      use_swiglu_ffn: z.boolean().default(false),
      num_register_tokens: z.number().int().nonnegative().default(0),
      apply_layernorm: z.boolean().default(true),
    }),
    config,
    'dinov2',
  );
  const hidden = Math.trunc(c.hidden_size * c.mlp_ratio);
  return {
    ...base('dinov2', c, c.use_swiglu_ffn ? Math.floor((Math.trunc((hidden * 2) / 3) + 7) / 8) * 8 : hidden, c.layer_norm_eps),
    gated: c.use_swiglu_ffn,
    layerScale: true,
    registers: c.num_register_tokens,
    finalNorm: true,
    // Hugging Face's two implementations differ here: only the one with registers antialiases
    antialiasPositions: config['model_type'] === 'dinov2_with_registers',
    bias: { q: c.qkv_bias, k: c.qkv_bias, v: c.qkv_bias, proj: true, mlp: true },
  };
}

function dinoV3(config: Record<string, unknown>): EncoderConfig {
  const flag = z.boolean().default(true);
  const c = parseConfig(
    z.object({
      ...common,
      intermediate_size: positive,
      layer_norm_eps: z.number().positive().default(1e-5),
      rope_theta: z.number().positive().default(100),
      num_register_tokens: z.number().int().nonnegative().default(0),
      query_bias: flag,
      key_bias: z.boolean().default(false),
      value_bias: flag,
      proj_bias: flag,
      mlp_bias: flag,
      use_gated_mlp: z.boolean().default(false),
      apply_layernorm: flag,
    }),
    config,
    'dinov3_vit',
  );
  if (c.use_gated_mlp && c.hidden_act !== 'silu')
    throw UniFlowError.expected('UNSUPPORTED', 'hidden_act', "'silu' for a gated MLP", `'${c.hidden_act}'`);
  return {
    ...base('dinov3', c, c.intermediate_size, c.layer_norm_eps),
    gated: c.use_gated_mlp,
    layerScale: true,
    registers: c.num_register_tokens,
    finalNorm: true,
    rope: { theta: c.rope_theta, unit: 'image' },
    bias: { q: c.query_bias, k: c.key_bias, v: c.value_bias, proj: c.proj_bias, mlp: c.mlp_bias },
  };
}

/** CLIP and SigLIP share their fields. */
function contrastive(family: 'clip' | 'siglip', config: Record<string, unknown>): EncoderConfig {
  const clip = family === 'clip';
  const c = parseConfig(
    z.object({
      ...common,
      hidden_size: positive.default(768),
      num_hidden_layers: layers.default(12),
      num_attention_heads: positive.default(12),
      image_size: size.default(224),
      patch_size: size.default(clip ? 32 : 16),
      intermediate_size: positive.default(3072),
      layer_norm_eps: z
        .number()
        .positive()
        .default(clip ? 1e-5 : 1e-6),
      hidden_act: common.hidden_act.removeDefault().default(clip ? 'quick_gelu' : 'gelu_pytorch_tanh'),
    }),
    config,
    family,
  );
  return { ...base(family, c, c.intermediate_size, c.layer_norm_eps), finalNorm: !clip };
}

const parsers: Record<string, (config: Record<string, unknown>) => EncoderConfig> = {
  intern_vit_6b: (config) => internVitConfig(parseConfig(z.object(internVitFields), config, 'intern_vit_6b')),
  internvl_vision: internVl,
  dinov2: dinoV2,
  dinov2_with_registers: dinoV2,
  dinov3_vit: dinoV3,
  siglip_vision_model: (config) => contrastive('siglip', config),
  clip_vision_model: (config) => contrastive('clip', config),
};

/** Vision-language models whose `vision_config` is one of the families above. */
const towers: Record<string, string> = {
  clip: 'clip_vision_model',
  siglip: 'siglip_vision_model',
  internvl: 'internvl_vision',
  internvl_chat: 'intern_vit_6b',
};

export const modelTypes: readonly string[] = [...Object.keys(parsers), ...Object.keys(towers)];

/** The encoder described by a Hugging Face config.json, either alone or as the vision tower of a larger model. */
export function parseEncoderConfig(config: Record<string, unknown>): EncoderConfig {
  const own = encoderJson(config);
  return (parsers[own['model_type'] as string] as (typeof parsers)[string])(own);
}

/**
 * The encoder's own config.json: `config` itself, or that of the vision tower inside it.
 * @throws UniFlowError `UNSUPPORTED` for another model type, `BAD_CHECKPOINT` if the tower is missing.
 */
export function encoderJson(config: Record<string, unknown>): Record<string, unknown> {
  if (!isObject(config)) throw UniFlowError.expected('BAD_INPUT', 'config', "an encoder's config.json as an object", describe(config));
  const type = config['model_type'];
  if (typeof type === 'string' && Object.hasOwn(parsers, type)) return config;
  if (type === 'siglip2' || type === 'siglip2_vision_model')
    throw UniFlowError.expected(
      'UNSUPPORTED',
      'model_type',
      'SigLIP2 of a fixed resolution (model_type siglip)',
      `'${type}', SigLIP2 NaFlex, whose images come as sequences of patches`,
    );
  if (typeof type !== 'string' || !Object.hasOwn(towers, type))
    throw UniFlowError.expected('UNSUPPORTED', 'model_type', `one of ${modelTypes.join(', ')}`, describe(type));
  // older CLIP checkpoints have both; transformers prefers this one
  const inner = config['vision_config_dict'] ?? config['vision_config'];
  if (isObject(inner)) return encoderJson({ model_type: towers[type], ...withoutNulls(inner) });
  throw UniFlowError.expected(
    'BAD_CHECKPOINT',
    `vision_config in the config.json of model_type '${type}'`,
    "an object with the vision encoder's fields",
    inner === undefined || inner === null ? 'none' : describe(inner),
  );
}
