/** The settings of a training run: the options of `uniflow train` and the contents of a run's train.json. */
import { access } from 'node:fs/promises';
import { z } from 'zod';
import { checkLevels } from '../codes.js';
import { presets } from '../config.js';
import { UniFlowError } from '../errors.js';
import { readJson } from '../io/json.js';
import { DEFAULT_BETA } from '../losses/distillation.js';
import { regimes, type Regime } from './regimes.js';

const positive = z.int().positive();
const natural = z.int().nonnegative();
const atLeast0 = z.number().nonnegative();
const share = z.number().min(0).max(1);
const keys = <T extends object>(of: T) => Object.keys(of) as [keyof T & string, ...(keyof T & string)[]];

export const trainSchema = z.strictObject({
  /** Encoder to build a tokenizer on: a Hugging Face folder or name. It is also the teacher. */
  encoder: z.string().optional(),
  /** UniFlow model to continue training. Its current encoder is the teacher. */
  model: z.string().optional(),
  /**
   * A new model with random weights: a preset, or the contents of a config.json. It has no teacher, so the regime must be `finetune` or
   * `frozen`.
   */
  init: z.union([z.enum(keys(presets)), z.record(z.string(), z.unknown())]).optional(),

  /**
   * Initialisation of projection and decoder, and of a new encoder: the linear codec of the data's patches (docs/training.md), or random.
   * Default: linear. A `model` keeps its weights.
   */
  start: z.enum(['linear', 'random']).optional(),

  /** Training data, in any form that openDataset accepts. */
  data: z.string(),
  /** Validation data for PSNR and SSIM; never trained on. */
  validation: z.string().optional(),
  /** Maximum number of validation images; the first ones are used. */
  validationImages: positive.default(64),
  /** Height and width. Default: the model's. */
  size: positive.optional(),
  /** Range of the random crops' area, as a fraction of the image. */
  scale: z.tuple([share, share]).default([0.3, 1]),
  flip: z.boolean().default(true),

  /** Latent channels of a tokenizer on `encoder`. */
  latentChannels: positive.default(64),
  /** Discrete latents of a new tokenizer: the number of values of each channel of a group (docs/codes.md). Default: continuous latents. */
  codes: z.array(positive).optional(),
  /** Number of the encoder's last layers whose sum the latents are projected from. Default: 4 in the regime `layers`, else 1. */
  latentLayers: positive.optional(),
  globalBlocks: natural.default(6),
  flowBlocks: natural.default(12),

  regime: z.enum(keys(regimes)).default('adaptive'),
  beta: z.number().default(DEFAULT_BETA),
  lambdaFlow: atLeast0.default(1),
  lambdaDistillation: atLeast0.default(1),
  /** Distribution of the times: uniform, or logit-normal with this mean and standard deviation. */
  time: z
    .union([z.literal('uniform'), z.strictObject({ zero: share.default(0), mean: z.number(), std: z.number().positive() })])
    .default('uniform'),

  steps: positive,
  batch: positive.default(16),
  accumulate: positive.default(1),
  recompute: z.boolean().default(false),
  lr: atLeast0.default(1e-4),
  /** Default: lr. */
  encoderLr: atLeast0.optional(),
  /** Number of steps in which the learning rates rise. */
  warmup: natural.default(100),
  /** Final value of the cosine schedule, as a fraction of the learning rates. */
  lrFloor: share.default(0),
  weightDecay: atLeast0.default(0.05),
  clipNorm: atLeast0.default(1),
  betas: z.tuple([share, share]).default([0.9, 0.95]),
  ema: share.default(0.999),
  maxSkipped: positive.default(10),

  dtype: z.enum(['float32', 'bfloat16']).default('bfloat16'),
  seed: natural.default(0),
  /** Number of steps between validations; also runs at the end. */
  validateEvery: positive.default(500),
  /** Number of steps between checkpoints; also written at the end, and on a signal. */
  checkpointEvery: positive.default(500),
});

/** Settings as written by users; fields with defaults are optional. */
export type TrainConfig = z.input<typeof trainSchema>;
/** Settings with all defaults filled in. */
export type FullTrainConfig = z.output<typeof trainSchema>;

/**
 * Reads settings from a JSON file, without validating them. @throws UniFlowError `NOT_FOUND`, or `BAD_CHECKPOINT` if it is not a JSON
 * object.
 */
export async function readSettings(path: string): Promise<Record<string, unknown>> {
  await access(path).catch((cause: unknown) => {
    throw UniFlowError.expected('NOT_FOUND', path, 'the settings of a training run', 'no such file', cause);
  });
  return readJson(path);
}

const WITHOUT_TEACHER: readonly Regime[] = ['finetune', 'frozen'];
/** These regimes choose the source of the latents, which an existing model has already fixed. */
const ON_AN_ENCODER: readonly Regime[] = ['layers', 'reparam'];

/** @throws UniFlowError `BAD_INPUT` listing every missing, invalid or unknown setting. */
export function parseTrainConfig(config: unknown): FullTrainConfig {
  const parsed = trainSchema.safeParse(config);
  if (!parsed.success) {
    const problems = parsed.error.issues.map(({ path, message }) => `${path.join('.') || 'settings'}: ${message}`);
    throw new UniFlowError('BAD_INPUT', `the settings of the training do not fit:\n  ${problems.join('\n  ')}`, { subject: 'config' });
  }
  const { encoder, model, init, regime, batch, accumulate } = parsed.data;
  const starts = [encoder, model, init].filter((start) => start !== undefined).length;
  if (starts !== 1)
    throw UniFlowError.expected(
      'BAD_INPUT',
      'config',
      "one of 'encoder', 'model' and 'init' to start from",
      starts === 0 ? 'none' : 'several',
    );
  if (init !== undefined && !WITHOUT_TEACHER.includes(regime))
    throw UniFlowError.expected('BAD_INPUT', 'regime', "'finetune' or 'frozen', as a new model has no teacher", `'${regime}'`);
  if (model !== undefined && ON_AN_ENCODER.includes(regime))
    throw UniFlowError.expected('BAD_INPUT', 'regime', "'frozen', as a model says where its latents come from", `'${regime}'`);
  if (model !== undefined && parsed.data.start !== undefined)
    throw UniFlowError.expected('BAD_INPUT', 'start', 'none, as a model begins as it is', `'${parsed.data.start}'`);
  checkCodes(parsed.data);
  if (batch % accumulate !== 0)
    throw UniFlowError.expected('BAD_INPUT', 'batch', `a multiple of ${accumulate} (accumulate)`, String(batch));
  return parsed.data;
}

/** @throws UniFlowError `BAD_INPUT` if the codes do not fit the new model's latents, or the model is not new. */
function checkCodes({ codes, model, init, latentChannels }: FullTrainConfig): void {
  if (!codes) return;
  if (model !== undefined)
    throw UniFlowError.expected('BAD_INPUT', 'codes', 'none, as a model keeps the latents that it has', `[${codes.join(', ')}]`);
  const config: Record<string, unknown> | undefined = typeof init === 'string' ? presets[init] : init;
  checkLevels(codes, config ? Number(config['latent_ch']) : latentChannels, 'BAD_INPUT');
}
