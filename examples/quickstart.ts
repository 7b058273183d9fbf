/** Tokenises the example photographs, reconstructs them from their latents, and writes both side by side. */
import { mkdir, readdir } from 'node:fs/promises';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { sideBySide, UniFlow, writeImage } from '../lib/index.js';

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, '..', 'out', 'quickstart');
const photos = (await readdir(join(here, 'photos'))).filter((name) => name.endsWith('.jpg')).sort();

const uniflow = await UniFlow.load(); // the small bundled tokenizer; pass a folder or a hub name for another one

const begin = performance.now();
const { images, originals, latents, grid, psnr, ssim, perImage } = await uniflow.reconstruct(
  photos.map((name) => join(here, 'photos', name)),
);
const seconds = (performance.now() - begin) / 1000;

const [, height, width] = originals.shape as [number, number, number];
const image = (data: Uint8Array, i: number): { data: Uint8Array; width: number; height: number } => ({
  data: data.subarray(i * height * width * 3, (i + 1) * height * width * 3),
  width,
  height,
});
await mkdir(out, { recursive: true });
const pairs = photos.map((_, i) => sideBySide([image(originals.data, i), image(images.data as unknown as Uint8Array, i)]));
for (const [i, name] of photos.entries()) {
  await writeImage(join(out, name.replace(/jpg$/, 'png')), pairs[i]!);
  console.log(`${name.padEnd(16)} PSNR ${perImage.psnr[i]!.toFixed(1)} dB   SSIM ${perImage.ssim[i]!.toFixed(3)}`);
}
console.log(`
${photos.length} photographs -> latents [${latents.shape.join(', ')}] (${grid.rows}x${grid.cols} patches) -> images, in ${seconds.toFixed(2)} s
PSNR ${psnr.toFixed(1)} dB, SSIM ${ssim.toFixed(3)} on average
Originals and reconstructions side by side: ${relative(process.cwd(), out) || '.'}/*.png`);
await uniflow.dispose();
