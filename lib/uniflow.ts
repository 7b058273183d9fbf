/** The UniFlow tokenizer: its constructors, and encoding of image streams. The network is in model.ts. */
import { checkInteger, checkOptions, describe } from './check.js';
import { checkLevels, type Levels } from './codes.js';
import { parseUniFlowConfig, presets, uniFlowConfig, uniFlowJson, type Preset } from './config.js';
import { checkDevice, refuseInt8, type DeviceOptions } from './device.js';
import { isObject } from './encoder/config-fields.js';
import { MAX_LAYERS } from './encoder/config.js';
import { VisionEncoder, type LoadOptions } from './encoder/vision-encoder.js';
import { UniFlowError } from './errors.js';
import { readerOf, type ImageLike } from './images/like.js';
import { Checkpoint, CheckpointSource } from './io/checkpoint.js';
import { resolveModel } from './io/hub.js';
import { encoderPrefix, UniFlowModel, type Encoded, type EncodeOptions } from './model.js';
import { embeddedModel } from './package.js';
import { RandomSource, SharedSource } from './parameters.js';
import { encodePipeline } from './shards/pipeline.js';
import type { Item } from './sources/item.js';
import { startedOn } from './start/index.js';

/** Options for the decoder of a tokenizer on a pretrained encoder. */
export interface FreshOptions {
  /** Latent channels Z. Default 64. */
  latentChannels?: number;
  /** Latents are projected from the sum of the outputs of this many of the encoder's last layers. Default 1: its tokens. */
  latentLayers?: number;
  /**
   * Computes latents in a separate pass through the encoder's blocks, with a second patch embedding that starts as a copy of the encoder's.
   * With the encoder frozen, that embedding can learn while the tokens stay unchanged. Default false.
   */
  latentEmbedding?: boolean;
  /**
   * Makes the latents discrete: the number of values of each channel of a group, such as [8, 8, 8, 5, 5, 5] for 64,000 codes. latentChannels must be a multiple
   * of how many there are.
   */
  codes?: Levels | undefined;
  /** Default 6. */
  globalBlocks?: number;
  /** Default 12. */
  flowBlocks?: number;
  /** Default 0. */
  seed?: number;
}

/** Options of {@link UniFlow.random}. */
export interface RandomOptions extends DeviceOptions {
  /** Seed of the random weights. Default 0. */
  seed?: number;
  /** Images to initialise from, in any form that openDataset accepts. */
  photos?: string;
  /** Aborts reading of `photos`. */
  signal?: AbortSignal;
}

/** An image, or an image with the id that is returned with its latents. */
export type StreamItem = ImageLike | { id: string; image: ImageLike };

export interface EncodedBatch extends Encoded {
  ids: string[];
}

/** A unified visual tokenizer (arXiv 2510.10575). */
export class UniFlow extends UniFlowModel {
  /**
   * Loads a UniFlow checkpoint from a folder, or from the Hugging Face hub by `owner/name`.
   * @param model default: {@link embeddedModel}, a small tokenizer for photographs.
   * @throws UniFlowError `BAD_CHECKPOINT` listing every mismatch between config.json and the tensors.
   */
  static async load(model: string = embeddedModel, options: LoadOptions = {}): Promise<UniFlow> {
    const placement = checkDevice(options);
    const checkpoint = await Checkpoint.open(await resolveModel(model, options));
    const config = parseUniFlowConfig(checkpoint.config);
    const source = new CheckpointSource(checkpoint, placement, checkpoint.prefixOf('chal_proj.c_fc.weight'));
    return source.guard(async () => {
      const uniflow = new UniFlow(config, checkpoint.config, placement.device, placement.dtype, source, source);
      await source.finish();
      if (placement.int8) await uniflow.becomeInt8(checkpoint, options.signal);
      return uniflow;
    });
  }

  /**
   * A tokenizer on a pretrained encoder, whose weights it shares; projection and decoder start at random. Its image size is that of the
   * encoder's processor. Other parts of the encoder's checkpoint (a pooling head, a mask token) are not part of the tokenizer and are not
   * saved with it.
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
    const codes = options.codes && checkLevels(options.codes, latentChannels, 'BAD_INPUT');
    const { mean, std, size } = encoder.preprocessing;
    const latents = { latentChannels, latentLayers, latentEmbedding, codes };
    const config = uniFlowConfig(encoder.config, { ...latents, globalBlocks, flowBlocks, imageSize: size, mean, std });
    const { device, dtype } = encoder;
    const placement = { device, dtype, float8: false, int8: false };
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

  /**
   * A new model from a preset or a config.json: with random weights or, with `photos`, initialised as the linear codec of their patches
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
    refuseInt8(placement);
    const source = new RandomSource(placement, seed);
    const parsed = parseUniFlowConfig(json);
    const uniflow = source.guard(() => new UniFlow(parsed, json, placement.device, placement.dtype, source, source));
    return photos === undefined ? uniflow : startedOn(uniflow, photos, { seed, signal });
  }

  /**
   * Encodes a long or endless source in batches, reading the next images while the current batch is computed.
   * @param source images, or images with ids. The id defaults to the path, or for other images to the item's number.
   */
  async *encodeStream(
    source: Iterable<StreamItem> | AsyncIterable<StreamItem>,
    options: EncodeOptions = {},
  ): AsyncGenerator<EncodedBatch, void, undefined> {
    checkOptions(options);
    if (typeof source !== 'object' || source === null || !(Symbol.iterator in source || Symbol.asyncIterator in source))
      throw UniFlowError.expected('BAD_INPUT', 'source', 'an iterable of images', describe(source));
    for await (const event of encodePipeline(this, options).run(inNumbers(source))) {
      if ('error' in event) throw event.error;
      const { pictures, ...encoded } = event;
      yield { ids: pictures.map(({ record }) => record.id), ...encoded };
    }
  }
}

async function* inNumbers(source: Iterable<StreamItem> | AsyncIterable<StreamItem>): AsyncGenerator<Item> {
  let number = 0;
  for await (const item of source) yield named(item, number++);
}

/** The id of a path is the path itself; other images are numbered. */
function named(item: StreamItem, number: number): Item {
  const subject = `item ${number} of the source`;
  if (typeof item === 'string' || item instanceof URL) return { id: String(item), image: item };
  if (typeof item !== 'object' || item === null || !('id' in item)) return { id: String(number), image: readerOf(item, subject) };
  const { id, image } = item;
  if (typeof id !== 'string' || image === undefined)
    throw UniFlowError.expected('BAD_INPUT', subject, 'an image, or { id, image } with a string as id', describe(item));
  return { id, image: typeof image === 'string' ? image : readerOf(image, subject) };
}
