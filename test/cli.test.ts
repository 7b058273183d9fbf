/** The command line as users run it: in a separate process, on real files. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import type { NdArray } from 'ndarray';
import { mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import sharp, { type Sharp } from 'sharp';
import { decoderFlops, encoderFlops, projectionFlops } from '../lib/cli/cost.js';
import { fileNames } from '../lib/cli/inputs.js';
import { rateText } from '../lib/cli/output.js';
import { refuseBeside, refuseInside } from '../lib/cli/outputs.js';
import { parseUniFlowConfig, presets } from '../lib/config.js';
import { decodeImage, UniFlow } from '../lib/index.js';
import { ArrayFile } from '../lib/io/arrays.js';
import { safetensorsHeader } from '../lib/io/files.js';
import { readNpy } from '../lib/io/npy.js';
import { failure, golden, relativeL2, root, startCommand, tolerances, type CommandRun } from './support.js';

const model = golden('uniflow-tiny');
let dir: string;
let photos: string;
const inDir = (...parts: string[]): string => join(dir, ...parts);

const cli = (...args: string[]): Promise<CommandRun> => startCommand(args).ended;
const json = ({ stdout }: CommandRun): any => JSON.parse(stdout);

function image(width: number, height: number, color: string): Sharp {
  const circle = `<svg width="${width}" height="${height}"><circle cx="40%" cy="50%" r="30%" fill="white"/></svg>`;
  return sharp({ create: { width, height, channels: 3, background: color } }).composite([{ input: Buffer.from(circle) }]);
}

/** Images in several formats, two damaged ones, other files, and a circular link. */
async function makePhotos(): Promise<void> {
  await mkdir(join(photos, 'sub'), { recursive: true });
  await image(80, 60, '#c04020').png().toFile(join(photos, 'a.png'));
  await image(60, 90, '#20c040').jpeg().toFile(join(photos, 'c.JPG'));
  await image(70, 70, '#2040c0')
    .webp()
    .toFile(join(photos, 'sub', 'a.webp'));
  const png = await image(64, 64, '#808000').png().toBuffer();
  await writeFile(join(photos, 'b-truncated.png'), png.subarray(0, png.length / 2));
  await writeFile(join(photos, 'd-text.jpg'), 'not an image');
  await writeFile(join(photos, '.hidden.png'), png);
  await writeFile(join(photos, 'notes.txt'), 'notes');
  await symlink('..', join(photos, 'sub', 'loop'));
}

const goodPhotos = (): string[] => [join(photos, 'a.png'), join(photos, 'c.JPG'), join(photos, 'sub', 'a.webp')];

beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-cli-'));
  photos = inDir('photos');
  await makePhotos();
});
afterAll(() => rm(dir, { recursive: true, force: true }));

describe('encode, decode, reconstruct', () => {
  let expected: { latents: NdArray; tokens?: NdArray };
  beforeAll(async () => {
    const uniflow = await UniFlow.load(model);
    expected = await uniflow.encode(goodPhotos(), { tokens: true });
    await uniflow.dispose();
  });

  test('encode writes the latents of the library to safetensors, and skips broken files', async () => {
    const out = inDir('new-folder', 'latents.safetensors');
    const run = await cli('encode', photos, '--model', model, '--out', out, '--tokens', '--batch', '2');
    expect(run.code).toBe(1);
    expect(run.stdout).toBe(`3 images as latents [3, 16, 16] in ${out} (2 failed)\n`);
    expect(run.stderr).toContain(`uniflow: ${join(photos, 'b-truncated.png')}: the image is damaged or incomplete`);
    expect(run.stderr).toContain(`uniflow: ${join(photos, 'd-text.jpg')}: expected a JPEG`);
    const file = new ArrayFile(out);
    expect(file.metadata).toEqual({ ids: JSON.stringify(goodPhotos()), grid: '4x4', model });
    expect(relativeL2(await file.read('latents'), expected.latents)).toBeLessThan(tolerances.batch);
    expect(relativeL2(await file.read('tokens'), expected.tokens!)).toBeLessThan(tolerances.batch);
    expect(await readdir(dirname(out))).toEqual(['latents.safetensors']);
  });

  test('encode writes npy and reports JSON with --json', async () => {
    const out = inDir('latents.npy');
    const run = await cli('encode', ...goodPhotos(), '-m', model, '-o', out, '--tokens', '--json', '--threads', '1');
    expect(run).toMatchObject({ code: 0, stderr: '' });
    expect(json(run)).toMatchObject({ images: 3, shape: [3, 16, 16], grid: { rows: 4, cols: 4 }, failed: [] });
    expect(relativeL2(await readNpy(out), expected.latents)).toBeLessThan(tolerances.batch);
    expect(relativeL2(await readNpy(inDir('latents.tokens.npy')), expected.tokens!)).toBeLessThan(tolerances.batch);
    expect(JSON.parse(await readFile(inDir('latents.ids.json'), 'utf8'))).toEqual({ ids: goodPhotos(), grid: '4x4', model });
  });

  test('decode writes the images of the library, named after the ids', async () => {
    const out = inDir('decoded');
    const run = await cli('decode', inDir('latents.npy'), '-m', model, '-o', out, '--steps', '2', '--seed', '5', '--batch', '2');
    expect(run).toMatchObject({ code: 0, stdout: `3 images in ${out}\n` });
    expect((await readdir(out)).sort()).toEqual(['a-2.png', 'a.png', 'c.png']);
    const uniflow = await UniFlow.load(model);
    const images = await uniflow.decode(await readNpy(inDir('latents.npy')), { steps: 2, seed: 5 });
    await uniflow.dispose();
    const { data, width, height } = await decodeImage(join(out, 'a-2.png'));
    expect([height, width]).toEqual([56, 56]);
    expect(Buffer.compare(data, (images.data as unknown as Uint8Array).subarray(2 * data.length))).toBe(0);
  });

  test('decode knows the grid of latents of non-square images, with --json and other formats', async () => {
    const latents = inDir('wide.safetensors');
    const encoded = await cli(
      'encode',
      join(photos, 'a.png'),
      '-m',
      model,
      '-o',
      latents,
      '--size',
      '28x70',
      '--dtype',
      'bfloat16',
      '--json',
    );
    expect(json(encoded).shape).toEqual([1, 10, 16]);
    const decoded = json(await cli('decode', latents, '-m', model, '-o', inDir('wide'), '--format', 'webp', '--json'));
    expect(decoded).toMatchObject({ images: 1, files: [inDir('wide', 'a.webp')] });
    expect(await decodeImage(inDir('wide', 'a.webp'))).toMatchObject({ width: 70, height: 28 });
  });

  test('reconstruct writes images side by side with their quality when the folder has broken files', async () => {
    const out = inDir('compared');
    const run = await cli('reconstruct', photos, join(photos, 'missing.png'), '-m', model, '-o', out);
    expect(run.code).toBe(1);
    const lines = run.stdout.trimEnd().split('\n');
    expect(lines).toHaveLength(4);
    for (const [i, path] of goodPhotos().entries())
      expect(lines[i]).toMatch(new RegExp(`^${path}  PSNR \\d+\\.\\d\\d dB  SSIM -?\\d\\.\\d{4}$`));
    expect(lines[3]).toMatch(/^mean of 3 images {2}PSNR .* \(3 failed\)$/);
    expect(run.stderr).toContain(`uniflow: ${join(photos, 'missing.png')}: expected a file, but got no such file`);
    expect((await readdir(out)).sort()).toEqual(['a-2.png', 'a.png', 'c.png']);
    expect(await decodeImage(join(out, 'a.png'))).toMatchObject({ width: 56 + 8 + 56, height: 56 });
  });

  test('reconstruct --json reports the numbers of the library', async () => {
    const run = await cli('reconstruct', ...goodPhotos(), '-m', model, '-o', inDir('compared'), '--json', '--format', 'jpg');
    const uniflow = await UniFlow.load(model);
    const { perImage } = await uniflow.reconstruct(goodPhotos());
    await uniflow.dispose();
    const { pictures: images, psnr, failed } = json(run);
    expect(run).toMatchObject({ code: 0, stderr: '' });
    expect(failed).toEqual([]);
    expect(images.map((p: { psnr: number }) => p.psnr)).toEqual(perImage.psnr);
    expect(psnr).toBeCloseTo(perImage.psnr.reduce((a, b) => a + b) / 3, 5);
  });

  test('writes no file and exits with 1 when no image is readable', async () => {
    const run = await cli('encode', join(photos, 'd-text.jpg'), '-m', model, '-o', inDir('nothing.npy'));
    expect(run.code).toBe(1);
    expect(run.stderr).toContain('uniflow: nothing is written');
    expect(await readdir(dir)).not.toContain('nothing.npy');
  });

  test('a mistyped input leaves no folder behind, whatever was to be written', async () => {
    for (const [command, out] of [
      ['encode', 'mistyped/'],
      ['encode', 'mistyped/l.npy'],
      ['reconstruct', 'mistyped'],
    ] as const) {
      const run = await cli(command, inDir('fotos'), inDir('fotos', '*.jpg'), '-m', model, '-o', inDir(out));
      expect(run).toMatchObject({
        code: 1,
        stdout: '',
        stderr: expect.stringMatching(/fotos: expected a file, .* but got nothing of that name/),
      });
    }
    expect(await readdir(dir)).not.toContain('mistyped');
  });

  test('an --out that is neither file nor folder is refused, and says what would do', async () => {
    for (const [out, message] of [
      ['-', /out: expected a file or a folder, but got '-': latents are not written to standard output/],
      ['out.v2', /out: expected a folder \(ending in \/ where its name has a dot\), or a name ending in .*, but got 'out\.v2'/],
    ] as const)
      expect(await cli('encode', photos, '-m', model, '-o', out)).toMatchObject({
        code: 2,
        stdout: '',
        stderr: expect.stringMatching(message),
      });
  });

  test('--json prints JSON, also of an error', async () => {
    const missing = await cli('encode', inDir('fotos'), '-m', model, '-o', inDir('none.npy'), '--json');
    expect([missing.code, json(missing).error]).toMatchObject([1, { code: 'NOT_FOUND', subject: inDir('fotos') }]);
    const usage = await cli('encode', photos, '--json');
    expect([usage.code, json(usage).error]).toMatchObject([2, { code: 'BAD_INPUT', message: expect.stringContaining('--out') }]);
  });

  test('tokens of other latents do not stay beside new ones', async () => {
    const files = async (): Promise<string[]> => (await readdir(dir)).filter((name) => name.startsWith('renewed.')).sort();
    const renew = (...more: string[]): Promise<CommandRun> =>
      cli('encode', goodPhotos()[0]!, '-m', model, '-o', inDir('renewed.npy'), ...more);
    await renew('--tokens');
    expect(await files()).toEqual(['renewed.ids.json', 'renewed.npy', 'renewed.tokens.npy']);
    await renew();
    expect(await files()).toEqual(['renewed.ids.json', 'renewed.npy']);
  });

  test('rejects an output that is also an input, before anything is written', async () => {
    const originals = inDir('originals');
    await mkdir(join(originals, 'sub'), { recursive: true });
    await image(64, 64, '#203040').png().toFile(join(originals, 'a.png'));
    await symlink(originals, inDir('same'));
    const before = await readFile(join(originals, 'a.png'));
    for (const [out, input] of [
      [originals, originals],
      [join(originals, 'sub', 'new'), originals],
      [inDir('same'), originals],
      [originals, inDir('same')],
      [originals, join(originals, '**', '*.png')],
    ] as const)
      expect((await failure(refuseInside(out, [inDir('elsewhere.png'), input]))).message).toMatch(/searched for images/);
    await refuseInside(inDir('originals-2'), [originals, join(originals, 'a.png'), '-', 'https://example.org/a.png']);
    expect((await failure(refuseBeside(inDir('same'), [join(originals, 'a.png')]))).message).toMatch(/folder of the original/);
    await refuseBeside(originals, [join(originals, 'gone.png')]);
    const run = await cli('reconstruct', originals, '-m', model, '-o', originals);
    expect(run).toMatchObject({ code: 2, stdout: '', stderr: expect.stringMatching(/searched for images/) });
    expect((await readdir(originals)).sort()).toEqual(['a.png', 'sub']);
    expect(Buffer.compare(before, await readFile(join(originals, 'a.png')))).toBe(0);
  });

  test('decode rejects the folder of the originals', async () => {
    const out = inDir('latents.safetensors');
    const labels = { ids: JSON.stringify([join(photos, 'a.png')]), grid: '4x4' };
    await writeFile(
      out,
      Buffer.concat([safetensorsHeader([['latents', { dtype: 'F32', shape: [1, 16, 16] }]], labels), Buffer.alloc(1024)]),
    );
    const run = await cli('decode', out, '-m', model, '-o', photos);
    expect(run).toMatchObject({ code: 2, stdout: '', stderr: expect.stringMatching(/folder of the original '.*a\.png'/) });
  });

  test('counts other files in one line, and exits with 1 when an image is skipped', async () => {
    const folder = inDir('mixed');
    await mkdir(folder);
    await image(64, 64, '#203040').png().toFile(join(folder, 'a.png'));
    for (const name of ['notes.txt', 'more.txt', 'read.md']) await writeFile(join(folder, name), 'text');
    const run = await cli('encode', folder, '-m', model, '-o', inDir('mixed.npy'));
    expect(run).toMatchObject({ code: 0, stderr: expect.stringContaining('uniflow: 3 files were not images: 2 .txt, 1 .md\n') });
    await symlink('nowhere', join(folder, 'lost.png'));
    const shards = await cli('encode', folder, '-m', model, '-o', `${inDir('mixed-shards')}/`);
    expect(shards.code).toBe(1);
    expect(shards.stderr).toContain(`uniflow: ${join(folder, 'lost.png')}: a link that leads nowhere\n`);
    const lines = (await readFile(inDir('mixed-shards', 'skipped.jsonl'), 'utf8')).trim().split('\n');
    expect(lines.map((line) => (JSON.parse(line) as { path: string }).path)).toEqual(
      ['lost.png', 'more.txt', 'notes.txt', 'read.md'].map((name) => join(folder, name)),
    );
  });

  test('exits with 130 and leaves nothing behind on Ctrl-C', async () => {
    await mkdir(inDir('interrupted'));
    const many = Array.from({ length: 200 }, () => join(photos, 'a.png'));
    const { child, ended } = startCommand([
      'encode',
      ...many,
      '-m',
      model,
      '-o',
      inDir('interrupted', 'l.safetensors'),
      '--size',
      '1120',
      '--batch',
      '1',
    ]);
    await new Promise<void>((resolve) => child.stderr!.once('data', () => resolve())); // waits for "encode: 0/200 images"
    await new Promise((resolve) => setTimeout(resolve, 500));
    child.kill('SIGINT');
    const run = await ended;
    expect(run).toMatchObject({ code: 130, stdout: '' });
    expect(run.stderr).toMatch(/^encode: 0 images\n(.*\n)*uniflow: interrupted\n$/);
    expect(await readdir(inDir('interrupted'))).toEqual([]);
  });
});

describe('init and info', () => {
  test('creates a model, describes it, and does not overwrite it', async () => {
    const made = inDir('made');
    expect(await cli('init', made, '--preset', 'nano', '--seed', '3', '--dtype', 'bfloat16')).toMatchObject({ code: 0, stderr: '' });
    const description = json(await cli('info', made, '--json'));
    expect(description).toMatchObject({ kind: 'uniflow', family: 'internvit', stored: ['BF16', 'F32'], latents: { shape: [16, 16] } });
    const uniflow = UniFlow.random('nano');
    const count = uniflow.parameters.flatMap((p) => p.parts).reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);
    await uniflow.dispose();
    expect(description.parameters.total).toBe(count);
    expect(Object.keys(description.parameters.parts).sort()).toEqual(['encoder', 'flow head', 'global blocks', 'latent projection']);

    const before = await readFile(join(made, 'model.safetensors'));
    const refused = await cli('init', made, '--preset', 'nano');
    expect(refused).toMatchObject({
      code: 1,
      stderr: `uniflow: ${join(made, 'config.json')} is there already; --force overwrites the model\n`,
    });
    expect(Buffer.compare(before, await readFile(join(made, 'model.safetensors')))).toBe(0);
    expect(json(await cli('init', made, '--preset', 'nano', '--force', '--json'))).toMatchObject({
      preset: 'nano',
      seed: 0,
      dtype: 'float32',
    });
  });

  test('info describes a plain encoder', async () => {
    const run = await cli('info', golden('clip'));
    expect(run).toMatchObject({ code: 0, stderr: '' });
    expect(run.stdout).toMatch(/vision encoder\n.*64x64, patches of 16: 4x4 = 16 tokens, and 1 in front\n/);
  });

  test('counts the operations of the published size', () => {
    const { encoder, decoder } = parseUniFlowConfig(presets.official);
    expect((encoderFlops(encoder) + projectionFlops(decoder)) / 1e12).toBeCloseTo(0.726, 3);
    expect(decoderFlops(decoder, 1) / 1e12).toBeCloseTo(0.32, 3);
    expect(decoderFlops(decoder, 3) - decoderFlops(decoder, 2)).toBe(decoderFlops(decoder, 2) - decoderFlops(decoder, 1));
  });
});

test('bench reports encode, decode and files, each with its rate and its share of the measured peak', async () => {
  const report = json(await cli('bench', photos.concat('/a.png'), '-m', model, '--seconds', '1', '--batch', '3', '--steps', '2', '--json'));
  expect(report).toMatchObject({ model, device: 'cpu', dtype: 'float32', threads: expect.any(Number), peak: expect.any(Number) });
  const { encoder, decoder } = parseUniFlowConfig(JSON.parse(await readFile(join(model, 'config.json'), 'utf8')));
  const [encode, decode] = [encoderFlops(encoder) + projectionFlops(decoder), decoderFlops(decoder, 2)];
  expect(report.rows.map(({ work, batch, flopsPerImage }: any) => [work, batch, flopsPerImage])).toEqual([
    ['encode', 1, encode],
    ['encode', 3, encode],
    ['decode, 2 steps', 1, decode],
    ['decode, 2 steps', 3, decode],
    ['encode 1 file', 3, encode],
  ]);
  for (const { work, medianMs, batch, imagesPerSecond, flopsPerImage, ofPeak } of report.rows) {
    expect(ofPeak).toBeCloseTo((imagesPerSecond * flopsPerImage) / report.peak, 10);
    expect(ofPeak).toBeGreaterThan(0);
    if (!work.endsWith('file')) expect(imagesPerSecond).toBeCloseTo((1000 * batch) / medianMs, 6);
  }
});

test('doctor verifies that encode works', async () => {
  const { works, findings } = json(await cli('doctor', '--json'));
  expect(works).toBe(true);
  expect(findings.map((f: { name: string }) => f.name)).toEqual(
    expect.arrayContaining(['Node.js', 'native addon', 'kernels', 'threads', 'hub cache', 'self-test']),
  );
});

describe('usage', () => {
  test.each(['encode', 'decode', 'reconstruct', 'init', 'info', 'bench', 'build', 'doctor'])(
    'shows examples in the help of %s',
    async (command) => {
      const run = await cli(command, '--help');
      expect(run).toMatchObject({ code: 0, stderr: '' });
      expect(run.stdout).toContain(`Examples:\n  $ uniflow ${command}`);
    },
  );

  test('prints the version', async () => {
    const { version } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { version: string };
    expect(await cli('--version')).toMatchObject({ code: 0, stdout: `${version}\n` });
  });

  test.each([
    ['an unknown option', ['encode', 'x', '-o', 'x.npy', '--modle', 'm'], "uniflow: unknown option '--modle' (Did you mean --model?)"],
    ['an unknown command', ['encdoe'], "uniflow: unknown command 'encdoe' (Did you mean encode?)"],
    [
      'a file of another kind',
      ['encode', 'x', '-m', model, '-o', 'x.txt'],
      "uniflow: out: expected a folder (ending in / where its name has a dot), or a name ending in .safetensors, .npy, .tar, .parquet, but got 'x.txt'",
    ],
    [
      'a size below one patch',
      ['encode', 'package.json', '-m', model, '-o', 'x.npy', '--size', '13'],
      'uniflow: size: expected whole numbers from the patch size 14',
    ],
    ['a number that is none', ['encode', 'x', '-m', model, '-o', 'x.npy', '--batch', 'many'], 'It must be a whole number from 1.'],
    ['an empty name', ['encode', 'x', '-m', model, '-o', ''], 'It must not be empty.'],
    ['shards of nothing', ['encode', 'x', '-m', model, '-o', 'x/', '--no-latents'], 'uniflow: --no-latents takes --tokens'],
    ['an unknown preset', ['init', 'x', '--preset', 'huge'], 'Allowed choices are nano, tiny, small, base, official.'],
  ])('%s is bad usage', async (_, args, message) => {
    const run = await cli(...args);
    expect(run.code).toBe(2);
    expect(run.stderr).toContain(message);
    expect(run.stdout).toBe('');
  });

  test('prints one readable line, or the stack if requested', async () => {
    const args = ['decode', inDir('missing.npy'), '-m', model, '-o', inDir('x')];
    const brief = await cli(...args);
    expect(brief.code).toBe(1);
    expect(brief.stderr).toMatch(/^uniflow: .*missing\.npy.*\n$/);
    expect((await cli(...args, '--verbose')).stderr).toMatch(/\n {4}at /);
    expect((await startCommand(args, { UNIFLOW_DEBUG: '1' }).ended).stderr).toMatch(/\n {4}at /);
  });
});

test('prints rates with three significant digits', () => {
  expect([0.01234, 1.5, 99.96, 1132.4].map(rateText)).toEqual(['0.0123', '1.50', '100', '1132']);
});

test('names files after the last part of the id, numbered when several share it', () => {
  expect(fileNames(['a/x.jpg', 'b/X.png', 'x-2.png', 'c/x.gif', '../..', ''], 'png')).toEqual([
    'x.png',
    'X-2.png',
    'x-2-2.png',
    'x-3.png',
    '...png',
    'image.png',
  ]);
});
