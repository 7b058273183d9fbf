/** `uniflow reconstruct`: writes images beside their reconstructions. */
import { join } from 'node:path';
import { UniFlowError } from '../errors.js';
import { type RgbImage } from '../images/decode.js';
import { toImages, sideBySide, writeImage } from '../images/write.js';
import { makeFolder } from '../io/files.js';
import { fileNames, refuseMissing } from './inputs.js';
import { refuseBeside, refuseInside } from './outputs.js';
import { fileOf } from '../sources/item.js';
import type { FolderOptions, ModelOptions, ImageOptions, SamplingOptions } from './options.js';
import { failures, plural, printJson } from './output.js';
import { overImages } from './shared.js';

export interface ReconstructCommandOptions extends ModelOptions, ImageOptions, SamplingOptions, FolderOptions {}

interface Quality {
  id: string;
  file: string;
  /** dB */
  psnr: number;
  /** In [-1, 1]. */
  ssim: number;
}

export async function reconstruct(inputs: readonly string[], options: ReconstructCommandOptions, signal: AbortSignal): Promise<void> {
  await refuseInside(options.out, inputs);
  await refuseMissing(inputs);
  const { steps, schedule, guidance, seed } = options;
  const names = new Map<string, string>();
  const scored: Quality[] = [];
  const outcome = await overImages({
    inputs,
    label: 'reconstruct',
    options,
    signal,
    begin: async (items) => {
      await refuseBeside(
        options.out,
        items.flatMap(({ image }) => fileOf(image) ?? []),
      );
      await makeFolder(options.out);
      const ids = items.map(({ id }) => id);
      fileNames(ids, options.format).forEach((name, i) => names.set(ids[i] as string, name));
    },
    work: (uniflow, images, batchSize) => uniflow.reconstruct(images, { steps, schedule, guidance, seed, batchSize, signal }),
    finish: async ({ images, originals, perImage }, ids, progress) => {
      const after = toImages(images);
      const done = await Promise.all(
        toImages(originals).map(async (before, i): Promise<Quality> => {
          const id = ids[i] as string;
          const file = names.get(id) as string;
          await writeImage(join(options.out, file), sideBySide([before, after[i] as RgbImage]));
          return { id, file, psnr: perImage.psnr[i] as number, ssim: perImage.ssim[i] as number };
        }),
      );
      if (!options.json) for (const quality of done) progress.print(`${quality.id}  ${scores(quality)}`);
      scored.push(...done);
    },
  });
  if (scored.length === 0) throw new UniFlowError('BAD_INPUT', `nothing is written: no image could be read${failures(outcome.failed)}`);
  const mean = { psnr: meanOf(scored.map((p) => p.psnr)), ssim: meanOf(scored.map((p) => p.ssim)) };
  if (options.json) printJson({ out: options.out, pictures: scored, ...mean, ...outcome });
  else process.stdout.write(`mean of ${plural(scored.length, 'image')}  ${scores(mean)}${failures(outcome.failed)}\n`);
}

function scores({ psnr, ssim }: { psnr: number; ssim: number }): string {
  return `PSNR ${psnr.toFixed(2)} dB  SSIM ${ssim.toFixed(4)}`;
}

function meanOf(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0) / values.length;
}
