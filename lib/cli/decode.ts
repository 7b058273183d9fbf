/** `uniflow decode`: a file of latents to pictures. */
import ndarray, { type NdArray } from 'ndarray';
import { join } from 'node:path';
import { prefetch } from '../prefetch.js';
import { UniFlowError } from '../errors.js';
import { checkBatchSize } from '../gather.js';
import { toImages, writeImage } from '../images/write.js';
import { makeFolder } from '../io/files.js';
import type { Grid } from '../tensor.js';
import { fileNames } from './inputs.js';
import { readLatents } from './latents.js';
import type { FolderOptions, ModelOptions, SamplingOptions } from './options.js';
import { plural, printJson } from './output.js';
import { Progress } from './progress.js';
import { refuseBeside } from './outputs.js';
import { loadModel, slices } from './shared.js';

export interface DecodeCommandOptions extends ModelOptions, SamplingOptions, FolderOptions {
  grid?: Grid;
}

export async function decode(path: string, options: DecodeCommandOptions, signal: AbortSignal): Promise<void> {
  const { latents, ...labels } = await readLatents(path);
  const [count, patches] = checkShape(path, latents);
  const files = namesFor(path, labels.ids, count, options.format).map((name) => join(options.out, name));
  await refuseBeside(options.out, labels.ids ?? []);
  const uniflow = await loadModel(options, signal);
  const { steps, schedule, guidance, seed, grid = labels.grid } = options;
  const batchSize = checkBatchSize(options.batch, patches);
  await makeFolder(options.out);

  const started = performance.now();
  const progress = new Progress('decode', { unit: 'images' }, options.json === true).start(count);
  try {
    const work = async ([begin, end]: [number, number]): Promise<[number, NdArray]> => [
      begin,
      await uniflow.decode(rowsOf(latents, begin, end), { grid, steps, schedule, guidance, seed, batchSize, signal }),
    ];
    for await (const [begin, images] of prefetch(slices(count, batchSize), 1, work)) {
      const pictures = toImages(images);
      await Promise.all(pictures.map((picture, i) => writeImage(files[begin + i] as string, picture)));
      progress.update(begin + pictures.length);
    }
  } finally {
    progress.stop();
  }
  if (options.json) printJson({ files, images: count, seconds: (performance.now() - started) / 1000 });
  else process.stdout.write(`${plural(count, 'picture')} in ${options.out}\n`);
}

function checkShape(path: string, { shape }: NdArray): [count: number, patches: number] {
  const [count, patches] = shape;
  if (shape.length !== 3 || !count || !patches)
    throw UniFlowError.expected('BAD_INPUT', path, 'latents [B, N, Z]', `[${shape.join(', ')}]`);
  return [count, patches];
}

function namesFor(path: string, ids: string[] | undefined, count: number, format: string): string[] {
  if (ids && ids.length !== count)
    throw UniFlowError.expected('BAD_INPUT', `${path}: ids`, `one for each of ${count} latents`, `${ids.length}`);
  const digits = String(count).length;
  return fileNames(ids ?? Array.from({ length: count }, (_, i) => `image-${String(i + 1).padStart(digits, '0')}`), format);
}

function rowsOf(array: NdArray, begin: number, end: number): NdArray {
  const [, ...rest] = array.shape;
  const row = rest.reduce((a, b) => a * b, 1);
  return ndarray((array.data as unknown as Float32Array).subarray(begin * row, end * row), [end - begin, ...rest]);
}
