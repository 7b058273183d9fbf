/** The reproduction: its seam metric, augmentations and claims, and the whole command on a few images for a few steps. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { execFile } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { gzipSync } from 'node:zlib';
import ndarray from 'ndarray';
import sharp from 'sharp';
import { claimsOf } from '../examples/reproduction/claims.js';
import { augment, Labelled, paste } from '../examples/reproduction/images.js';
import { plans, quick } from '../examples/reproduction/plan.js';
import type { Results, RunResult } from '../examples/reproduction/reproduce.js';
import { borderRatio, seams } from '../examples/reproduction/seams.js';
import { trainTeacher, type Classifier } from '../examples/reproduction/teacher.js';
import { openDataset } from '../lib/sources/dataset.js';
import { photos } from './support.js';

describe('seams', () => {
  /** A ramp down and to the right, with steps of 1 inside patches of 4 and of `border` across their borders. */
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

describe('images of a teacher', () => {
  /** Two images of 4×4, with the values 1 to 16 and 101 to 116 in all three channels. */
  const two = () =>
    ndarray(
      Uint8Array.from({ length: 96 }, (_, i) => (i < 48 ? 1 : 101) + Math.floor((i % 48) / 3)),
      [2, 4, 4, 3],
    );
  const red = ({ data }: { data: Uint8Array }): number[] => [...data].filter((_, i) => i % 3 === 0);

  test('are moved, with black where nothing is, and mirrored', () => {
    const draws = Float64Array.of(0.9, 0.5, 0.5, 0.5, 0, 0); // down by 1; to the left by 1 and mirrored
    const [first, second] = [red(augment(two(), { shift: 1, flip: true }, draws)).slice(0, 16), red(augment(two(), { shift: 1, flip: true }, draws)).slice(16)]; // prettier-ignore
    expect(first).toEqual([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    expect(second).toEqual([0, 104, 103, 102, 0, 108, 107, 106, 0, 112, 111, 110, 0, 116, 115, 114]);
  });

  test('stay as they are where nothing is asked for', () => {
    expect(augment(two(), { shift: 0, flip: false }, new Float64Array(6)).data).toEqual(two().data);
  });

  test('show the image before them in a box, and how much of it', () => {
    const pixels = two();
    expect(paste(pixels, [0.25, 0.25, 0.25])).toBe(0.25); // 2×2 at the top left
    expect(red(pixels)).toEqual([
      ...[101, 102, 3, 4, 105, 106, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
      ...[1, 2, 103, 104, 5, 6, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116],
    ]);
  });

  test('a box at the border is cut off there', () => expect(paste(two(), [0.25, 0, 0])).toBe(1 / 16));
});

describe('claims', () => {
  const plan = quick(plans['fashion-mnist']);
  /** Results of a plan in which all variants are equal, except for `changes` of some. */
  const resultsWith = (changes: Record<string, Partial<RunResult>>): Results => {
    const run = (variant: string, globalBlocks: number): RunResult => ({
      ...{ variant, seed: 0, globalBlocks, psnr: 28, ssim: 0.9, fid: 1, seams: 1.1, seconds: 1, layers: [1, 1, 1, 1] },
      pca: { psnr: 26, ssim: 0.8 },
      understanding: { tokens: 0.86, latents: 0.85, teacher: 0.86 },
      sampling: Object.fromEntries(plan.samplingSteps.map((steps) => [steps, { psnr: 28, ssim: 0.9, fid: 1 }])),
      ...changes[globalBlocks === plan.globalBlocks ? variant : `K${globalBlocks}`],
    });
    const all = plan.variants.map(({ id }) => run(id, plan.globalBlocks));
    return { teacher: { accuracy: 0.86, seconds: 1 }, runs: [...all, run(plan.paper, 0), run(plan.paper, 6)] };
  };
  const seen = (changes: Record<string, Partial<RunResult>>): string[] =>
    claimsOf(resultsWith(changes), plan).filter((claim) => claim.seen).map(({ text }) => text.replace(/[:(].*/, '').trim()); // prettier-ignore

  const [learnt, accurate, near, one] = [
    'The runs are long enough to say something',
    "Adaptive distillation keeps the teacher's accuracy",
    'Its PSNR comes near that of unconstrained fine-tuning',
    'One sampling step is enough',
  ];

  test('where all variants are alike, nothing is better than another', () => expect(seen({})).toEqual([learnt, accurate, near, one]));

  test('below the PCA of its size fine-tuning has not learnt enough', () =>
    expect(seen({ finetune: { psnr: 25.9 } })).toEqual([accurate, near, one]));

  test('a regime is better with more PSNR and no less accuracy, at both λ', () => {
    expect(seen({ 'adaptive10-0.1': { psnr: 28.5 }, 'adaptive10-1': { psnr: 28.5 } })).toEqual([
      ...[learnt, accurate, near, 'With β = 10 it beats uniform distillation', 'With β = 10 it beats hierarchical weights', one],
    ]);
    const understanding = { tokens: 0.85, latents: 0.85, teacher: 0.86 };
    expect(seen({ 'adaptive10-0.1': { psnr: 28.5, understanding }, 'adaptive10-1': { psnr: 28.5, understanding } })).toEqual([
      ...[learnt, accurate, near, one],
    ]);
  });

  test('global blocks are judged by PSNR and FID, and by seams', () => {
    const [quality, borders] = ['Global blocks raise PSNR and lower FID', 'Global blocks remove the grid seams'];
    expect(seen({ K0: { psnr: 27, fid: 2 } })).toContain(quality);
    expect(seen({ K0: { psnr: 27, fid: 2 } })).not.toContain(borders);
    expect(seen({ K0: { psnr: 27, fid: 1 } })).not.toContain(quality);
    expect(seen({ K0: { seams: 1.3 } })).toContain(borders);
  });
});

describe('the command, on cuttings of photographs', () => {
  const root = join(dirname(fileURLToPath(import.meta.url)), '..');
  let folder: string;
  const results = async (): Promise<Results> => JSON.parse(await readFile(join(folder, 'reproduction.json'), 'utf8')) as Results;

  async function reproduce(): Promise<string> {
    const sizes = ['--seeds', '1', '--steps', '3', '--teacher-steps', '5', '--variants', 'frozen,finetune,reparam'];
    const folders = ['--data', folder, '--work', join(folder, 'work'), '--out', folder];
    const command = ['--import', 'tsx', join(root, 'examples/reproduction/main.ts'), 'fashion-mnist', ...sizes, ...folders];
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
    const images = await Labelled.read(data, 28);
    await data.close();
    const { encoder, teacher } = plans['fashion-mnist'];
    const short = { ...teacher, classes: 6, steps: 80, batch: 48, warmup: 10 };
    for (const changes of [{ encoder }, { encoder: { ...encoder, position_embedding_type: 'rope' }, shift: 2, cutmix: 0.5, ema: 0.9 }]) {
      const classifier = await trainTeacher(images, { ...short, ...changes });
      expect(await classifier.accuracy(images)).toBeGreaterThan(0.5); // chance: 0.17
      await classifier.dispose();
    }
  });

  test('goes on with a teacher that was stopped, to the bit', async () => {
    const data = await openDataset(join(folder, 'train-images-idx3-ubyte.gz'));
    const images = await Labelled.read(data, 28);
    await data.close();
    const { encoder, teacher } = plans['fashion-mnist'];
    const options = { ...teacher, encoder, classes: 6, steps: 8, batch: 16, ema: 0.9, shift: 2, cutmix: 0.5 };
    const tokensOf = async (classifier: Classifier): Promise<unknown> => {
      const { lastHiddenState } = await classifier.encoder.encode({ pixels: images.pixels([0, 1]) });
      await classifier.dispose();
      return lastHiddenState.data;
    };
    const state = join(folder, 'teacher.safetensors');
    const stopping = { state, every: 3, onStep: (step: number) => { if (step === 5) throw new Error('stopped'); } }; // prettier-ignore
    await expect(trainTeacher(images, options, stopping)).rejects.toThrow('stopped');
    const resumed = await trainTeacher(images, options, { state, every: 3 });
    expect(await tokensOf(resumed)).toEqual(await tokensOf(await trainTeacher(images, options)));
  });

  test("measures the variants that are asked for, and the paper's", async () => {
    const { runs } = await results();
    const usual = runs.filter((run) => run.globalBlocks === 2);
    expect(usual.map((run) => run.variant)).toEqual(['frozen', 'reparam', 'finetune', 'adaptive2-1']);
    for (const { psnr, ssim, fid, seams, layers, pca, understanding } of usual) {
      expect([psnr, ssim, fid, seams, pca.psnr, ...layers].every(Number.isFinite)).toBe(true);
      expect(understanding!.latents).toBeGreaterThan(1 / 6); // better than chance
    }
    for (const { variant, understanding } of usual)
      if (['frozen', 'reparam'].includes(variant)) expect(understanding!.tokens).toBe(understanding!.teacher);
    expect(Object.keys(usual.find(({ variant }) => variant === 'adaptive2-1')!.sampling!)).toEqual(['1', '2', '4', '10']);
  });

  test('compares depths of the decoder', async () => {
    const paper = (await results()).runs.filter((run) => run.variant === 'adaptive2-1');
    expect(paper.map((run) => run.globalBlocks)).toEqual([2, 0, 6]);
  });

  test('writes a page that says of every claim whether it was seen, and a plot', async () => {
    const page = await readFile(join(folder, 'reproduction.md'), 'utf8');
    expect(page.match(/\*\*(not )?seen\*\*/g)).toHaveLength(7);
    expect(page).not.toMatch(/NaN|undefined/);
    const { data, info } = await sharp(join(folder, 'reproduction.svg')).raw().toBuffer({ resolveWithObject: true });
    expect([info.width, info.height]).toEqual([860, 480]);
    expect(new Set(data).size).toBeGreaterThan(50); // the image is not empty
  });

  test('goes on where it was stopped', async () => {
    const before = await results();
    const [stopped] = (await readdir(join(folder, 'work'))).filter((name) => name.startsWith('finetune-'));
    await rm(join(folder, 'work', stopped!, 'result.json'));
    await reproduce();
    const after = await results();
    const numbers = (run: Results['runs'][number]) => ({ ...run, seconds: 0 });
    expect(after.runs.map(numbers)).toEqual(before.runs.map(numbers));
    expect(after.teacher).toEqual(before.teacher);
  });
});

/** Writes greyscale crops of 28 x 28 as IDX files, `count` from each photograph, which is their class. */
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
