/** The model: encoder, latent projection, pixel flow decoder. Constructors and streaming are in uniflow.ts. */
import ndarray, { type NdArray } from 'ndarray';
import { isCodes, requireLevels, type Codes } from './codes.js';
import { uniFlowPreprocessing, type UniFlowConfig } from './config.js';
import { Decoder } from './decoder/decoder.js';
import { checkDecoding, type DecodeOptions } from './decoder/options.js';
import { embedImages, type EmbedOptions } from './encoder/embed.js';
import { families } from './encoder/families.js';
import type { Pool } from './encoder/pooling.js';
import { Encoder, type EncoderOutput, type ForwardOptions } from './encoder/encoder.js';
import type { EncodeOptions as EncoderOptions } from './encoder/vision-encoder.js';
import { checkBatchSize, runBatches } from './gather.js';
import { saveCheckpoint, saveOptions, withDtype, type Checkpoint, type SaveOptions } from './io/checkpoint.js';
import { jsonText } from './io/json.js';
import { batchesOf, floats, integers, type Batches, type ImageInput } from './images/input.js';
import { nativeNormalisation, type Preprocessing } from './io/preprocess.js';
import { flowLoss } from './losses/flow.js';
import { native, type FloatType, type NativeNormalisation } from './native.js';
import type { ModelType } from './device.js';
import { assignParameter, GAIN, type Parameter, type ParameterSource } from './parameters.js';
import {
  cast,
  checkFinite,
  codesToLatents,
  fsq,
  imageQuality,
  latentsToCodes,
  linear,
  reshape,
  sliceTokens,
  toUint8,
  unfold,
  type Linear,
} from './ops.js';
import {
  isInt8,
  quantizationAtLoad,
  quantizationMetadata,
  quantizeModel,
  type Quantization,
  type TokenizerQuantizeOptions,
} from './quantize.js';
import { gridOf, onDevice, Tensor, tensorOf, tidy, type Grid } from './tensor.js';

export interface EncodeOptions extends EncoderOptions {
  /** Also returns the semantic tokens: the encoder's patch tokens. */
  tokens?: boolean;
  /** Also returns the codes, if the model's latents are discrete. */
  codes?: boolean;
}

export interface Encoded {
  /** float32 [B,N,Z]; quantised if the model has codes. */
  latents: NdArray;
  /** [B,N,G], if requested: one code per group of channels. */
  codes?: NdArray<Uint16Array>;
  /** float32 [B,N,D], if requested. */
  tokens?: NdArray;
  /** float32 [B,S,D] x (L+1), if requested; [0] is the embedding, S counts class and register tokens. */
  hiddenStates?: NdArray[];
  grid: Grid;
}

export interface Reconstruction extends Encoded {
  /** As returned by `decode`. */
  images: NdArray;
  /** The preprocessed originals, uint8 [B,H,W,3]: the part that the patches cover. */
  originals: NdArray<Uint8Array>;
  /** Means over the images, in dB and in [-1, 1]. */
  psnr: number;
  ssim: number;
  perImage: { psnr: number[]; ssim: number[] };
}

/** A model on its device; users create a {@link UniFlow}. */
export class UniFlowModel {
  /** @internal */ readonly encoder: Encoder;
  /** @internal */ readonly decoder: Decoder;
  private readonly down: [Linear, Linear];
  private readonly latentEmbedding: Linear | undefined;
  /** @internal */ readonly normalisation: NativeNormalisation;
  /** @internal The encoder's share of {@link parameters}. */
  readonly encoderParameters: readonly Parameter[];

  protected constructor(
    readonly config: UniFlowConfig,
    /** As in config.json. */
    readonly configJson: Record<string, unknown>,
    /** Device of the model: `'cpu'` or `'cuda:0'`. */
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

  private gate: Quantization | undefined;

  /** How the layers came through {@link quantize}, now or when the checkpoint was made; undefined if none is int8. */
  get quantization(): Quantization | undefined {
    return this.gate;
  }

  /** Type of the products: that of the activations, or int8. */
  get precision(): ModelType {
    return isInt8(this.parameters) ? 'int8' : this.dtype;
  }

  /** Initialises the latents' patch embedding with a copy of the encoder's. */
  protected copyEmbedding(): void {
    const byName = new Map(this.parameters.map((parameter) => [parameter.parts[0]?.name, parameter]));
    const { family } = this.config.encoder;
    for (const part of ['weight', 'bias']) {
      const [from, to] = [`${encoderPrefix(family)}${families[family].patch}`, LATENT_EMBEDDING].map((name) =>
        byName.get(`${name}.${part}`),
      );
      if (!from || !to) continue; // CLIP's patch embedding has no bias
      onDevice(this.device, () => {
        const value = native.copyParameter(from.tensor.handle, 'float32');
        assignParameter(to, value, this.dtype);
        value.dispose();
      });
    }
  }

  // ----- encode -------------------------------------------------------------------------------------------------

  /** Encodes images to latents and, if requested, to tokens and hidden states. */
  async encode(images: ImageInput, options: EncodeOptions = {}): Promise<Encoded> {
    const batches = batchesOf(images, this.preprocessing, this.config.patch, this.device, options);
    try {
      return await this.encodeBatches(batches, options);
    } finally {
      batches.dispose();
    }
  }

  private async encodeBatches(batches: Batches, options: EncodeOptions): Promise<Encoded> {
    if (options.codes) requireLevels(this.config);
    const grid = gridOf(batches.size, this.config.patch);
    const [latents, ...rest] = await this.encoder.running({
      device: this.device,
      count: batches.count,
      batchSize: checkBatchSize(options.batchSize, grid.rows * grid.cols, this.device),
      signal: options.signal,
      load: async (begin, end) => [await batches.load(begin, end)],
      forward: ([pixels]) => this.encodePixels(pixels!, options),
    });
    const codes = options.codes ? rest.shift() : undefined;
    const tokens = options.tokens ? rest.shift() : undefined;
    return {
      latents: latents as NdArray,
      ...(codes ? { codes: ndarray(new Uint16Array(codes.data), codes.shape) } : {}),
      ...(tokens ? { tokens: tokens } : {}),
      ...(options.hiddenStates ? { hiddenStates: rest } : {}),
      grid,
    };
  }

  /** Latents, followed by codes, tokens and hidden states if requested. */
  private encodePixels(pixels: Tensor, options: EncodeOptions): Tensor[] {
    const withCodes = (latents: Tensor): Tensor[] =>
      options.codes ? [latents, latentsToCodes(latents, requireLevels(this.config))] : [latents];
    if (!options.tokens && !options.hiddenStates) return withCodes(this.latents(pixels));
    const { last, states, latents } = this.forward(pixels, { states: options.hiddenStates ?? false });
    return [...withCodes(latents), ...(options.tokens ? [this.patchTokens(last)] : []), ...states];
  }

  /** @internal The encoder's output and the latents [B,N,Z] of the same pixels. */
  forward(pixels: Tensor, options: Pick<ForwardOptions, 'states' | 'recompute'> = {}): EncoderOutput & { latents: Tensor } {
    const output = this.encoder.forward(pixels, { ...options, layers: this.config.latentLayers });
    return { ...output, latents: this.latentEmbedding ? this.latents(pixels, options) : this.toLatents(output.sum) };
  }

  /** @internal Pixels to latents [B,N,Z]. */
  latents(pixels: Tensor, options: Pick<ForwardOptions, 'recompute'> = {}): Tensor {
    return this.toLatents(this.latentTokens(pixels, options));
  }

  /** @internal The tokens that latents are projected from, [B,S,D]. */
  latentTokens(pixels: Tensor, { recompute = false }: Pick<ForwardOptions, 'recompute'> = {}): Tensor {
    return this.encoder.forward(pixels, { recompute, layers: this.config.latentLayers, embedding: this.latentEmbedding }).sum;
  }

  private patchTokens(last: Tensor): Tensor {
    return sliceTokens(last, this.encoder.prefix, last.dim(1));
  }

  /** @internal {@link latentTokens} [B,S,D] → latents [B,N,Z]. */
  toLatents(tokens: Tensor): Tensor {
    const z = linear(linear(this.patchTokens(tokens), this.down[0], { activation: 'gelu' }), this.down[1]);
    return this.config.codes ? fsq(z, this.config.codes) : z;
  }

  // ----- embed --------------------------------------------------------------------------------------------------

  get preprocessing(): Preprocessing {
    return uniFlowPreprocessing(this.config);
  }

  /** Distillation holds the patch tokens near the teacher's, not the class token. */
  readonly defaultPool: Pool = 'mean';

  /** One vector per image, float32 [B,D], from the encoder's tokens. A pooling head belongs to the teacher: see {@link VisionEncoder.embed}. */
  async embed(images: ImageInput, options: EmbedOptions = {}): Promise<NdArray<Float32Array>> {
    return embedImages(this, images, options);
  }

  // ----- decode -------------------------------------------------------------------------------------------------

  /** Decodes latents [B,N,Z], or `{ codes }` [B,N,G], to images: uint8 [B,H,W,3], or float32 [B,3,H,W] normalised. */
  async decode(latents: NdArray | Codes, options: DecodeOptions = {}): Promise<NdArray> {
    const { count, patches, grid, ids, sampling } = checkDecoding(latents, options, this.config);
    const all: Tensor[] = [];
    try {
      const upload = (array: NdArray, name: string): Tensor => onDevice(this.device, () => checkFinite(floats(array, name), name));
      all.push(isCodes(latents) ? this.latentsOf(latents) : upload(latents, 'latents'));
      if (options.noise !== undefined) all.push(upload(options.noise, 'noise'));
      const [images] = await runBatches({
        device: this.device,
        count,
        batchSize: checkBatchSize(options.batchSize, patches, this.device),
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

  /** Latents [B,N,Z] on the device. */
  private latentsOf({ codes }: Codes): Tensor {
    return onDevice(this.device, () => tidy(() => codesToLatents(integers(codes, 'codes'), requireLevels(this.config))));
  }

  // ----- both ---------------------------------------------------------------------------------------------------

  /** Encodes and decodes images, and measures how close the results are to the preprocessed originals. */
  async reconstruct(images: ImageInput, options: EncodeOptions & DecodeOptions = {}): Promise<Reconstruction> {
    const batches = batchesOf(images, this.preprocessing, this.config.patch, this.device, options);
    try {
      const encoded = await this.encodeBatches(batches, options);
      const decoded = await this.decode(encoded.latents, { ...options, grid: encoded.grid });
      const grid = encoded.grid;
      const [originals, quality] = await runBatches({
        device: this.device,
        count: batches.count,
        batchSize: checkBatchSize(options.batchSize, grid.rows * grid.cols, this.device),
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

  // ----- int8 -------------------------------------------------------------------------------------------------

  /**
   * Replaces the weights of large layers by int8 ones, for inference on the CPU. Layers whose products come out too far from their float ones on these
   * images keep their weights, as do others until the images' reconstructions lose at most `maxLoss`. The model's activations stay in its dtype.
   * @param images a few typical ones; without them, two made-up ones that resemble photographs, and the reconstructions are not measured.
   */
  async quantize(images?: ImageInput, options: TokenizerQuantizeOptions = {}): Promise<Quantization> {
    const { parameters, device, preprocessing, config } = this;
    const run = (pixels: Tensor): void => void this.reconstructionLoss(pixels);
    const psnr = async (images: ImageInput): Promise<number> => (await this.reconstruct(images)).psnr;
    this.gate = await quantizeModel({ parameters, device, preprocessing, patch: config.patch, run, psnr }, images, options);
    return this.gate;
  }

  /** Makes a model loaded for int8 one: as its checkpoint says, or else by {@link quantize}. */
  protected async becomeInt8(checkpoint: Checkpoint, signal?: AbortSignal): Promise<void> {
    this.gate = await quantizationAtLoad(checkpoint, () => this.quantize(undefined, { signal }));
  }

  /** Runs all of the model on one batch: the flow's loss at random times. */
  private reconstructionLoss(pixels: Tensor): Tensor {
    const grid = this.encoder.gridOf(pixels);
    const patches = grid.rows * grid.cols;
    const ids = new Uint32Array(pixels.dim(0));
    const noise = tensorOf(native.noise(0, ids, patches, 3 * this.config.patch ** 2));
    const { latents } = this.forward(pixels);
    return this.flowLoss(pixels, latents, noise, tensorOf(native.uniform(0, ids, patches)));
  }

  /** @internal The flow's loss [1] for latents [B,N,Z] of pixels; noise [B,N,P], time [B,N]. */
  flowLoss(pixels: Tensor, latents: Tensor, noise: Tensor, time: Tensor, options: { recompute?: boolean } = {}): Tensor {
    const condition = this.decoder.condition(latents, this.encoder.gridOf(pixels), options);
    const [rows, width] = [condition.dim(0) * condition.dim(1), condition.dim(2)];
    const { patch } = this.config;
    const inRows = (x: Tensor): Tensor => x.reshape([rows, 3 * patch ** 2]);
    const data = inRows(unfold(pixels, patch, this.normalisation, 'float32'));
    return flowLoss(this.decoder.head, data, inRows(noise), time.reshape([rows]), reshape(condition, [rows, width]), this.dtype, options);
  }

  /** Writes config.json and model.safetensors in the published layout; int8 weights as int8, with their scales and the gate's table. */
  async save(dir: string, options: SaveOptions = {}): Promise<void> {
    const checked = saveOptions(options, this.dtype);
    const config = jsonText(withDtype(this.configJson, checked.dtype, 'torch_dtype'));
    await saveCheckpoint(
      dir,
      { files: { 'config.json': config }, parameters: this.parameters, metadata: quantizationMetadata(this.gate) },
      checked,
    );
  }

  /** Frees the weights; resolves once they are freed. */
  async dispose(): Promise<void> {
    this.encoder.invalidate();
    for (const { tensor } of this.parameters) tensor.dispose();
    await onDevice(this.device, () => native.synchronize());
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }
}

/** Name of the second patch embedding in checkpoints. */
const LATENT_EMBEDDING = 'latent_embedding';

/** The published layout keeps InternViT's names at the top level; other encoders keep their own names under a common prefix. */
export function encoderPrefix(family: UniFlowConfig['encoder']['family']): string {
  return family === 'internvit' ? '' : 'vision_model.';
}

/** Uploads rows [begin, end) of an array. */
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
