/** What the commands that run a model share: loading it, and taking pictures through it batch by batch. */
import { ahead } from '../ahead.js';
import { setThreads } from '../device.js';
import { reasonOf, UniFlowError } from '../errors.js';
import { checkBatchSize } from '../gather.js';
import type { HubProgress } from '../io/hub.js';
import { decodeImage } from '../io/image.js';
import { checkSize } from '../io/input.js';
import { gridOf } from '../tensor.js';
import { UniFlow } from '../uniflow.js';
import { expandInputs, type Failure } from './inputs.js';
import type { ModelOptions, PictureOptions } from './options.js';
import { Progress } from './progress.js';

export async function loadModel(options: ModelOptions, signal: AbortSignal): Promise<UniFlow> {
  if (options.threads !== undefined) setThreads(options.threads);
  return downloading(options.json === true, (onProgress) => {
    const { device, dtype, float8, revision } = options;
    return UniFlow.load(options.model, { device, dtype, float8, revision, onProgress, signal });
  });
}

/** Shows the progress of what `load` downloads, if it does. */
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

export function* slices(count: number, size: number): Generator<[begin: number, end: number]> {
  for (let begin = 0; begin < count; begin += size) yield [begin, Math.min(count, begin + size)];
}

export interface PictureRun<R> {
  /** As on the command line. */
  inputs: readonly string[];
  label: string;
  options: ModelOptions & PictureOptions;
  signal: AbortSignal;
  /** Called once, with all files that will be tried. */
  begin?(files: readonly string[]): Promise<void>;
  /** Takes pictures, at most `batchSize`, through the model. */
  work(uniflow: UniFlow, paths: readonly string[], batchSize: number): Promise<R>;
  /** Uses a result, in the order of the pictures. */
  finish(result: R, paths: readonly string[], progress: Progress): Promise<void>;
}

export interface Outcome {
  /** Pictures that went through. */
  images: number;
  failed: Failure[];
  seconds: number;
}

/** Takes all pictures through the model. Broken ones are reported and left out, and make the exit code 1. */
export async function overPictures<R>(run: PictureRun<R>): Promise<Outcome> {
  const { options, signal } = run;
  const { files, failed } = await expandInputs(run.inputs);
  const uniflow = await loadModel(options, signal);
  const { imageSize, patch } = uniflow.config;
  const { rows, cols } = gridOf(checkSize(options.size ?? imageSize, patch), patch);
  const batchSize = checkBatchSize(options.batch, rows * cols);
  await run.begin?.(files);

  const started = performance.now();
  const progress = new Progress(run.label, { unit: 'images' }, options.json === true);
  const report = ({ path, reason }: Failure): void => {
    process.exitCode = 1;
    if (!options.json) progress.line(`uniflow: ${path}: ${reason}`);
  };
  try {
    progress.start(files.length);
    failed.forEach(report);
    const batches = [...slices(files.length, batchSize)].map(([begin, end]) => files.slice(begin, end));
    let tried = 0;
    let images = 0;
    for await (const { result, good, broken } of ahead(batches, 1, (batch) =>
      withoutBroken(batch, signal, (paths) => run.work(uniflow, paths, batchSize)),
    )) {
      broken.forEach(report);
      failed.push(...broken);
      if (result !== undefined) await run.finish(result, good, progress);
      images += good.length;
      progress.update((tried += good.length + broken.length));
    }
    return { images, failed, seconds: (performance.now() - started) / 1000 };
  } finally {
    progress.stop();
  }
}

/** Runs `work` on a batch; where that fails, finds the pictures that cannot be read and runs it on the others. */
async function withoutBroken<R>(
  batch: readonly string[],
  signal: AbortSignal,
  work: (paths: readonly string[]) => Promise<R>,
): Promise<{ result?: R; good: readonly string[]; broken: Failure[] }> {
  try {
    return { result: await work(batch), good: batch, broken: [] };
  } catch (error) {
    if (!(error instanceof UniFlowError) || signal.aborted) throw error;
    const broken = (await Promise.all(batch.map((path) => failureOf(path, signal)))).filter((failure) => failure !== undefined);
    if (broken.length === 0) throw error; // it was not the pictures
    const good = batch.filter((path) => !broken.some((failure) => failure.path === path));
    return good.length > 0 ? { result: await work(good), good, broken } : { good, broken };
  }
}

async function failureOf(path: string, signal: AbortSignal): Promise<Failure | undefined> {
  try {
    await decodeImage(path, { signal });
    return undefined;
  } catch (error) {
    if (signal.aborted) throw error;
    return { path, reason: reasonOf(error, path) };
  }
}
