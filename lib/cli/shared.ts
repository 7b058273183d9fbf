/** Shared by the commands that run a model: loads it, and processes images in batches. */
import ndarray, { type NdArray } from 'ndarray';
import { join } from 'node:path';
import { setThreads } from '../device.js';
import { VisionEncoder } from '../encoder/vision-encoder.js';
import { reasonOf } from '../errors.js';
import { checkBatchSize } from '../gather.js';
import { decodeAhead, type DecodeFailure } from '../images/decode-ahead.js';
import { checkSize, type PixelInput } from '../images/input.js';
import { resolveModel, type HubProgress } from '../io/hub.js';
import { readJson } from '../io/json.js';
import { loadInto } from '../io/preprocess.js';
import { prefetch } from '../prefetch.js';
import type { Item } from '../sources/item.js';
import type { Skips } from '../sources/skips.js';
import { gridOf } from '../tensor.js';
import { UniFlow } from '../uniflow.js';
import { asNamed, collectItems, countImages, type Failure } from './inputs.js';
import type { ModelOptions, ImageOptions } from './options.js';
import { Progress } from './progress.js';

export async function loadModel(options: ModelOptions, signal: AbortSignal): Promise<UniFlow> {
  if (options.threads !== undefined) setThreads(options.threads);
  return downloading(options.json === true, (onProgress) => {
    const { device, dtype, float8, revision } = options;
    return UniFlow.load(options.model, { device, dtype, float8, revision, onProgress, signal });
  });
}

/** Loads a vision encoder or a UniFlow model, as the config.json of `name` says. @returns its folder as well. */
export async function loadAny(
  name: string,
  { json, device, dtype, float8, revision, threads }: ModelOptions,
  signal: AbortSignal,
): Promise<{ model: VisionEncoder | UniFlow; folder: string }> {
  if (threads !== undefined) setThreads(threads);
  const folder = await downloading(json === true, (onProgress) => resolveModel(name, { revision, onProgress, signal }));
  const config = await readJson(join(folder, 'config.json'));
  const kind = config['model_type'] === 'uniflow' ? UniFlow : VisionEncoder;
  return { model: await kind.load(folder, { device, dtype, float8 }), folder };
}

/** Shows the progress of downloads by `load`, if there are any. */
export async function downloading<T>(quiet: boolean, load: (onProgress: (progress: HubProgress) => void) => Promise<T>): Promise<T> {
  let progress: Progress | undefined;
  try {
    return await load(({ loaded, total }) => {
      progress ??= new Progress('download', { unit: 'MB', scale: 1e6 }, quiet).start(total);
      progress.update(loaded);
    });
  } finally {
    progress?.stop();
  }
}

export interface ImageRun<R> {
  /** As on the command line. */
  inputs: readonly string[];
  label: string;
  options: ModelOptions & ImageOptions;
  signal: AbortSignal;
  /** Called once, with all images to be processed. */
  begin?(items: readonly Item[]): Promise<void>;
  /** Runs the model on at most `batchSize` images. */
  work(uniflow: UniFlow, images: PixelInput, batchSize: number): Promise<R>;
  /** Receives the results in the order of the images. */
  finish(result: R, ids: readonly string[], progress: Progress): Promise<void>;
}

export interface Outcome {
  /** Number of successfully processed images. */
  images: number;
  failed: Failure[];
  /** Number of skipped files. */
  skipped: number;
  seconds: number;
}

/** Runs the model on all images. Damaged images are reported and skipped, and set the exit code to 1. */
export async function overImages<R>(run: ImageRun<R>): Promise<Outcome> {
  const { options, signal } = run;
  const { items, skips } = await collectItems(run.inputs, signal);
  const uniflow = await loadModel(options, signal);
  const { imageSize, patch } = uniflow.config;
  const size = checkSize(options.size ?? imageSize, patch);
  const { rows, cols } = gridOf(size, patch);
  const batchSize = checkBatchSize(options.batch, rows * cols, uniflow.device);
  await run.begin?.(items);

  const started = performance.now();
  const progress = new Progress(run.label, { unit: 'images' }, options.json === true);
  const failed: Failure[] = [];
  try {
    progress.start(items.length);
    reportSkips(skips, progress, options.json === true);
    let images = 0;
    const onFailure = ({ id, error }: DecodeFailure): void => {
      const failure = { path: id, reason: reasonOf(error, error.subject ?? id) };
      failed.push(failure);
      reportFailure(failure, progress, options.json === true);
      progress.update(images + failed.length);
    };
    const batches = imageBatches(decoded(items, uniflow, size, batchSize, signal), batchSize, onFailure);
    const work = async (batch: readonly Decoded[]): Promise<{ result: R; ids: string[] }> => ({
      result: await run.work(uniflow, { pixels: stacked(batch, size) }, batchSize),
      ids: batch.map(({ id }) => id),
    });
    for await (const { result, ids } of prefetch(batches, 1, work)) {
      await run.finish(result, ids, progress);
      images += ids.length;
      progress.update(images + failed.length);
    }
    return { images, failed, skipped: skips.count, seconds: (performance.now() - started) / 1000 };
  } finally {
    progress.stop();
  }
}

/** Runs `work` and stops `progress` after it; meanwhile counts the images for the time estimate. */
export async function estimating(inputs: readonly string[], progress: Progress, json: boolean, work: () => Promise<void>): Promise<void> {
  const counting = new AbortController();
  if (!json)
    void countImages(inputs, counting.signal).then(
      (total) => total !== undefined && progress.expect(total),
      () => undefined, // the work reports errors of the source
    );
  try {
    await work();
  } finally {
    counting.abort();
    progress.stop();
  }
}

/** Reports an image or file that failed, and sets the exit code to 1. */
export function reportFailure({ path, reason }: Failure, progress: Progress, json: boolean): void {
  process.exitCode = 1;
  if (!json) progress.line(`uniflow: ${path}: ${reason}`);
}

/** Reports the skipped files. Sets the exit code to 1 if some of them may be images. */
export function reportSkips(skips: Skips, progress: Progress | undefined, json: boolean): void {
  if (skips.lost > 0) process.exitCode = 1;
  if (json || skips.summary === undefined) return;
  const say = (text: string): unknown => (progress ? progress.line(`uniflow: ${text}`) : process.stderr.write(`uniflow: ${text}\n`));
  for (const { path, reason } of skips.losses) say(`${path}: ${reason}`);
  say(skips.summary);
}

interface Decoded {
  id: string;
  /** [H,W,3] */
  pixels: Uint8Array;
}

function decoded(
  items: readonly Item[],
  uniflow: UniFlow,
  size: readonly [number, number],
  batchSize: number,
  signal: AbortSignal,
): AsyncIterable<Decoded | DecodeFailure> {
  const { preprocessing } = uniflow;
  return decodeAhead(items.map(asNamed), {
    count: 2 * batchSize,
    signal,
    prepare: async (image, { id }) => {
      const pixels = new Uint8Array(3 * size[0] * size[1]);
      await loadInto(pixels, image, preprocessing, size, { signal });
      return { id, pixels };
    },
  });
}

async function* imageBatches(
  images: AsyncIterable<Decoded | DecodeFailure>,
  size: number,
  onFailure: (failure: DecodeFailure) => void,
): AsyncGenerator<Decoded[], void, undefined> {
  let batch: Decoded[] = [];
  for await (const image of images) {
    if ('error' in image) onFailure(image);
    else batch.push(image);
    if (batch.length < size) continue;
    yield batch;
    batch = [];
  }
  if (batch.length > 0) yield batch;
}

/** [B,H,W,3] */
function stacked(batch: readonly Decoded[], [height, width]: readonly [number, number]): NdArray {
  const data = new Uint8Array(3 * batch.length * height * width);
  batch.forEach(({ pixels }, i) => data.set(pixels, i * pixels.length));
  return ndarray(data, [batch.length, height, width, 3]);
}
