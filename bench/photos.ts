/** Files for encoding: the photographs in examples/photos, and crops of them. */
import { link, mkdtemp, readdir, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import sharp from 'sharp';

const photos = fileURLToPath(new URL('../examples/photos/', import.meta.url));
const DISTINCT = 256;

const photoNames = async (): Promise<string[]> => (await readdir(photos)).filter((name) => name.endsWith('.jpg')).sort();

/** Paths of the first `count` photographs. Reads the files once, so that the measurement does not include the disk. */
export async function readPhotos(count: number): Promise<string[]> {
  const names = await photoNames();
  if (names.length < count) throw new Error(`${photos} has ${names.length} photographs, not ${count}`);
  const paths = names.slice(0, count).map((name) => join(photos, name));
  await Promise.all(paths.map((path) => readFile(path)));
  return paths;
}

/** Creates a folder with `count` JPEGs, `side` x `side`. Beyond 256, several names refer to the same file. */
export async function makeCrops(count: number, side: number): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'uniflow-bench-'));
  const files = await photoNames();
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
