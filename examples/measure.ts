/**
 * PSNR and SSIM of a model on folders of images, each at its own size or centre-cropped to `--size`. With `--pairs`, also writes the worst
 * and the best original beside its reconstruction: `npx tsx examples/measure.ts --model run/model --steps 1,2,4,10 kodak/
 * cid22-validation/`
 */
import { mkdir, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { decodeImage, sideBySide, toImages, UniFlow, writeImage, type RgbImage } from '../lib/index.js';

const { values, positionals: folders } = parseArgs({
  allowPositionals: true,
  options: {
    model: { type: 'string' },
    dtype: { type: 'string', default: 'bfloat16' },
    steps: { type: 'string', default: '1' },
    size: { type: 'string' },
    pairs: { type: 'string' },
  },
});

interface Measured {
  path: string;
  size: readonly [number, number];
  psnr: number;
  ssim: number;
}

const uniflow = await UniFlow.load(values.model, { dtype: values.dtype as 'bfloat16' });
const { patch } = uniflow.config;
const whole = (side: number): number => side - (side % patch);
const mean = (numbers: readonly number[]): number => numbers.reduce((a, b) => a + b, 0) / numbers.length;

for (const folder of folders) {
  const paths = (await readdir(folder)).filter((name) => /\.(png|jpe?g|webp)$/.test(name)).sort().map((name) => join(folder, name)); // prettier-ignore
  for (const steps of values.steps.split(',').map(Number)) {
    const measured: Measured[] = [];
    for (const path of paths) {
      const image = await decodeImage(path);
      const size = values.size ? ([Number(values.size), Number(values.size)] as const) : ownSize(image);
      const { psnr, ssim } = await uniflow.reconstruct([image], { size, steps });
      measured.push({ path, size, psnr, ssim });
    }
    const score = [mean(measured.map((m) => m.psnr)).toFixed(2), mean(measured.map((m) => m.ssim)).toFixed(4)];
    console.log(`${folder}  ${measured.length} images, steps ${steps}: PSNR ${score[0]} dB, SSIM ${score[1]}`);
    if (values.pairs && steps === 1) await writePairs(values.pairs, measured);
  }
}
await uniflow.dispose();

/** The largest size in whole patches that fits. */
function ownSize({ width, height }: RgbImage): readonly [number, number] {
  return [whole(height), whole(width)];
}

async function writePairs(out: string, measured: readonly Measured[]): Promise<void> {
  await mkdir(out, { recursive: true });
  const ordered = [...measured].sort((a, b) => a.psnr - b.psnr);
  for (const [name, { path, size, psnr }] of [
    ['worst', ordered[0]!],
    ['best', ordered.at(-1)!],
  ] as const) {
    // prettier-ignore
    const { images, originals } = await uniflow.reconstruct([path], { size });
    await writeImage(join(out, `${name}.jpg`), sideBySide([toImages(originals)[0]!, toImages(images)[0]!]));
    console.log(`${name}: ${path}, ${psnr.toFixed(2)} dB`);
  }
}
