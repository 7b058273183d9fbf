/** Files to encode: crops of the photographs in examples/photos. */
import { link, mkdtemp, readdir, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import sharp from 'sharp';

const photos = fileURLToPath(new URL('../examples/photos/', import.meta.url));
const DISTINCT = 256;

/** A new folder with `count` JPEGs, `side` x `side`; of more than 256, some are names of the same file. */
export async function makeCrops(count: number, side: number): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'uniflow-bench-'));
  const files = (await readdir(photos)).filter((name) => name.endsWith('.jpg'));
  for (let i = 0; i < Math.min(count, DISTINCT); i++) {
    const image = sharp(join(photos, files[i % files.length] as string));
    const { width, height } = await image.metadata();
    const [left, top] = [(37 * i) % (width - side), (23 * i) % (height - side)];
    const jpeg = await image.extract({ left, top, width: side, height: side }).jpeg({ quality: 90 }).toBuffer();
    await writeFile(join(folder, `${i}.jpg`), jpeg);
  }
  for (let i = DISTINCT; i < count; i++) await link(join(folder, `${i % DISTINCT}.jpg`), join(folder, `${i}.jpg`));
  return folder;
}
