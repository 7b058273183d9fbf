/** The reproduction on Fashion-MNIST: its seam metric, and the whole command on a few pictures for a few steps. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { execFile } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { gzipSync } from 'node:zlib';
import sharp from 'sharp';
import { borderRatio, seams } from '../examples/fashion-mnist/seams.js';
import { PLAN } from '../examples/fashion-mnist/plan.js';
import type { Results } from '../examples/fashion-mnist/reproduce.js';
import { trainTeacher } from '../examples/fashion-mnist/teacher.js';
import { openDataset } from '../lib/sources/dataset.js';
import { photos } from './support.js';

describe('seams', () => {
  /** A ramp down and to the right, in steps of 1 inside patches of 4 and of `border` across their borders. */
  const ramp = (border: number) => {
    const at = (i: number): number => i + (border - 1) * Math.floor(i / 4);
    const data = Uint8Array.from({ length: 64 }, (_, i) => at(i % 8) + at(i >> 3));
    return { data, shape: [1, 8, 8, 1] };
  };

  test('steps across borders are compared with those inside', () => {
    expect(borderRatio(ramp(1), 4)).toBe(1);
    expect(borderRatio(ramp(3), 4)).toBe(3);
  });
  test('what the originals have of a grid does not count', () => {
    expect(seams(ramp(3), ramp(3), 4)).toBe(1);
    expect(seams(ramp(3), ramp(2), 4)).toBe(1.5);
  });
});

describe('the command, on cuttings of photographs', () => {
  const root = join(dirname(fileURLToPath(import.meta.url)), '..');
  let folder: string;
  const results = async (): Promise<Results> => JSON.parse(await readFile(join(folder, 'reproduction.json'), 'utf8')) as Results;

  async function reproduce(): Promise<string> {
    const sizes = ['--seeds', '1', '--steps', '3', '--teacher-steps', '5'];
    const folders = ['--data', folder, '--work', join(folder, 'work'), '--out', folder];
    const command = ['--import', 'tsx', join(root, 'examples/fashion-mnist/main.ts'), ...sizes, ...folders];
    return (await promisify(execFile)(process.execPath, command, { cwd: root })).stdout;
  }

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'uniflow-reproduction-'));
    await writeIdx(join(folder, 'train'), 24);
    await writeIdx(join(folder, 't10k'), 8);
    await reproduce();
  }, 120_000);
  afterAll(() => rm(folder, { recursive: true, force: true }));

  test('trains the teacher', async () => {
    const data = await openDataset(join(folder, 'train-images-idx3-ubyte.gz'));
    const teacher = await trainTeacher(data, { encoder: PLAN.encoder, classes: 6, steps: 80, batch: 48, lr: 4e-3, warmup: 10, seed: 0 });
    expect(await teacher.accuracy(data)).toBeGreaterThan(0.5); // chance: 0.17
    await teacher.dispose();
    await data.close();
  });

  test('measures every regime', async () => {
    const { runs } = await results();
    const usual = runs.filter((run) => run.globalBlocks === 2);
    expect(usual.map((run) => run.regime)).toEqual(['frozen', 'finetune', 'uniform', 'last', 'adaptive']);
    for (const { psnr, ssim, fid, seams, layers, understanding } of usual) {
      expect([psnr, ssim, fid, seams, ...layers].every(Number.isFinite)).toBe(true);
      expect(understanding!.latents).toBeGreaterThan(1 / 6); // more than chance
    }
    expect(usual[0]!.understanding!.tokens).toBe(usual[0]!.understanding!.teacher); // frozen
    expect(Object.keys(usual[4]!.sampling!)).toEqual(['1', '2', '4', '10']);
  });

  test('compares depths of the decoder', async () => {
    const adaptive = (await results()).runs.filter((run) => run.regime === 'adaptive');
    expect(adaptive.map((run) => run.globalBlocks)).toEqual([2, 0, 6]);
  });

  test('writes a page that says of every claim whether it was seen, and a plot', async () => {
    const page = await readFile(join(folder, 'reproduction.md'), 'utf8');
    expect(page.match(/\*\*(not )?seen\*\*/g)).toHaveLength(5);
    expect(page).not.toMatch(/NaN|undefined/);
    const { data, info } = await sharp(join(folder, 'reproduction.svg')).raw().toBuffer({ resolveWithObject: true });
    expect([info.width, info.height]).toEqual([720, 420]);
    expect(new Set(data).size).toBeGreaterThan(50); // something is drawn
  });

  test('goes on where it was stopped', async () => {
    const before = await results();
    const [stopped] = (await readdir(join(folder, 'work'))).filter((name) => name.startsWith('last-'));
    await rm(join(folder, 'work', stopped!, 'result.json'));
    await reproduce();
    const after = await results();
    const numbers = (run: Results['runs'][number]) => ({ ...run, seconds: 0 });
    expect(after.runs.map(numbers)).toEqual(before.runs.map(numbers));
    expect(after.teacher).toEqual(before.teacher);
  });
});

/** Grey cuttings of 28 x 28, `count` of each photograph, which is their class, as IDX files. */
async function writeIdx(stem: string, count: number): Promise<void> {
  const names = (await readdir(photos)).filter((name) => name.endsWith('.jpg')).sort();
  const cuttings = await Promise.all(
    names.flatMap((name) =>
      Array.from({ length: count }, (_, i) => {
        const box = { left: 7 * (i % 20), top: 40 * Math.floor(i / 20), width: 28, height: 28 };
        return sharp(join(photos, name)).greyscale().resize(200, 200).extract(box).raw().toBuffer();
      }),
    ),
  );
  const header = (...numbers: number[]): Buffer => Buffer.from(Uint32Array.from(numbers).buffer).swap32();
  const labels = Buffer.from(cuttings.map((_, i) => Math.floor(i / count)));
  await writeFile(`${stem}-images-idx3-ubyte.gz`, gzipSync(Buffer.concat([header(0x803, cuttings.length, 28, 28), ...cuttings])));
  await writeFile(`${stem}-labels-idx1-ubyte.gz`, gzipSync(Buffer.concat([header(0x801, labels.length), labels])));
}
