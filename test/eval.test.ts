/** Evaluation: metrics agree with numpy, scipy and scikit-image (fixtures/eval/make.py), do not depend on the batch, and are pinned. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { onnxModel } from '../bench/peers/onnx.js';
import { knnAccuracy } from '../lib/eval/knn.js';
import {
  cpuInfo,
  encoderFeatures,
  evaluate,
  fid,
  gaussianOf,
  inceptionFeatures,
  linearProbe,
  loadFeatureSet,
  memoryStats,
  openDataset,
  saveFeatureSet,
  setThreads,
  subset,
  UniFlow,
  VisionEncoder,
  type Dataset,
  type EvaluateOptions,
  type Evaluation,
  type LabelledFeatures,
} from '../lib/index.js';
import { readNpy } from '../lib/io/npy.js';
import { imageQuality } from '../lib/ops.js';
import { Tensor } from '../lib/tensor.js';
import { fixtures, golden } from './support.js';

const root = join(fixtures, '..', '..');
const peers = join(root, 'bench', 'peers');
const fixture = (name: string): Promise<NdArray<Float32Array | Uint8Array>> => readNpy(join(fixtures, 'eval', `${name}.npy`));
const rows = ({ data, shape }: NdArray, count: number): NdArray =>
  ndarray((data as unknown as Float32Array).subarray(0, count * shape[1]!), [count, shape[1]!]);
let expected: Record<'fid' | 'fidOfFew' | 'knn' | 'probe', number> &
  Record<'mean' | 'psnr' | 'ssim' | 'ssimPaper', number[]> & { covariance: number[][] };
let dir: string;

beforeAll(async () => {
  setThreads(1); // the work is too small for several threads
  dir = await mkdtemp(join(tmpdir(), 'uniflow-eval-'));
  expected = JSON.parse(await readFile(join(fixtures, 'eval', 'expected.json'), 'utf8'));
});
afterAll(async () => {
  setThreads(cpuInfo().defaultThreads);
  await rm(dir, { recursive: true, force: true });
});

describe('against numpy, scipy and scikit-image', () => {
  test('mean and covariance', async () => {
    const { mean, covariance } = await gaussianOf(await fixture('features-a'));
    expected.mean.forEach((value, i) => expect(mean[i]).toBeCloseTo(value, 5));
    expected.covariance.flat().forEach((value, i) => expect(covariance[i]! / value).toBeCloseTo(1, 4));
  });

  test('FID, also of fewer vectors than dimensions; a set has no distance from itself', async () => {
    const [a, b] = [await fixture('features-a'), await fixture('features-b')];
    expect((await fid(a, b)) / expected.fid).toBeCloseTo(1, 5);
    expect((await fid(b, a)) / expected.fid).toBeCloseTo(1, 5);
    expect((await fid(rows(a, 10), rows(b, 12))) / expected.fidOfFew).toBeCloseTo(1, 3);
    expect(Math.abs(await fid(a, a))).toBeLessThan(1e-4);
    await expect(fid(a, await fixture('train'))).rejects.toMatchObject({
      code: 'BAD_INPUT',
      message: /16 dimensions in both sets, but got 8/,
    });
  });

  test.each<[string, unknown, RegExp]>([
    ['NaN', ndarray(new Float32Array(32).fill(NaN), [4, 8]), /features of set [12]: expected finite/],
    ['infinity', ndarray(new Float32Array(32).fill(Infinity), [4, 8]), /features of set [12]: expected finite/],
    [
      'values whose variance is none',
      ndarray(
        Float32Array.from({ length: 32 }, (_, i) => (i < 16 ? 3e38 : -3e38)),
        [8, 4],
      ),
      /features of set [12]: expected finite/,
    ],
    ['undefined', undefined, /features: expected an ndarray, but got undefined/],
    ['null', null, /features: expected an ndarray, but got null/],
    ['a list', [1, 2], /expected/],
  ])('FID refuses %s', async (_, wrong, about) => {
    const good = ndarray(
      Float32Array.from({ length: 32 }, (_, i) => Math.sin(i)),
      (wrong as NdArray | undefined)?.shape ?? [4, 8],
    );
    for (const sets of [
      [wrong, good],
      [good, wrong],
    ] as [NdArray, NdArray][])
      await expect(fid(...sets)).rejects.toMatchObject({
        name: 'UniFlowError',
        code: 'BAD_INPUT',
        message: expect.stringMatching(about),
      });
  });

  test.each(['standard', 'paper'] as const)('PSNR and SSIM, %s convention', async (convention) => {
    const [a, b] = [Tensor.from(await fixture('images-a')), Tensor.from(await fixture('images-b'))];
    const quality = await imageQuality(a, b, convention).read();
    for (const i of [0, 1]) {
      expect(quality.get(i, 0)).toBeCloseTo(expected.psnr[i]!, 4);
      expect(quality.get(i, 1)).toBeCloseTo(expected[convention === 'paper' ? 'ssimPaper' : 'ssim'][i]!, 5);
    }
  });
});

describe('frozen features', () => {
  let known: LabelledFeatures;
  let asked: LabelledFeatures;
  const labelled = async (name: string): Promise<LabelledFeatures> => ({
    features: await fixture(name),
    labels: Int32Array.from((await fixture(`${name}-labels`)).data),
  });
  beforeAll(async () => {
    [known, asked] = [await labelled('train'), await labelled('test')];
  });

  test("k-NN: the accuracy of DINO's protocol", async () => {
    expect(await knnAccuracy(known, asked)).toBe(expected.knn);
    expect(await knnAccuracy(known, known, { k: 1 })).toBe(1);
  });

  test("linear probe: near L-BFGS's, on features of any scale that come class by class", async () => {
    const { accuracy, trainAccuracy } = await linearProbe(known, asked, { seed: 3 });
    expect(Math.abs(accuracy - expected.probe)).toBeLessThan(0.02);
    expect(trainAccuracy).toBeGreaterThan(0.85);
    expect((await linearProbe(known, asked, { steps: 300, batchSize: 64 })).accuracy).toBeGreaterThan(expected.probe - 0.03);
  });

  test('linear probe: the same for the same seed, and nothing is left behind', async () => {
    const before = memoryStats();
    const run = (seed: number) => linearProbe(known, asked, { seed, steps: 3 });
    const [first, again, other] = [await run(1), await run(1), await run(2)];
    expect(again).toEqual(first);
    expect(other).not.toEqual(first);
    expect(memoryStats()).toMatchObject({ handles: before.handles, host: { active: before.host.active } });
  });

  test('labels that do not fit are refused', async () => {
    const short = { ...asked, labels: asked.labels.subarray(1) };
    await expect(linearProbe(known, short)).rejects.toMatchObject({ code: 'BAD_INPUT', subject: 'test.labels' });
    await expect(knnAccuracy(short, asked)).rejects.toMatchObject({ code: 'BAD_INPUT', subject: 'train.labels' });
  });
});

/** Images of two classes, brighter on the left or on the right, in sub-folders of these names. */
async function makeImages(folder: string, count: number, seed: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    const side = i % 2 === 0 ? 'left' : 'right';
    await mkdir(join(folder, side), { recursive: true });
    const hue = (seed + 37 * i) % 360;
    const [x, r] = [side === 'left' ? 18 : 62, 9 + ((seed + 5 * i) % 11)];
    const svg = `<svg width="80" height="80"><rect width="80" height="80" fill="hsl(${hue},60%,30%)"/><circle cx="${x}" cy="40" r="${r}" fill="white"/></svg>`;
    await sharp(Buffer.from(svg))
      .png()
      .toFile(join(folder, side, `${String(i).padStart(3, '0')}.png`));
  }
}

describe('evaluate', () => {
  let data: Dataset;
  let train: Dataset;
  let uniflow: UniFlow;
  let teacher: UniFlow;
  let encoder: VisionEncoder;
  const evaluateWith = async (options: Partial<EvaluateOptions> = {}): Promise<Evaluation> => evaluate(uniflow, { data, ...options });

  beforeAll(async () => {
    await makeImages(join(dir, 'val'), 33, 0);
    await makeImages(join(dir, 'train'), 24, 100);
    [data, train] = [await openDataset(join(dir, 'val')), await openDataset(join(dir, 'train'))];
    uniflow = UniFlow.random('nano', { seed: 1 });
    teacher = UniFlow.random('nano', { seed: 2 });
    encoder = await VisionEncoder.load(golden('dinov2'));
  });
  afterAll(() => Promise.all([uniflow.dispose(), teacher.dispose(), encoder.dispose()]));

  test('the same numbers at batch 1, 7 and 32', async () => {
    const features = await encoderFeatures(encoder);
    const [one, seven, many] = [1, 7, 32].map(
      async (batchSize) => await evaluateWith({ batchSize, features, train, teacher, steps: 2, seed: 5 }),
    );
    const { featureSets, ...first } = await one!;
    for (const other of [await seven!, await many!]) {
      expect(other).toMatchObject({ images: 33, pins: first.pins, understanding: first.understanding });
      expect(other.psnr).toBeCloseTo(first.psnr, 5);
      expect(other.ssim).toBeCloseTo(first.ssim, 6);
      expect(other.fid!.value / first.fid!.value).toBeCloseTo(1, 4);
      other.layers!.forEach((cosine, l) => expect(cosine).toBeCloseTo(first.layers![l]!, 6));
    }
    expect(first.fid).toMatchObject({ name: 'FID', dimensions: encoder.config.width, reference: { images: 33 } });
    expect(Object.keys(first.understanding!)).toEqual(['tokens', 'latents', 'teacher']);
    expect(featureSets!.reference.features.shape).toEqual([33, encoder.config.width]);
  });

  test('PSNR, SSIM and cosines are those of reconstruct() and of the hidden states', async () => {
    const paths = await Promise.all(Array.from({ length: 33 }, async (_, i) => (await data.read(i)).image as string));
    const whole = await uniflow.reconstruct(paths, { hiddenStates: true });
    const other = await teacher.encode(paths, { hiddenStates: true });
    const { psnr, ssim, layers } = await evaluateWith({ teacher });
    expect(psnr).toBeCloseTo(whole.psnr, 4);
    expect(ssim).toBeCloseTo(whole.ssim, 5);
    expect(layers).toHaveLength(2);
    layers!.forEach((cosine, l) => expect(cosine).toBeCloseTo(meanCosine(whole.hiddenStates![l + 1]!, other.hiddenStates![l + 1]!), 5));
    expect((await evaluateWith({ teacher: uniflow })).layers!.every((cosine) => Math.abs(cosine - 1) < 1e-6)).toBe(true);
  });

  test('pins: data, crop, seed, weights, extractor', async () => {
    const features = await encoderFeatures(encoder, { pool: 'class' });
    const { pins, fid } = await evaluateWith({ features, seed: 7, origin: { data: { path: 'val', split: 'all' } } });
    expect(pins).toMatchObject({
      ...{ dtype: 'float32', crop: 'center', size: [56, 56], sampling: { steps: 1, schedule: 'linear', guidance: 1, seed: 7 } },
      data: { path: 'val', split: 'all', images: 33, sha256: await data.hash() },
      model: { name: 'in memory', sha256: expect.stringMatching(/^[0-9a-f]{64}$/) },
    });
    expect(fid!.reconstructions.pins).toMatchObject({
      extractor: { ...features.pin, pool: 'class' },
      reconstruction: { model: pins.model },
    });
    const half = subset(
      data,
      Array.from({ length: 16 }, (_, i) => 2 * i),
    );
    const again = await evaluateWith({ data: half, seed: 8 });
    expect(again.pins.model).toEqual(pins.model);
    expect(again.pins.data.sha256).not.toBe(pins.data.sha256);
    expect((await evaluate(teacher, { data: half })).pins.model).not.toEqual(pins.model);
  });

  test('features as a mean of patch tokens, or the class token', async () => {
    const [height, width] = encoder.preprocessing.size;
    const values = new Uint8Array(3 * height * width * 3).map((_, i) => (i * 31) % 256);
    const batch = ndarray(values, [3, height, width, 3]);
    const { lastHiddenState: last } = await encoder.encode({ pixels: batch });
    const [mean, cls] = [await encoderFeatures(encoder), await encoderFeatures(encoder, { pool: 'class' })];
    const [means, classes] = [await mean.extract(batch), await cls.extract(batch)];
    const [, tokens, size] = last.shape as [number, number, number];
    for (const [image, d] of [
      [0, 0],
      [2, size - 1],
    ] as const) {
      const patches = Array.from({ length: tokens - 1 }, (_, t) => last.get(image, t + 1, d));
      expect(means.get(image, d)).toBeCloseTo(patches.reduce((a, b) => a + b) / (tokens - 1), 5);
      expect(classes.get(image, d)).toBe(last.get(image, 0, d));
    }
  });

  test('a saved reference gives the same distance, and another one is refused by what differs', async () => {
    const path = join(dir, 'val.npy');
    const features = await encoderFeatures(encoder);
    const first = await evaluateWith({ features });
    await saveFeatureSet(path, first.featureSets!.reference);
    const reference = await loadFeatureSet(path);
    const second = await evaluateWith({ features, reference });
    expect(second.fid!.value).toBe(first.fid!.value);
    const sha256 = createHash('sha256')
      .update(await readFile(path))
      .digest('hex');
    expect(second.fid!.reference).toEqual({ images: 33, pins: first.featureSets!.reference.pins, file: { path, sha256 } });

    const others = { features: await encoderFeatures(encoder, { pool: 'class' }), size: 28 };
    await expect(evaluateWith({ ...others, reference })).rejects.toMatchObject({
      code: 'BAD_INPUT',
      message: 'reference: expected features with pool class, size 28x28, but got pool mean, size 56x56',
    });
    const elsewhere = { ...reference.pins!, extractor: { ...features.pin, sha256: 'f'.repeat(64) } };
    await expect(evaluateWith({ features, reference: { ...reference, pins: elsewhere } })).rejects.toThrow(
      /but got extractor encoder ffff/,
    );
  });

  test('an .npy without pins is taken only when that is allowed, and one of another .json never', async () => {
    const path = join(dir, 'external.npy');
    await writeFile(path, await readFile(join(fixtures, 'eval', 'features-a.npy')));
    await expect(loadFeatureSet(path)).rejects.toMatchObject({ code: 'BAD_INPUT', message: /external\.json beside it/ });
    const unpinned = await loadFeatureSet(path, { allowUnpinned: true });
    const { fid } = await evaluateWith({ features: unpinned, reference: unpinned });
    expect(fid).toMatchObject({ reference: { images: 200, pins: undefined }, dimensions: 16 });
    await writeFile(join(dir, 'external.json'), await readFile(join(dir, 'val.json')));
    await expect(loadFeatureSet(path, { allowUnpinned: true })).rejects.toThrow(/expected the file that .*external\.json was written for/);
  });

  test('what does not fit is refused before anything is computed', async () => {
    const refused = (options: Partial<EvaluateOptions>): Promise<unknown> => evaluateWith(options).catch((error: unknown) => error);
    const flatFolder = join(dir, 'flat');
    await mkdir(flatFolder);
    await writeFile(join(flatFolder, 'a.png'), await readFile(join(dir, 'val', 'left', '000.png')));
    expect(await refused({ train: await openDataset(flatFolder) })).toMatchObject({ code: 'BAD_INPUT', subject: 'train' });
    await mkdir(join(dir, 'renamed', 'up'), { recursive: true });
    await writeFile(join(dir, 'renamed', 'up', 'a.png'), await readFile(join(flatFolder, 'a.png')));
    expect(await refused({ train: await openDataset(join(dir, 'renamed')) })).toMatchObject({ message: /others: up, left, right/ });
    expect(await refused({ teacher: encoder })).toMatchObject({ code: 'BAD_INPUT', subject: 'teacher' });
    expect(await refused({ reference: { features: ndarray(new Float32Array(4), [2, 2]), pins: undefined } })).toMatchObject({
      subject: 'features',
    });
    expect(await refused({ signal: AbortSignal.abort() })).toMatchObject({ code: 'ABORTED' });
  });

  test('a broken image is named', async () => {
    const broken = join(dir, 'broken');
    await mkdir(broken);
    await writeFile(join(broken, 'good.png'), await readFile(join(dir, 'val', 'left', '000.png')));
    await writeFile(join(broken, 'text.png'), 'no image');
    await expect(evaluateWith({ data: await openDataset(broken) })).rejects.toMatchObject({
      code: 'BAD_INPUT',
      message: /broken\/text\.png/,
    });
  });
});

/** Mean over the tokens after the class token. */
function meanCosine(a: NdArray, b: NdArray): number {
  const [images, tokens, width] = a.shape as [number, number, number];
  let sum = 0;
  for (let i = 0; i < images; i++)
    for (let t = 1; t < tokens; t++) {
      const product = (x: NdArray, y: NdArray): number =>
        Array.from({ length: width }, (_, d) => x.get(i, t, d) * y.get(i, t, d)).reduce((p, q) => p + q);
      sum += product(a, b) / Math.sqrt(product(a, a) * product(b, b));
    }
  return sum / (images * (tokens - 1));
}

describe('rFID with a file of the user', () => {
  const path = (): string => join(dir, 'inception.onnx');
  beforeAll(async () => {
    const nodes = [{ op: 'GlobalAveragePool', inputs: ['x'], outputs: ['out'] }];
    await writeFile(path(), onnxModel({ nodes, inputs: { x: [2, 3, 299, 299] }, outputs: { out: [2, 3, 1, 1] } }));
  });

  test('without onnxruntime-node: how to get it', async () => {
    await expect(inceptionFeatures(path())).rejects.toMatchObject({ code: 'UNSUPPORTED', message: /npm install onnxruntime-node/ });
  });

  const installed = existsSync(join(peers, 'node_modules', 'onnxruntime-node')); // installed by the benchmarks
  (installed ? test : test.skip)('features of its first output, pinned by its hash', async () => {
    const [colours, saved] = [join(dir, 'colours'), join(dir, 'inception.npy')];
    await mkdir(colours);
    for (const [i, background] of ['#ff0033', '#0066cc'].entries())
      await sharp({ create: { width: 60, height: 60, channels: 3, background } })
        .png()
        .toFile(join(colours, `${i}.png`));
    // In a separate process, because ONNX Runtime's results are not Float32Arrays in jest's realm.
    const run = cli(
      peers,
      colours,
      '-m',
      golden('uniflow-tiny'),
      '--inception',
      path(),
      '--batch',
      '2',
      '--save-features',
      saved,
      '--json',
    );
    expect(run).toMatchObject({ status: 0, stderr: '' });
    expect((JSON.parse(run.stdout) as Evaluation).fid).toMatchObject({ name: 'rFID', dimensions: 3, reference: { images: 2 } });
    const { features, pins } = await loadFeatureSet(saved);
    [255, 0, 51, 0, 102, 204].forEach((colour, i) => expect(features.data[i]).toBeCloseTo(colour / 255, 3));
    const sha256 = createHash('sha256')
      .update(await readFile(path()))
      .digest('hex');
    expect(pins!.extractor).toMatchObject({ kind: 'inception', name: 'inception.onnx', sha256, size: [299, 299] });
  });
});

/** Runs `uniflow eval` in the folder `cwd`. */
function cli(cwd: string, ...args: string[]): { status: number | null; stdout: string; stderr: string } {
  const command = ['--import', 'tsx', join(root, 'lib', 'cli', 'main.ts'), 'eval', ...args, '--threads', '1'];
  return spawnSync(process.execPath, command, { cwd, encoding: 'utf8', env: { ...process.env, UNIFLOW_DEBUG: '', NODE_OPTIONS: '' } });
}

describe('uniflow eval', () => {
  let model: string;
  beforeAll(async () => {
    model = join(dir, 'model');
    const uniflow = UniFlow.random('nano');
    await uniflow.save(model);
    await uniflow.dispose();
  });

  test('everything at once, as text and as a file; then against what was saved', async () => {
    const [out, saved] = [join(dir, 'result.json'), join(dir, 'saved.npy')];
    const common = ['-m', model, '--features', golden('dinov2')];
    const run = cli(
      root,
      join(dir, 'val'),
      ...common,
      '--train',
      join(dir, 'train'),
      '--teacher',
      model,
      '--save-features',
      saved,
      '-o',
      out,
    );
    expect(run.status).toBe(0);
    expect(run.stdout).toMatch(
      /^model .*nano|model .*\ndata +33 images of .*val \(all; sha256 [0-9a-f]{12}\.\.\.\), centre crop 56x56\nPSNR +\d+\.\d\d dB\nSSIM +-?\d\.\d{4}\nchannels +effective rank \d+\.\d, \d+\.\d\d % in use\nbaseline +PSNR \d+\.\d\d dB, SSIM \d\.\d{4} \(PCA of 16 coefficients a patch, fitted to 24 images of .*train\)\nFID +\S+ \(.*dinov2 .* 33 against 33 images\)\ntokens +linear probe \d+\.\d\d %, k-NN .*\nlatents .*\nteacher .*\nlayer cosine +1: 1\.0000 {2}2: 1\.0000\n$/,
    );
    const result = JSON.parse(await readFile(out, 'utf8')) as Evaluation;
    const sha256 = createHash('sha256')
      .update(await readFile(join(model, 'model.safetensors')))
      .digest('hex');
    expect(result.pins).toMatchObject({ model: { name: model, sha256 }, teacher: { sha256 }, train: { images: 24 } });
    expect(result.featureSets).toBeUndefined();

    const again = cli(root, join(dir, 'val'), ...common, '--reference', saved, '--json');
    expect(again).toMatchObject({ status: 0, stderr: '' });
    expect((JSON.parse(again.stdout) as Evaluation).fid!.value).toBe(result.fid!.value);
  });

  test('--limit is evenly spaced; unpinned features say so', () => {
    const external = join(fixtures, 'eval', 'features-a.npy');
    const files = ['--features', external, '--reference', external];
    const refused = cli(root, join(dir, 'val'), '-m', model, ...files);
    expect(refused).toMatchObject({ status: 1, stdout: '' });
    expect(refused.stderr).toMatch(/^uniflow: .*features-a\.npy: expected .*features-a\.json beside it/);
    const run = cli(root, join(dir, 'val'), '-m', model, ...files, '--allow-unpinned', '--limit', '5');
    expect(run.stdout).toMatch(/5 images of .*\(5 of 33, evenly spaced;/);
    expect(run.stdout).toMatch(/FID .*200 against 200 images; UNPINNED features/);
  });

  test('bad usage', () => {
    const run = cli(root, join(dir, 'val'), '-m', model, '--features', 'x', '--inception', 'y');
    expect(run).toMatchObject({ status: 2, stdout: '' });
    expect(cli(root, '--help').stdout).toContain('Examples:\n  $ uniflow eval held-out/');
  });
});
