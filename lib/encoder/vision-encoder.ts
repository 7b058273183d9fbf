/** A pretrained vision encoder of any supported family, as users hold it. */
import type { NdArray } from 'ndarray';
import { join } from 'node:path';
import { UniFlowError } from '../errors.js';
import { checkBatchSize } from '../gather.js';
import { Checkpoint, CheckpointSource, readJson, saveCheckpoint, saveOptions, type SaveOptions } from '../io/checkpoint.js';
import { pathExists } from '../io/files.js';
import { resolveModel, type HubOptions } from '../io/hub.js';
import { batchesOf, type ImageInput } from '../images/input.js';
import { applyProcessorConfig, defaultPreprocessing, processorConfig, nativeNormalisation, type Preprocessing } from '../io/preprocess.js';
import { native, type FloatType } from '../native.js';
import { RandomSource, type Parameter } from '../parameters.js';
import { checkDevice, type DeviceOptions } from '../device.js';
import { onDevice, type Grid } from '../tensor.js';
import { parseEncoderConfig, type EncoderConfig } from './config.js';
import { Encoder } from './encoder.js';
import { families, towerPrefixes } from './families.js';

export interface LoadOptions extends DeviceOptions, HubOptions {}

export interface EncodeOptions {
  /** Height and width that pictures are brought to; a number means a square. Default: what the encoder was trained on. */
  size?: number | readonly [height: number, width: number];
  /** Every layer's output as well. */
  hiddenStates?: boolean;
  /** Images computed together. Default: as many as make about 4,096 tokens. */
  batchSize?: number;
  signal?: AbortSignal;
}

export interface EncoderResult {
  /** float32 [B,S,D], after the final norm where the family has one. S counts class and register tokens, which come first. */
  lastHiddenState: NdArray;
  /** float32 [B,S,D] x (L+1) when asked for; [0] is the embedding. */
  hiddenStates?: NdArray[];
  grid: Grid;
}

/** Pretrained vision encoder: InternViT, InternVL, DINOv2 (registers, SwiGLU), DINOv3, SigLIP/SigLIP2, CLIP. */
export class VisionEncoder {
  private constructor(
    /** @internal */ readonly encoder: Encoder,
    /** The checkpoint's config.json of the encoder itself. */
    readonly configJson: Record<string, unknown>,
    readonly preprocessing: Preprocessing,
    readonly parameters: readonly Parameter[],
    /** Where the encoder is, `'cpu'` or `'cuda:0'`. */
    readonly device: string,
    readonly dtype: FloatType,
  ) {}

  /**
   * Loads an encoder from its Hugging Face folder, or from the hub by `owner/name`. A larger model (CLIP, SigLIP, InternVL) gives its
   * vision tower.
   * @throws UniFlowError `BAD_CHECKPOINT` listing every misfit, `UNSUPPORTED` for another model type.
   */
  static async load(model: string, options: LoadOptions = {}): Promise<VisionEncoder> {
    const placement = checkDevice(options);
    const dir = await resolveModel(model, options);
    const checkpoint = await Checkpoint.open(dir);
    const config = parseEncoderConfig(checkpoint.config);
    const preprocessing = await readPreprocessing(dir, config);
    const prefix = towerPrefix(checkpoint, config);
    const source = new CheckpointSource(checkpoint, placement, prefix);
    return source.guard(async () => {
      const encoder = new Encoder(config, source, nativeNormalisation(preprocessing), placement.dtype);
      await source.finish(families[config.family].ignore);
      return new VisionEncoder(
        encoder,
        encoderJson(checkpoint.config),
        preprocessing,
        source.parameters,
        placement.device,
        placement.dtype,
      );
    });
  }

  /** A randomly initialised encoder, as a Hugging Face config.json says: one to train. */
  static random(config: Record<string, unknown>, { seed = 0, ...device }: DeviceOptions & { seed?: number } = {}): VisionEncoder {
    const placement = checkDevice(device);
    const parsed = parseEncoderConfig(config);
    const preprocessing = defaultPreprocessing(parsed.family, parsed.imageSize);
    const source = new RandomSource(placement, seed);
    return source.guard(() => {
      const encoder = new Encoder(parsed, source, nativeNormalisation(preprocessing), placement.dtype);
      return new VisionEncoder(encoder, encoderJson(config), preprocessing, source.parameters, placement.device, placement.dtype);
    });
  }

  get config(): EncoderConfig {
    return this.encoder.config;
  }

  /** Tokens in front of the patch tokens: class token and registers. */
  get prefixTokens(): number {
    return this.encoder.prefix;
  }

  /** Images to tokens. Pictures are decoded, resized and cropped as this encoder's published preprocessing does. */
  async encode(images: ImageInput, options: EncodeOptions = {}): Promise<EncoderResult> {
    const batches = batchesOf(images, this.preprocessing, this.config.patch, this.device, options);
    try {
      const grid = { rows: batches.size[0] / this.config.patch, cols: batches.size[1] / this.config.patch };
      const [last, ...states] = await this.encoder.running({
        device: this.device,
        count: batches.count,
        batchSize: checkBatchSize(options.batchSize, grid.rows * grid.cols),
        signal: options.signal,
        load: async (begin, end) => [await batches.load(begin, end)],
        forward: ([pixels]) => {
          const out = this.encoder.forward(pixels!, { states: options.hiddenStates ?? false });
          return [out.last, ...out.states];
        },
      });
      return { lastHiddenState: last as NdArray, grid, ...(options.hiddenStates ? { hiddenStates: states } : {}) };
    } finally {
      batches.dispose();
    }
  }

  /** Writes the encoder as a Hugging Face folder. */
  async save(dir: string, options: SaveOptions = {}): Promise<void> {
    const checked = saveOptions(options, this.dtype);
    const json = {
      'config.json': { ...this.configJson, dtype: checked.dtype },
      'preprocessor_config.json': processorConfig(this.preprocessing),
    };
    await saveCheckpoint(dir, json, this.parameters, checked);
  }

  /** Frees the weights; resolves when they are gone. */
  async dispose(): Promise<void> {
    this.encoder.invalidate();
    for (const { tensor } of this.parameters) tensor.dispose();
    await onDevice(this.device, () => native.synchronize());
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }
}

/** The vision tower's own config.json, where it was inside a larger one. */
function encoderJson(config: Record<string, unknown>): Record<string, unknown> {
  const inner = config['vision_config'];
  if (!inner || typeof inner !== 'object') return config;
  const towers: Record<string, string> = {
    clip: 'clip_vision_model',
    siglip: 'siglip_vision_model',
    internvl: 'internvl_vision',
    internvl_chat: 'intern_vit_6b',
  };
  return { model_type: towers[String(config['model_type'])], ...inner };
}

function towerPrefix(checkpoint: Checkpoint, config: EncoderConfig): string {
  const patch = `${families[config.family].patch}.weight`;
  const prefix = towerPrefixes.find((p) => checkpoint.tensors.has(p + patch));
  if (prefix === undefined)
    throw UniFlowError.expected('BAD_CHECKPOINT', checkpoint.path, `a ${config.family} vision encoder with ${patch}`, 'no such tensor');
  return prefix;
}

async function readPreprocessing(dir: string, config: EncoderConfig): Promise<Preprocessing> {
  const base = defaultPreprocessing(config.family, config.imageSize);
  const path = join(dir, 'preprocessor_config.json');
  return (await pathExists(path)) ? applyProcessorConfig(base, await readJson(path), path) : base;
}
