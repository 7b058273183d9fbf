/** A pretrained vision encoder of any supported family: the public class. */
import type { NdArray } from 'ndarray';
import { UniFlowError } from '../errors.js';
import { checkBatchSize } from '../gather.js';
import { Checkpoint, CheckpointSource, saveCheckpoint, saveOptions, withDtype, type Carried, type SaveOptions } from '../io/checkpoint.js';
import { jsonText } from '../io/json.js';
import { resolveModel, type HubOptions } from '../io/hub.js';
import { batchesOf, type ImageInput } from '../images/input.js';
import { defaultPreprocessing, nativeNormalisation, type Preprocessing } from '../io/preprocess.js';
import { readProcessor } from '../io/processor.js';
import { native, type FloatType } from '../native.js';
import { RandomSource, type Parameter } from '../parameters.js';
import { isInt8, quantizationAtLoad, quantizationMetadata, quantizeModel, type Quantization, type QuantizeOptions } from '../quantize.js';
import { checkDevice, refuseInt8, type DeviceOptions, type ModelType } from '../device.js';
import { gridOf, onDevice, type Grid } from '../tensor.js';
import { encoderJson, parseEncoderConfig, type EncoderConfig } from './config.js';
import { embedImages, type EmbedOptions } from './embed.js';
import { Encoder } from './encoder.js';
import { families, towerPrefixes } from './families.js';
import { PoolingHead } from './head.js';
import type { Pool } from './pooling.js';

export interface LoadOptions extends DeviceOptions, HubOptions {}

export interface EncodeOptions {
  /** Height and width to which images are resized; a number means a square. Default: the processor's. */
  size?: number | readonly [height: number, width: number];
  /** Also returns every layer's output. */
  hiddenStates?: boolean;
  /** Images computed together. Default: as many as make up about 4,096 tokens, on a GPU 32,000. */
  batchSize?: number;
  signal?: AbortSignal;
}

export interface EncoderResult {
  /** float32 [B,S,D], after the final norm if the family has one. S counts class and register tokens, which come first. */
  lastHiddenState: NdArray;
  /** float32 [B,S,D] x (L+1), if requested; [0] is the embedding. */
  hiddenStates?: NdArray[];
  grid: Grid;
}

/** Pretrained vision encoder: InternViT, InternVL, DINOv2 (registers, SwiGLU), DINOv3, SigLIP/SigLIP2, CLIP. */
export class VisionEncoder {
  private constructor(
    /** @internal */ readonly encoder: Encoder,
    /** The encoder's own config.json in the checkpoint. */
    readonly configJson: Record<string, unknown>,
    readonly preprocessing: Preprocessing,
    readonly parameters: readonly Parameter[],
    /** The encoder's device, `'cpu'` or `'cuda:0'`. */
    readonly device: string,
    readonly dtype: FloatType,
    /** Written by `save` unchanged from the checkpoint. */
    private readonly untouched: { carried: readonly Carried[]; files: Record<string, string> },
    /** @internal */ readonly head?: PoolingHead,
  ) {}

  /**
   * Loads an encoder from its Hugging Face folder, or from the hub by `owner/name`. For a larger model (CLIP, SigLIP, InternVL) this is the vision tower.
   * @throws UniFlowError `BAD_CHECKPOINT` listing every mismatch, `UNSUPPORTED` for another model type.
   */
  static async load(model: string, options: LoadOptions = {}): Promise<VisionEncoder> {
    const placement = checkDevice(options);
    const dir = await resolveModel(model, options);
    const checkpoint = await Checkpoint.open(dir);
    const config = parseEncoderConfig(checkpoint.config);
    const { preprocessing, files } = await readProcessor(dir, defaultPreprocessing(config.family, config.imageSize));
    const prefix = towerPrefix(checkpoint, config);
    const source = new CheckpointSource(checkpoint, placement, prefix);
    return source.guard(async () => {
      const encoder = new Encoder(config, source, nativeNormalisation(preprocessing), placement.dtype);
      const carried = await source.finish(families[config.family].unused);
      const { parameters } = source;
      const { device, dtype } = placement;
      const head = PoolingHead.of(checkpoint, config, placement, prefix);
      const about = { carried, files };
      const loaded = new VisionEncoder(encoder, encoderJson(checkpoint.config), preprocessing, parameters, device, dtype, about, head);
      if (placement.int8) loaded.gate = await quantizationAtLoad(checkpoint, () => loaded.quantize(undefined, { signal: options.signal }));
      return loaded;
    });
  }

  /** A randomly initialised encoder with the architecture of a Hugging Face config.json, for training. */
  static random(config: Record<string, unknown>, { seed = 0, ...device }: DeviceOptions & { seed?: number } = {}): VisionEncoder {
    const placement = checkDevice(device);
    refuseInt8(placement);
    const parsed = parseEncoderConfig(config);
    const preprocessing = defaultPreprocessing(parsed.family, parsed.imageSize);
    const source = new RandomSource(placement, seed);
    return source.guard(() => {
      const encoder = new Encoder(parsed, source, nativeNormalisation(preprocessing), placement.dtype);
      const { device, dtype } = placement;
      const untouched = { carried: [], files: {} };
      return new VisionEncoder(encoder, encoderJson(config), preprocessing, source.parameters, device, dtype, untouched);
    });
  }

  get config(): EncoderConfig {
    return this.encoder.config;
  }

  private gate: Quantization | undefined;

  /** How the layers came through {@link quantize}, now or when the checkpoint was made; undefined if none is int8. */
  get quantization(): Quantization | undefined {
    return this.gate;
  }

  /** Type of the products: that of the activations, or int8. */
  get precision(): ModelType {
    return isInt8(this.parameters) ? 'int8' : this.dtype;
  }

  /** Number of tokens before the patch tokens: class token and registers. */
  get prefixTokens(): number {
    return this.encoder.prefix;
  }

  /** Encodes images to tokens. Images are decoded, resized and cropped as in this encoder's published preprocessing. */
  async encode(images: ImageInput, options: EncodeOptions = {}): Promise<EncoderResult> {
    const batches = batchesOf(images, this.preprocessing, this.config.patch, this.device, options);
    try {
      const grid = gridOf(batches.size, this.config.patch);
      const [last, ...states] = await this.encoder.running({
        device: this.device,
        count: batches.count,
        batchSize: checkBatchSize(options.batchSize, grid.rows * grid.cols, this.device),
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

  /** As {@link UniFlow.quantize}: replaces the weights of layers by int8 ones if they come out close enough on these images. */
  async quantize(images?: ImageInput, options: QuantizeOptions = {}): Promise<Quantization> {
    const { parameters, device, preprocessing, config } = this;
    const model = { parameters, device, preprocessing, patch: config.patch };
    this.gate = await quantizeModel({ ...model, run: (pixels) => void this.encoder.forward(pixels) }, images, options);
    return this.gate;
  }

  /**
   * The {@link Pool} of `embed` if none is given: the checkpoint's pooling head; without one, the class token of the families whose class token is trained to
   * represent the image (DINOv2, DINOv3, CLIP), else the mean of the patch tokens.
   */
  get defaultPool(): Pool {
    if (this.head) return 'head';
    return families[this.config.family].classTokenIsImage ? 'cls' : 'mean';
  }

  /** One vector per image, float32 [B,E], for search and classification. Images are prepared as for {@link encode}. */
  async embed(images: ImageInput, options: EmbedOptions = {}): Promise<NdArray<Float32Array>> {
    return embedImages(this, images, options);
  }

  /**
   * Writes the encoder as a Hugging Face folder, with the parts of its checkpoint that this library does not use (a pooling head, a mask token, the
   * processor's files). For a larger model, only the vision tower is written.
   */
  async save(dir: string, options: SaveOptions = {}): Promise<void> {
    const checked = saveOptions(options, this.dtype);
    const { carried, files } = this.untouched;
    const config = jsonText(withDtype(this.configJson, checked.dtype, 'dtype'));
    const metadata = quantizationMetadata(this.gate);
    await saveCheckpoint(dir, { files: { 'config.json': config, ...files }, parameters: this.parameters, carried, metadata }, checked);
  }

  /** Frees the weights; resolves when they are freed. */
  async dispose(): Promise<void> {
    this.encoder.invalidate();
    await this.head?.dispose();
    for (const { tensor } of this.parameters) tensor.dispose();
    await onDevice(this.device, () => native.synchronize());
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }
}

/** @throws UniFlowError `BAD_CHECKPOINT` naming what the checkpoint contains instead. */
function towerPrefix(checkpoint: Checkpoint, config: EncoderConfig): string {
  const patch = `${families[config.family].patch}.weight`;
  const prefix = checkpoint.prefixOf(patch, towerPrefixes);
  if (prefix !== undefined) return prefix;
  const names = [...checkpoint.tensors.keys()];
  const alike = names.filter((name) => name.endsWith(patch));
  const perModule = [...new Map(names.map((name) => [name.split('.')[0], name])).values()];
  const shown = (alike.length > 0 ? alike : perModule).slice(0, 5);
  const found = `${names.length} tensors, among them ${shown.join(', ')}`;
  const expected = `a ${config.family} vision encoder: one tensor ${patch}, with or without a prefix`;
  throw UniFlowError.expected('BAD_CHECKPOINT', checkpoint.path, expected, found);
}
