/** Route handlers: read, preprocess, batch, respond. */
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import { setMaxListeners } from 'node:events';
import type { UniFlow } from '../uniflow.js';
import { uniFlowPreprocessing } from '../config.js';
import { UniFlowError } from '../errors.js';
import { checkSize } from '../images/input.js';
import { decodeAhead } from '../images/decode-ahead.js';
import type { ImageSource, RgbImage } from '../images/decode.js';
import { loadInto } from '../io/preprocess.js';
import { gridOf } from '../tensor.js';
import { accepted, answerEncoded, answerImages, filesOf, JSON_TYPE, SAFETENSORS_TYPE } from './answers.js';
import type { Batcher } from './batcher.js';
import { bytesOf, readLatents, readImages, type SentImage } from './body.js';
import { Lanes, rowsOf, type ModelLane, type Size } from './lanes.js';
import type { Settings } from './options.js';
import { whenOver } from './over.js';
import { busy, Refusal, Refusals } from './problem.js';
import { Remote } from './remote.js';
import { IMAGE_TYPES, requestSchemas } from './schemas.js';

type Handler = (request: FastifyRequest, reply: FastifyReply, signal: AbortSignal) => Promise<unknown>;

/** Active requests and their number of images. */
export class Traffic {
  private readonly living = new Set<AbortController>();
  images = 0;

  constructor(
    private readonly settings: Settings,
    private readonly batcher: Batcher,
  ) {}

  /** Runs `work` with a signal that aborts if the client disconnects, the request times out, or the service stops. */
  async during<T>(reply: FastifyReply, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
    const controller = new AbortController();
    setMaxListeners(0, controller.signal); // one or more listeners per image
    const timer = setTimeout(() => controller.abort(), this.settings.timeout);
    this.living.add(controller);
    whenOver(reply, () => {
      if (this.living.has(controller)) controller.abort(); // aborting creates an error with a stack, so successful requests skip it
    });
    try {
      return await work(controller.signal);
    } catch (error) {
      controller.abort(); // stops the remaining work of the request
      throw error;
    } finally {
      clearTimeout(timer);
      this.living.delete(controller);
    }
  }

  /** Admits images while there is room. @throws Refusal 503. */
  async withRoomFor<T>(images: number, work: () => Promise<T>): Promise<T> {
    if (this.full(images)) throw busy(`the queue is full: ${this.images} images are before`, this.images * this.batcher.secondsPerItem);
    this.images += images;
    try {
      return await work();
    } finally {
      this.images -= images;
    }
  }

  full(more = 1): boolean {
    return this.images + more > this.settings.maxQueue;
  }

  abort(): void {
    for (const controller of this.living) controller.abort();
  }
}

export function addRoutes(app: FastifyInstance, uniflow: UniFlow, settings: Settings, traffic: Traffic, batcher: Batcher): void {
  const routes = new Routes(uniflow, settings, traffic, batcher);
  for (const name of ['encode', 'decode', 'reconstruct'] as const)
    app.post(`/v1/${name}`, (request, reply) => traffic.during(reply, (signal) => routes[name](request, reply, signal)));
}

class Routes {
  private readonly lanes: Lanes;
  private readonly schemas: ReturnType<typeof requestSchemas>;
  private readonly remote: Remote;
  private readonly preprocessing: ReturnType<typeof uniFlowPreprocessing>;

  constructor(
    private readonly uniflow: UniFlow,
    private readonly settings: Settings,
    private readonly traffic: Traffic,
    private readonly batcher: Batcher,
  ) {
    this.lanes = new Lanes(uniflow, settings.maxBatch);
    this.schemas = requestSchemas(settings);
    this.preprocessing = uniFlowPreprocessing(uniflow.config);
    this.remote = new Remote({ hosts: settings.allowUrls, maxBytes: settings.maxBody, allowAddress: settings.allowAddress });
  }

  readonly encode: Handler = async (request, reply, signal) => {
    const type = accepted(request, [JSON_TYPE, SAFETENSORS_TYPE]);
    const { images, options } = await readImages(request, this.schemas.encode, this.settings);
    const size = this.sizeOf(options.size);
    const rows = await this.overImages(images, size, this.lanes.encode(size, options.tokens), signal);
    const { encoder, latentChannels: channels, patch } = this.uniflow.config;
    const grid = gridOf(size, patch);
    return answerEncoded(reply, type, { ids: images.map(({ id }) => id), grid, rows, channels, width: encoder.width });
  };

  readonly reconstruct: Handler = async (request, reply, signal) => {
    const type = accepted(request, [JSON_TYPE, ...IMAGE_TYPES]);
    const { images: sent, options } = await readImages(request, this.schemas.reconstruct, this.settings);
    const { size: wanted, format, original, ...sampling } = options;
    if (original && type !== JSON_TYPE) throw Refusal.of(406, 'Accept', `${JSON_TYPE}, which has room for the original`, `'${type}'`);
    const size = this.sizeOf(wanted);
    const results = await this.overImages(sent, size, this.lanes.reconstruct(size, sampling, original), signal);
    const { patch } = this.uniflow.config;
    const ids = sent.map(({ id }) => id);
    const images = results.map(({ image }) => image);
    const originals = await filesOf(
      results.flatMap((result) => result.original ?? []),
      format,
    );
    return answerImages(reply, type, images, { ids, format }, (files) => ({
      images: files.map((file, i) => ({ ...file, original: originals[i], psnr: results[i]?.psnr, ssim: results[i]?.ssim })),
      psnr: meanOf(results.map(({ psnr }) => psnr)),
      ssim: meanOf(results.map(({ ssim }) => ssim)),
      grid: gridOf(size, patch),
    }));
  };

  readonly decode: Handler = async (request, reply, signal) => {
    const type = accepted(request, [JSON_TYPE, ...IMAGE_TYPES]);
    const { latents: all, options } = await readLatents(request, this.schemas.decode, this.settings);
    const { format, ...sampling } = options;
    const items = all.flatMap(({ latents, grid }) => {
      const [patches, channels] = this.checkLatents(latents.shape);
      const lane = this.lanes.decode([patches, channels], grid, sampling);
      return rowsOf(latents).map((row) => ({ lane, row }));
    });
    this.checkCount(items.length);
    const ids = all
      .flatMap(({ latents, ids }) => ids ?? Array<string>(latents.shape[0] as number).fill(''))
      .map((id, i) => id || String(i));
    if (ids.length !== items.length)
      throw UniFlowError.expected('BAD_INPUT', 'ids', `${items.length}, one for each image`, String(ids.length));
    const images = await this.traffic.withRoomFor(items.length, () =>
      Promise.all(items.map(({ lane, row }) => this.batcher.submit(lane, row, signal))),
    );
    return answerImages(reply, type, images, { ids, format }, (files) => ({ images: files }));
  };

  /** Preprocesses all images before computing any, so that a damaged image costs no computation. */
  private overImages<R>(images: readonly SentImage[], size: Size, lane: ModelLane<Uint8Array, R>, signal: AbortSignal): Promise<R[]> {
    return this.traffic.withRoomFor(images.length, async () => {
      const pixels = await this.pixelsOf(images, size, signal);
      return Promise.all(pixels.map((one) => this.batcher.submit(lane, one, signal)));
    });
  }

  /** Pixels uint8 [H,W,3] of each image. @throws {Refusals} naming all unreadable images. */
  private async pixelsOf(images: readonly SentImage[], size: Size, signal: AbortSignal): Promise<Uint8Array[]> {
    const budget = { left: this.settings.maxBody };
    const items = images.map((image) => ({ id: image.subject, image: () => bytesOf(image, this.remote, budget, signal) }));
    const prepare = async (image: ImageSource | RgbImage): Promise<{ pixels: Uint8Array }> => {
      const pixels = this.lanes.roomFor(size);
      await loadInto(pixels, image, this.preprocessing, size, { maxPixels: this.settings.maxPixels, signal });
      return { pixels };
    };
    const all: Uint8Array[] = [];
    const failed: UniFlowError[] = [];
    for await (const decoded of decodeAhead(items, { count: items.length, prepare, signal }))
      if ('error' in decoded) failed.push(decoded.error);
      else all.push(decoded.pixels);
    if (failed.length > 0) throw new Refusals(failed);
    return all;
  }

  private sizeOf(wanted: number | readonly [number, number] | undefined): Size {
    const size = checkSize(wanted ?? this.uniflow.config.imageSize, this.uniflow.config.patch);
    this.checkPatches('size', this.lanes.patches(size));
    return size;
  }

  private checkPatches(subject: string, patches: number): void {
    const { maxPatches } = this.settings;
    if (patches > maxPatches) throw UniFlowError.expected('BAD_INPUT', subject, `at most ${maxPatches} patches`, String(patches));
  }

  private checkLatents(shape: readonly number[]): [patches: number, channels: number] {
    const [, patches = 0, channels = 0] = shape;
    const { latentChannels } = this.uniflow.config;
    if (shape.length !== 3 || channels !== latentChannels)
      throw UniFlowError.expected('BAD_INPUT', 'latents', `[B, N, ${latentChannels}]`, `[${shape.join(', ')}]`);
    this.checkPatches('latents', patches);
    return [patches, channels];
  }

  private checkCount(images: number): void {
    const { maxImages } = this.settings;
    if (images > maxImages) throw Refusal.of(413, 'latents', `at most ${maxImages} images`, String(images));
  }
}

function meanOf(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0) / values.length;
}
