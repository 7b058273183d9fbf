/** `uniflow decode`: decodes latents or codes to images. */
import ndarray, { type NdArray } from 'ndarray';
import { join } from 'node:path';
import type { Codes } from '../codes.js';
import { prefetch } from '../prefetch.js';
import { checkBatchSize } from '../gather.js';
import { toImages, writeImage } from '../images/write.js';
import { makeFolder } from '../io/files.js';
import { openLatents, type Latents } from '../shards/latents.js';
import type { Grid } from '../tensor.js';
import { fileNames } from './inputs.js';
import type { FolderOptions, ModelOptions, SamplingOptions } from './options.js';
import { plural, printJson } from './output.js';
import { Progress } from './progress.js';
import { refuseBeside } from './outputs.js';
import { loadModel } from './shared.js';

export interface DecodeCommandOptions extends ModelOptions, SamplingOptions, FolderOptions {
  grid?: Grid;
}

export async function decode(path: string, options: DecodeCommandOptions, signal: AbortSignal): Promise<void> {
  const latents = await openLatents(path);
  const images = latents.pictures;
  const files = fileNames(idsOf(latents), options.format).map((name) => join(options.out, name));
  await refuseBeside(
    options.out,
    images.flatMap(({ id }) => id ?? []),
  );
  const uniflow = await loadModel(options, signal);
  const { steps, schedule, guidance, seed } = options;
  const batches = alike(latents, options, uniflow.device);
  await makeFolder(options.out);

  const started = performance.now();
  const progress = new Progress('decode', { unit: 'images' }, options.json === true).start(images.length);
  try {
    const work = async ({ begin, end, grid }: Alike): Promise<[number, NdArray]> => [
      begin,
      await uniflow.decode(await stacked(latents, begin, end), {
        ...{ grid, steps, schedule, guidance, seed, batchSize: end - begin, signal },
      }),
    ];
    for await (const [begin, pixels] of prefetch(batches, 1, work)) {
      const decoded = toImages(pixels);
      await Promise.all(decoded.map((image, i) => writeImage(files[begin + i] as string, image)));
      progress.update(begin + decoded.length);
    }
  } finally {
    progress.stop();
  }
  if (options.json) printJson({ files, images: files.length, seconds: (performance.now() - started) / 1000 });
  else process.stdout.write(`${plural(files.length, 'image')} in ${options.out}\n`);
}

/** Ids of the images; numbered if the file has none. */
function idsOf({ pictures: images }: Latents): string[] {
  const digits = String(images.length).length;
  return images.map(({ id }, i) => id ?? `image-${String(i + 1).padStart(digits, '0')}`);
}

/** Consecutive images with the same grid. */
interface Alike {
  begin: number;
  end: number;
  grid: Grid | undefined;
}

/** @throws {UniFlowError} `BAD_INPUT` for an invalid batch size. */
function alike({ pictures: images }: Latents, { batch, grid }: DecodeCommandOptions, device: string): Alike[] {
  const all: Alike[] = [];
  for (let begin = 0, end = 0; begin < images.length; begin = end) {
    const { patches, grid: own } = images[begin] as Latents['pictures'][number];
    const most = Math.min(images.length, begin + checkBatchSize(batch, patches, device));
    const same = (i: number): boolean => {
      const other = images[i];
      return other?.patches === patches && (grid !== undefined || other.grid?.cols === own?.cols);
    };
    for (end = begin + 1; end < most && same(end);) end++;
    all.push({ begin, end, grid: grid ?? own });
  }
  return all;
}

/** Latents [B,N,Z], or codes [B,N,G]. */
async function stacked(latents: Latents, begin: number, end: number): Promise<NdArray | Codes> {
  const rows = await Promise.all(Array.from({ length: end - begin }, (_, i) => latents.at(begin + i)));
  const { data: first, shape } = rows[0] as (typeof rows)[number];
  const all = latents.array === 'codes' ? new Uint16Array(rows.length * first.length) : new Float32Array(rows.length * first.length);
  rows.forEach(({ data }, i) => all.set(data, i * first.length));
  const array: NdArray = ndarray(all, [rows.length, ...shape]);
  return latents.array === 'codes' ? { codes: array } : array;
}
