/** UniFlow's own config.json: the published fields, and this library's additions for encoders other than InternViT. */
import { z } from 'zod';
import { checkLevels, type Levels } from './codes.js';
import type { DecoderConfig } from './decoder/decoder.js';
import { MAX_LAYERS, internVitConfig, internVitFields, parseEncoderConfig, size, square, type EncoderConfig } from './encoder/config.js';
import { parseConfig } from './encoder/config-fields.js';
import { UniFlowError } from './errors.js';
import { defaultPreprocessing, type Preprocessing } from './io/preprocess.js';
import { gridOf } from './tensor.js';

const positive = z.number().int().positive();
const natural = z.number().int().nonnegative().max(MAX_LAYERS);
const triple = z.tuple([z.number(), z.number(), z.number()]);

/** The fields that UniFlow adds to its encoder's. */
const decoderFields = {
  latent_ch: positive,
  use_chal_proj: z.literal(true).default(true),
  use_global_blocks: z.boolean().default(true),
  global_blocks_depth: natural.default(6),
  decoder_type: z.literal('mlp').default('mlp'),
  num_decoder_layers: natural.default(12),
  num_sampling_steps: z.union([positive, z.string().regex(/^[1-9]\d*$/)]).default('1'), // a string in the published configs
  use_cfg: z.boolean().default(false),
  use_disp_loss: z.boolean().default(false),
  vit_hidden_size: positive.optional(),
  llm_hidden_size: positive.optional(),
};

/** This library's additions: an encoder of another family or with another default size, its pixel statistics, the source of the latents, and their codes. */
const extraFields = {
  vision_config: z.record(z.string(), z.unknown()).optional(),
  image_mean: triple.optional(),
  image_std: triple.optional(),
  latent_layers: positive.max(MAX_LAYERS).default(1),
  latent_embedding: z.boolean().default(false),
  codes: z.array(z.number()).optional(),
};

/** Typed configuration of a UniFlow model. */
export interface UniFlowConfig {
  encoder: EncoderConfig;
  decoder: DecoderConfig;
  /** Number of latent channels, Z. */
  latentChannels: number;
  /** Latents are projected from the sum of the outputs of this many of the encoder's last layers; with 1, from its tokens. */
  latentLayers: number;
  /** Computes latents in a separate pass through the encoder's blocks, with a second patch embedding, `latent_embedding`. */
  latentEmbedding: boolean;
  /** Latents are discrete: the number of values of each channel of a group. Undefined if they are continuous. */
  codes: Levels | undefined;
  /** Default number of Euler steps of decode(). */
  steps: number;
  /** Default image size; the encoder's position table may be for another size. */
  imageSize: readonly [height: number, width: number];
  patch: number;
  mean: readonly [number, number, number];
  std: readonly [number, number, number];
}

/** @throws UniFlowError `BAD_CHECKPOINT` naming every missing, invalid or unknown field; `UNSUPPORTED` for another model type. */
export function parseUniFlowConfig(json: Record<string, unknown>): UniFlowConfig {
  if (json['model_type'] !== 'uniflow')
    throw UniFlowError.expected(
      'UNSUPPORTED',
      'model_type',
      "'uniflow' (VisionEncoder.load reads plain encoders)",
      `'${String(json['model_type'])}'`,
    );
  const other = json['vision_config'] !== undefined;
  const c = other
    ? {
        ...parseConfig(z.object({ ...decoderFields, ...extraFields, image_size: size.optional() }), json, 'uniflow'),
        encoder: parseEncoderConfig(json['vision_config'] as Record<string, unknown>),
      }
    : parseInternVit(json);
  const encoder = c.encoder;
  if (c.vit_hidden_size !== undefined && c.vit_hidden_size !== encoder.width)
    throw UniFlowError.expected('BAD_CHECKPOINT', 'vit_hidden_size', `hidden_size ${encoder.width}`, String(c.vit_hidden_size));
  if (c.latent_layers > encoder.layers)
    throw UniFlowError.expected('BAD_CHECKPOINT', 'latent_layers', `at most num_hidden_layers ${encoder.layers}`, String(c.latent_layers));
  return uniFlowConfig(encoder, {
    latentChannels: c.latent_ch,
    latentLayers: c.latent_layers,
    latentEmbedding: c.latent_embedding,
    codes: c.codes && checkLevels(c.codes, c.latent_ch, 'BAD_CHECKPOINT'),
    globalBlocks: c.use_global_blocks ? c.global_blocks_depth : 0,
    flowBlocks: c.num_decoder_layers,
    steps: Number(c.num_sampling_steps),
    imageSize: c.image_size === undefined ? encoder.imageSize : square(c.image_size),
    mean: c.image_mean,
    std: c.image_std,
  });
}

function parseInternVit(json: Record<string, unknown>) {
  const c = parseConfig(z.object({ ...internVitFields, ...decoderFields, ...extraFields }), json, 'uniflow');
  return { ...c, encoder: internVitConfig(c) };
}

export interface DecoderShape {
  latentChannels: number;
  latentLayers?: number;
  latentEmbedding?: boolean;
  codes?: Levels | undefined;
  globalBlocks: number;
  flowBlocks: number;
  steps?: number | undefined;
  /** Default: the size that the encoder was trained with. */
  imageSize?: readonly [height: number, width: number];
  mean?: readonly [number, number, number] | undefined;
  std?: readonly [number, number, number] | undefined;
}

export function uniFlowConfig(encoder: EncoderConfig, shape: DecoderShape): UniFlowConfig {
  const { family, patch, width } = encoder;
  const imageSize = shape.imageSize ?? encoder.imageSize;
  const statistics = defaultPreprocessing('internvit', imageSize);
  return {
    encoder,
    decoder: {
      width,
      latentChannels: shape.latentChannels,
      globalBlocks: shape.globalBlocks,
      flowBlocks: shape.flowBlocks,
      hidden: 4 * width,
      patch,
      grid: gridOf(imageSize, patch),
      rope: family === 'internvit' ? encoder.rope : undefined,
    },
    latentChannels: shape.latentChannels,
    latentLayers: shape.latentLayers ?? 1,
    latentEmbedding: shape.latentEmbedding ?? false,
    codes: shape.codes,
    steps: shape.steps ?? 1,
    imageSize,
    patch,
    mean: shape.mean ?? statistics.mean,
    std: shape.std ?? statistics.std,
  };
}

/** The config.json of a UniFlow on `encoder`, whose own config.json is `encoderJson`. InternViT's fields are at the top level. */
export function uniFlowJson(config: UniFlowConfig, encoderJson: Record<string, unknown>): Record<string, unknown> {
  const decoder = {
    latent_ch: config.latentChannels,
    use_chal_proj: true,
    use_global_blocks: config.decoder.globalBlocks > 0,
    global_blocks_depth: config.decoder.globalBlocks,
    decoder_type: 'mlp',
    num_decoder_layers: config.decoder.flowBlocks,
    num_sampling_steps: String(config.steps),
    use_cfg: false,
    use_disp_loss: false,
    vit_hidden_size: config.encoder.width,
    ...(config.latentLayers > 1 ? { latent_layers: config.latentLayers } : {}),
    ...(config.latentEmbedding ? { latent_embedding: true } : {}),
    ...(config.codes ? { codes: config.codes } : {}),
  };
  const own = { model_type: 'uniflow', architectures: ['UniFlowVisionModel'] };
  const statistics = { image_mean: config.mean, image_std: config.std };
  const { family, imageSize } = config.encoder;
  if (family === 'internvit' && imageSize.join() === config.imageSize.join()) return { ...encoderJson, ...own, ...decoder, ...statistics };
  return { ...own, ...decoder, ...statistics, image_size: config.imageSize, vision_config: encoderJson };
}

/** UniFlow's published preprocessing, with this model's statistics. */
export function uniFlowPreprocessing(config: UniFlowConfig): Preprocessing {
  return { mode: 'cover', edgeRatio: 1, filter: 'bicubic', size: config.imageSize, mean: config.mean, std: config.std };
}

/**
 * Sizes of new models: `nano` and `tiny` for tests, `small` for photographs on a CPU (like the bundled model: patches of 8, 48 channels, a flow head wide
 * enough for a patch's noise), `base` like ViT-B/14, `official` like the published model.
 */
export const presets = {
  nano: preset(64, 2, 2, 56, { latent_ch: 16, global_blocks_depth: 1, num_decoder_layers: 2 }),
  tiny: preset(192, 6, 3, 224, { latent_ch: 32, global_blocks_depth: 2, num_decoder_layers: 4 }),
  small: {
    ...preset(256, 2, 8, 224, { latent_ch: 48, global_blocks_depth: 1, num_decoder_layers: 3 }),
    ...{ patch_size: 8, position_embedding_type: 'rope' },
  },
  base: preset(768, 12, 12, 224, { latent_ch: 64, global_blocks_depth: 6, num_decoder_layers: 12 }),
  official: preset(1024, 24, 16, 448, { latent_ch: 64, global_blocks_depth: 6, num_decoder_layers: 12 }),
} as const;
export type Preset = keyof typeof presets;

function preset(width: number, layers: number, heads: number, size: number, decoder: Record<string, number>): Record<string, unknown> {
  return {
    model_type: 'uniflow',
    architectures: ['UniFlowVisionModel'],
    hidden_act: 'gelu',
    hidden_size: width,
    vit_hidden_size: width,
    intermediate_size: 4 * width,
    num_attention_heads: heads,
    num_hidden_layers: layers,
    num_channels: 3,
    image_size: size,
    patch_size: 14,
    layer_norm_eps: 1e-6,
    norm_type: 'layer_norm',
    qk_normalization: false,
    qkv_bias: true,
    use_chal_proj: true,
    use_global_blocks: true,
    decoder_type: 'mlp',
    num_sampling_steps: '1',
    use_cfg: false,
    use_disp_loss: false,
    ...decoder,
  };
}
