/** The UniFlow tokenizer: encoder, latent projection, pixel flow decoder. */
import type { NdArray } from 'ndarray';
import { Pipeline } from './shards/pipeline.js';
import { MAX_LAYERS } from './encoder/config.js';
import { isObject } from './encoder/config-fields.js';
import {
  parseUniFlowConfig,
  presets,
  uniFlowConfig,
  uniFlowJson,
  uniFlowPreprocessing,
  type Preset,
  type UniFlowConfig,
} from './config.js';
import { checkInteger, checkOptions, describe } from './check.js';
import { Decoder } from './decoder/decoder.js';
import { checkDecoding, type DecodeOptions } from './decoder/options.js';
import { checkDevice, type DeviceOptions } from './device.js';
import { Encoder, type EncoderOutput, type ForwardOptions } from './encoder/encoder.js';
import { families } from './encoder/families.js';
import { VisionEncoder, type EncodeOptions as EncoderOptions, type LoadOptions } from './encoder/vision-encoder.js';
import { UniFlowError } from './errors.js';
import { checkBatchSize, runBatches } from './gather.js';
import { Checkpoint, CheckpointSource, saveCheckpoint, saveOptions, withDtype, type SaveOptions } from './io/checkpoint.js';
import { jsonText } from './io/json.js';
import { resolveModel } from './io/hub.js';
import { batchesOf, floats, type Batches, type ImageInput } from './images/input.js';
import { readerOf, type ImageLike } from './images/like.js';
import { nativeNormalisation } from './io/preprocess.js';
import { native, type FloatType, type NativeNormalisation } from './native.js';
import { embeddedModel } from './package.js';
import { assignParameter, GAIN, RandomSource, SharedSource, type Parameter, type ParameterSource } from './parameters.js';
import { startedOn } from './start/index.js';
import { cast, checkFinite, imageQuality, linear, sliceTokens, toUint8, type Linear } from './ops.js';
import type { Item } from './sources/item.js';
import { gridOf, onDevice, Tensor, type Grid } from './tensor.js';

export type { DecodeOptions } from './decoder/options.js';

export interface EncodeOptions extends EncoderOptions {
  /** The semantic tokens as well: the encoder's patch tokens. */
  tokens?: boolean;
}

export interface Encoded {
  /** float32 [B,N,Z] */
  latents: NdArray;
  /** float32 [B,N,D] when asked for. */
  tokens?: NdArray;
  /** float32 [B,S,D] x (L+1) when asked for; [0] is the embedding, S counts class and register tokens. */
  hiddenStates?: NdArray[];
  grid: Grid;
}

export interface Reconstruction extends Encoded {
  /** As `decode` gives them. */
  images: NdArray;
  /** The preprocessed originals, uint8 [B,H,W,3]: as much of them as the patches cover. */
  originals: NdArray<Uint8Array>;
  /** Means over the images, in dB and in [-1, 1]. */
  psnr: number;
  ssim: number;
  perImage: { psnr: number[]; ssim: number[] };
}

/** The decoder of a tokenizer on a pretrained encoder. */
export interface FreshOptions {
  /** Z. Default 64. */
  latentChannels?: number;
  /** Latents are projected from the sum of the outputs of so many of the encoder's last layers. Default 1: from its tokens. */
  latentLayers?: number;
  /**
   * Latents come from a pass of their own through the encoder's blocks, behind a second patch embedding, which begins as a copy of the
   * encoder's: with the encoder frozen, that embedding can learn while the tokens stay what they are. Default false.
   */
  latentEmbedding?: boolean;
  /** Default 6. */
  globalBlocks?: number;
  /** Default 12. */
  flowBlocks?: number;
  /** Default 0. */
  seed?: number;
}

/** Of {@link UniFlow.random}. */
export interface RandomOptions extends DeviceOptions {
  /** Of the random weights. Default 0. */
  seed?: number;
  /** Images to start from, as openDataset takes them. */
  photos?: string;
  /** Ends the reading of `photos`. */
  signal?: AbortSignal;
}

/** A picture with the name that comes back with its latents. */
export type StreamItem = ImageLike | { id: string; image: ImageLike };

export interface EncodedBatch extends Encoded {
  ids: string[];
}

/** A unified visual tokenizer (arXiv 2510.10575). */
export class UniFlow {
  /** @internal */ readonly encoder: Encoder;
  /** @internal */ readonly decoder: Decoder;
  private readonly down: [Linear, Linear];
  private readonly latentEmbedding: Linear | undefined;
  /** @internal */ readonly normalisation: NativeNormalisation;
  /** @internal Those of {@link parameters} that are the encoder's. */
  readonly encoderParameters: readonly Parameter[];

  private constructor(
    readonly config: UniFlowConfig,
    /** As in config.json. */
    readonly configJson: Record<string, unknown>,
    /** Where the model is, `'cpu'` or `'cuda:0'`. */
    readonly device: string,
    readonly dtype: FloatType,
    encoderSource: ParameterSource,
    decoderSource: ParameterSource,
  ) {
    const { width, family } = config.encoder;
    this.normalisation = nativeNormalisation(config);
    this.encoder = encoderSource.within(encoderPrefix(family), () => new Encoder(config.encoder, encoderSource, this.normalisation, dtype));
    this.encoderParameters = [...encoderSource.parameters];
    this.down = [
      decoderSource.linear('chal_proj.c_fc', width, width),
      decoderSource.linear('chal_proj.c_proj', config.latentChannels, width, { gain: GAIN.gelu }),
    ];
    this.decoder = new Decoder(config.decoder, decoderSource, this.normalisation);
    this.latentEmbedding = config.latentEmbedding ? this.encoder.makeEmbedding(decoderSource, LATENT_EMBEDDING) : undefined;
    this.parameters = [...new Set([...encoderSource.parameters, ...decoderSource.parameters])];
  }

  /** All parameters under their checkpoint names. */
  readonly parameters: readonly Parameter[];

  /**
   * Loads a UniFlow checkpoint from a folder, or from the Hugging Face hub by `owner/name`.
   * @param model default: {@link embeddedModel}, a small tokenizer for photographs.
   * @throws UniFlowError `BAD_CHECKPOINT` listing every misfit between config.json and the tensors.
   */
  static async load(model: string = embeddedModel, options: LoadOptions = {}): Promise<UniFlow> {
    const placement = checkDevice(options);
    const checkpoint = await Checkpoint.open(await resolveModel(model, options));
    const config = parseUniFlowConfig(checkpoint.config);
    const source = new CheckpointSource(checkpoint, placement, checkpoint.prefixOf('chal_proj.c_fc.weight'));
    return source.guard(async () => {
      const uniflow = new UniFlow(config, checkpoint.config, placement.device, placement.dtype, source, source);
      await source.finish();
      return uniflow;
    });
  }

  /**
   * A tokenizer on a pretrained encoder, whose weights it shares; projection and decoder start at random. Its size is that of the encoder's
   * processor. What the encoder's checkpoint has besides (a pooling head, a mask token) is not part of a tokenizer, nor saved with it.
   * @throws UniFlowError `BAD_INPUT`.
   */
  static fromEncoder(encoder: VisionEncoder, options: FreshOptions = {}): UniFlow {
    if (!(encoder instanceof VisionEncoder)) throw UniFlowError.expected('BAD_INPUT', 'encoder', 'a VisionEncoder', describe(encoder));
    checkOptions(options);
    const { latentChannels = 64, latentLayers = 1, latentEmbedding = false, globalBlocks = 6, flowBlocks = 12, seed = 0 } = options;
    checkInteger('latentChannels', latentChannels, 1, 65536);
    checkInteger('latentLayers', latentLayers, 1, encoder.config.layers);
    checkInteger('globalBlocks', globalBlocks, 0, MAX_LAYERS);
    checkInteger('flowBlocks', flowBlocks, 0, MAX_LAYERS);
    checkInteger('seed', seed, 0, Number.MAX_SAFE_INTEGER);
    const { mean, std, size } = encoder.preprocessing;
    const latents = { latentChannels, latentLayers, latentEmbedding };
    const config = uniFlowConfig(encoder.config, { ...latents, globalBlocks, flowBlocks, imageSize: size, mean, std });
    const { device, dtype } = encoder;
    const placement = { device, dtype, float8: false };
    const shared = new SharedSource(placement, encoder.parameters, encoderPrefix(encoder.config.family));
    const fresh = new RandomSource(placement, seed);
    const json = uniFlowJson(config, encoder.configJson);
    return shared.guard(() =>
      fresh.guard(() => {
        const uniflow = new UniFlow(config, json, device, dtype, shared, fresh);
        if (latentEmbedding) uniflow.copyEmbedding();
        return uniflow;
      }),
    );
  }

  /** Makes the latents' patch embedding a copy of the encoder's. */
  private copyEmbedding(): void {
    const byName = new Map(this.parameters.map((parameter) => [parameter.parts[0]?.name, parameter]));
    const { family } = this.config.encoder;
    for (const part of ['weight', 'bias']) {
      const [from, to] = [`${encoderPrefix(family)}${families[family].patch}`, LATENT_EMBEDDING].map((name) =>
        byName.get(`${name}.${part}`),
      );
      if (!from || !to) continue; // CLIP's has no bias
      onDevice(this.device, () => {
        const value = native.copyParameter(from.tensor.handle, 'float32');
        assignParameter(to, value, this.dtype);
        value.dispose();
      });
    }
  }

  /**
   * A new model, of a preset's size or as a config.json says: with random weights, or, with `photos`, as the linear codec of their patches
   * (lib/start).
   */
  static random(config: Preset | Record<string, unknown>, options?: RandomOptions & { photos?: undefined }): UniFlow;
  static random(config: Preset | Record<string, unknown>, options: RandomOptions): Promise<UniFlow>;
  static random(
    config: Preset | Record<string, unknown>,
    { seed = 0, photos, signal, ...device }: RandomOptions = {},
  ): UniFlow | Promise<UniFlow> {
    const json = typeof config !== 'string' ? config : Object.hasOwn(presets, config) ? presets[config] : undefined;
    if (!isObject(json)) throw UniFlowError.expected('BAD_INPUT', 'preset', Object.keys(presets).join(', '), describe(config));
    const placement = checkDevice(device);
    const source = new RandomSource(placement, seed);
    const parsed = parseUniFlowConfig(json);
    const uniflow = source.guard(() => new UniFlow(parsed, json, placement.device, placement.dtype, source, source));
    return photos === undefined ? uniflow : startedOn(uniflow, photos, { seed, signal });
  }

  // ----- encode -------------------------------------------------------------------------------------------------

  /** Images to latents, and to tokens and hidden states where asked for. */
  async encode(images: ImageInput, options: EncodeOptions = {}): Promise<Encoded> {
    const batches = batchesOf(images, uniFlowPreprocessing(this.config), this.config.patch, this.device, options);
    try {
      return await this.encodeBatches(batches, options);
    } finally {
      batches.dispose();
    }
  }

  private async encodeBatches(batches: Batches, options: EncodeOptions): Promise<Encoded> {
    const grid = gridOf(batches.size, this.config.patch);
    const [latents, ...rest] = await this.encoder.running({
      device: this.device,
      count: batches.count,
      batchSize: checkBatchSize(options.batchSize, grid.rows * grid.cols),
      signal: options.signal,
      load: async (begin, end) => [await batches.load(begin, end)],
      forward: ([pixels]) => this.encodePixels(pixels!, options),
    });
    const tokens = options.tokens ? rest.shift() : undefined;
    return {
      latents: latents as NdArray,
      ...(tokens ? { tokens: tokens } : {}),
      ...(options.hiddenStates ? { hiddenStates: rest } : {}),
      grid,
    };
  }

  /** Latents, then tokens and hidden states where asked for. */
  private encodePixels(pixels: Tensor, options: EncodeOptions): Tensor[] {
    if (!options.tokens && !options.hiddenStates) return [this.latents(pixels)];
    const { last, states, latents } = this.forward(pixels, { states: options.hiddenStates ?? false });
    return [latents, ...(options.tokens ? [this.patchTokens(last)] : []), ...states];
  }

  /** @internal The encoder's output, and the latents [B,N,Z] of the same pixels. */
  forward(pixels: Tensor, options: Pick<ForwardOptions, 'states' | 'recompute'> = {}): EncoderOutput & { latents: Tensor } {
    const output = this.encoder.forward(pixels, { ...options, layers: this.config.latentLayers });
    return { ...output, latents: this.latentEmbedding ? this.latents(pixels, options) : this.toLatents(output.sum) };
  }

  /** @internal Pixels to latents [B,N,Z]. */
  latents(pixels: Tensor, options: Pick<ForwardOptions, 'recompute'> = {}): Tensor {
    return this.toLatents(this.latentTokens(pixels, options));
  }

  /** @internal What latents are projected from, [B,S,D]. */
  latentTokens(pixels: Tensor, { recompute = false }: Pick<ForwardOptions, 'recompute'> = {}): Tensor {
    return this.encoder.forward(pixels, { recompute, layers: this.config.latentLayers, embedding: this.latentEmbedding }).sum;
  }

  private patchTokens(last: Tensor): Tensor {
    return sliceTokens(last, this.encoder.prefix, last.dim(1));
  }

  /** @internal {@link latentTokens} [B,S,D] → latents [B,N,Z]. */
  toLatents(tokens: Tensor): Tensor {
    return linear(linear(this.patchTokens(tokens), this.down[0], { activation: 'gelu' }), this.down[1]);
  }

  /**
   * Encodes an endless or long source in batches, reading the next pictures while the last are computed.
   * @param source pictures, or pictures with ids; the id of a path is the path, of anything else its number.
   */
  async *encodeStream(
    source: Iterable<StreamItem> | AsyncIterable<StreamItem>,
    options: EncodeOptions = {},
  ): AsyncGenerator<EncodedBatch, void, undefined> {
    checkOptions(options);
    if (typeof source !== 'object' || source === null || !(Symbol.iterator in source || Symbol.asyncIterator in source))
      throw UniFlowError.expected('BAD_INPUT', 'source', 'an iterable of images', describe(source));
    for await (const event of new Pipeline(this, options).run(inNumbers(source))) {
      if ('error' in event) throw event.error;
      const { pictures, ...encoded } = event;
      yield { ids: pictures.map(({ record }) => record.id), ...encoded };
    }
  }

  // ----- decode -------------------------------------------------------------------------------------------------

  /** Latents [B,N,Z] to pictures: uint8 [B,H,W,3], or float32 [B,3,H,W] normalised. */
  async decode(latents: NdArray, options: DecodeOptions = {}): Promise<NdArray> {
    const { count, patches, grid, ids, sampling } = checkDecoding(latents, options, this.config);
    const all: Tensor[] = [];
    try {
      const upload = (array: NdArray, name: string): Tensor => onDevice(this.device, () => checkFinite(floats(array, name), name));
      all.push(upload(latents, 'latents'));
      if (options.noise !== undefined) all.push(upload(options.noise, 'noise'));
      const [images] = await runBatches({
        device: this.device,
        count,
        batchSize: checkBatchSize(options.batchSize, patches),
        signal: options.signal,
        load: (begin, end) => all.map((tensor) => tensor.slice(begin, end)),
        forward: ([z, noise], begin, end) => {
          const condition = this.decoder.condition(cast(z!, this.dtype), grid);
          return [this.decoder.integrate(condition, grid, { ...sampling, noise, ids: ids.subarray(begin, end) })];
        },
      });
      return images as NdArray;
    } finally {
      for (const tensor of all) tensor.dispose();
    }
  }

  // ----- both ---------------------------------------------------------------------------------------------------

  /** Encodes and decodes, and says how close the pictures came to the preprocessed originals. */
  async reconstruct(images: ImageInput, options: EncodeOptions & DecodeOptions = {}): Promise<Reconstruction> {
    const batches = batchesOf(images, uniFlowPreprocessing(this.config), this.config.patch, this.device, options);
    try {
      const encoded = await this.encodeBatches(batches, options);
      const decoded = await this.decode(encoded.latents, { ...options, grid: encoded.grid });
      const grid = encoded.grid;
      const [originals, quality] = await runBatches({
        device: this.device,
        count: batches.count,
        batchSize: checkBatchSize(options.batchSize, grid.rows * grid.cols),
        signal: options.signal,
        load: async (begin, end) => [await batches.load(begin, end), onDevice(this.device, () => rowsOf(decoded, begin, end))],
        forward: ([before, after]) => {
          const bytes = (pixels: Tensor): Tensor => toUint8(pixels, grid, this.config.patch, this.normalisation);
          const original = bytes(before!);
          return [original, imageQuality(original, bytes(after!))];
        },
      });
      return { ...encoded, images: decoded, originals: originals as NdArray<Uint8Array>, ...summary(quality as NdArray<Float32Array>) };
    } finally {
      batches.dispose();
    }
  }

  /** Writes config.json and model.safetensors in the published layout. */
  async save(dir: string, options: SaveOptions = {}): Promise<void> {
    const checked = saveOptions(options, this.dtype);
    const config = jsonText(withDtype(this.configJson, checked.dtype, 'torch_dtype'));
    await saveCheckpoint(dir, { files: { 'config.json': config }, parameters: this.parameters }, checked);
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

const LATENT_EMBEDDING = 'latent_embedding';

/** The published layout has InternViT's names at the top; other encoders keep their own, under one prefix. */
function encoderPrefix(family: UniFlowConfig['encoder']['family']): string {
  return family === 'internvit' ? '' : 'vision_model.';
}

/** Rows [begin, end) of a whole array, back on the device. */
function rowsOf(array: NdArray, begin: number, end: number): Tensor {
  const [, ...rest] = array.shape;
  const row = rest.reduce((a, b) => a * b, 1);
  const data = (array.data as unknown as Float32Array | Uint8Array).subarray(begin * row, end * row);
  return Tensor.from({ data, shape: [end - begin, ...rest] });
}

function summary(quality: NdArray<Float32Array>): Pick<Reconstruction, 'psnr' | 'ssim' | 'perImage'> {
  const column = (c: number): number[] => Array.from({ length: quality.shape[0] as number }, (_, i) => quality.get(i, c));
  const mean = (values: number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
  const perImage = { psnr: column(0), ssim: column(1) };
  return { psnr: mean(perImage.psnr), ssim: mean(perImage.ssim), perImage };
}

async function* inNumbers(source: Iterable<StreamItem> | AsyncIterable<StreamItem>): AsyncGenerator<Item> {
  let number = 0;
  for await (const item of source) yield named(item, number++);
}

/** The id of a path is the path, of anything else its number. */
function named(item: StreamItem, number: number): Item {
  const subject = `item ${number} of the source`;
  if (typeof item === 'string' || item instanceof URL) return { id: String(item), image: item };
  if (typeof item !== 'object' || item === null || !('id' in item)) return { id: String(number), image: readerOf(item, subject) };
  const { id, image } = item;
  if (typeof id !== 'string' || image === undefined)
    throw UniFlowError.expected('BAD_INPUT', subject, 'an image, or { id, image } with a string as id', describe(item));
  return { id, image: typeof image === 'string' ? image : readerOf(image, subject) };
}
