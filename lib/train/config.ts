/** The settings of a training run: what `uniflow train` takes as options, and what train.json of a run holds. */
import { access } from 'node:fs/promises';
import { z } from 'zod';
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
  /** Encoder to make a tokenizer of: a Hugging Face folder or name. It is the teacher as well. */
  encoder: z.string().optional(),
  /** UniFlow model to go on from. Its encoder, as it is now, is the teacher. */
  model: z.string().optional(),
  /** A new model with random weights: a preset, or a config.json's content. There is no teacher then: regime `finetune` or `frozen`. */
  init: z.union([z.enum(keys(presets)), z.record(z.string(), z.unknown())]).optional(),

  /**
   * How projection and decoder begin, and a new encoder: as the linear codec of the data's patches (docs/training.md), or at random. Default: linear.
   * A `model` begins as it is.
   */
  start: z.enum(['linear', 'random']).optional(),

  /** Data to train on, as openDataset takes it. */
  data: z.string(),
  /** Data to measure PSNR and SSIM on; never trained on. */
  validation: z.string().optional(),
  /** At most so many of them, the first. */
  validationImages: positive.default(64),
  /** Height and width; default: the model's. */
  size: positive.optional(),
  /** Random crops cover so much of the picture's area. */
  scale: z.tuple([share, share]).default([0.3, 1]),
  flip: z.boolean().default(true),

  /** Of a tokenizer on `encoder`. */
  latentChannels: positive.default(64),
  /** Of the encoder's last layers, those whose sum the latents are projected from. Default: 4 in the regime `layers`, else 1. */
  latentLayers: positive.optional(),
  globalBlocks: natural.default(6),
  flowBlocks: natural.default(12),

  regime: z.enum(keys(regimes)).default('adaptive'),
  beta: z.number().default(DEFAULT_BETA),
  lambdaFlow: atLeast0.default(1),
  lambdaDistillation: atLeast0.default(1),
  /** How times are drawn: uniformly, or logit-normal with this mean and deviation. */
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
  /** Steps in which the learning rates rise. */
  warmup: natural.default(100),
  /** Where the cosine ends, as a share of the learning rates. */
  lrFloor: share.default(0),
  weightDecay: atLeast0.default(0.05),
  clipNorm: atLeast0.default(1),
  betas: z.tuple([share, share]).default([0.9, 0.95]),
  ema: share.default(0.999),
  maxSkipped: positive.default(10),

  dtype: z.enum(['float32', 'bfloat16']).default('bfloat16'),
  seed: natural.default(0),
  /** Steps between two validations; also at the end. */
  validateEvery: positive.default(500),
  /** Steps between two checkpoints; also at the end, and on a signal. */
  checkpointEvery: positive.default(500),
});

/** Settings as they are written; defaults may be left out. */
export type TrainConfig = z.input<typeof trainSchema>;
/** Settings with every default. */
export type FullTrainConfig = z.output<typeof trainSchema>;

/** The settings in a JSON file, not checked yet. @throws UniFlowError `NOT_FOUND`, or `BAD_CHECKPOINT` where it is no JSON object. */
export async function readSettings(path: string): Promise<Record<string, unknown>> {
  await access(path).catch((cause: unknown) => {
    throw UniFlowError.expected('NOT_FOUND', path, 'the settings of a training run', 'no such file', cause);
  });
  return readJson(path);
}

const WITHOUT_TEACHER: readonly Regime[] = ['finetune', 'frozen'];
/** They say where latents come from, which a model has decided already. */
const ON_AN_ENCODER: readonly Regime[] = ['layers', 'reparam'];

/** @throws UniFlowError `BAD_INPUT` listing every setting that is missing, wrong or unknown. */
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
  if (batch % accumulate !== 0)
    throw UniFlowError.expected('BAD_INPUT', 'batch', `a multiple of ${accumulate} (accumulate)`, String(batch));
  return parsed.data;
}
