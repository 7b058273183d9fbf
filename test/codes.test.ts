/** Discrete codes: the quantiser and its gradient, encoding and decoding, files of every format, training, and Python's view of them. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { execFile } from 'node:child_process';
import ndarray, { type NdArray } from 'ndarray';
import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import sharp from 'sharp';
import { codeCount } from '../lib/codes.js';
import { CodeMeter } from '../lib/eval/code-use.js';
import { encodeToShards, openDataset, openShards, openSource, presets, train, UniFlow, VisionEncoder, type Levels } from '../lib/index.js';
import { npyHeader } from '../lib/io/npy.js';
import { codesToLatents, fsq, latentsToCodes } from '../lib/ops.js';
import { encodeToFile } from '../lib/shards/file.js';
import { openLatents } from '../lib/shards/latents.js';
import { linearStart } from '../lib/start/index.js';
import { fitQuantiser } from '../lib/start/quantiser.js';
import { Tape } from '../lib/tape.js';
import { Tensor, tidy } from '../lib/tensor.js';
import { awaken, failure, golden, here, photos, root, startCommand } from './support.js';

const formats = ['safetensors', 'npy', 'tar', 'parquet'] as const;
const LEVELS = [5, 4, 3, 2] as const;
/** 16 latent channels in groups of 4: four codes a token, out of 120. */
const config = { ...presets.nano, patch_size: 8, image_size: 32, hidden_act: 'gelu', codes: LEVELS };

let dir: string;
let uniflow: UniFlow;
let pixels: NdArray<Uint8Array>;
const inDir = (...parts: string[]): string => join(dir, ...parts);

async function take(t: Tensor): Promise<number[]> {
  using last = t;
  return [...((await last.read()).data as Float32Array)];
}

/** Smooth images of many colours, the same in every run. */
function images(count: number, size: number): NdArray<Uint8Array> {
  const data = Uint8Array.from({ length: count * size * size * 3 }, (_, i) => {
    const [image, row, column, channel] = [
      Math.floor(i / (3 * size * size)),
      Math.floor(i / (3 * size)) % size,
      Math.floor(i / 3) % size,
      i % 3,
    ];
    return 128 + 60 * Math.sin(image * 2.3 + row * (0.2 + 0.05 * image) + channel) + 60 * Math.cos(column * 0.3 + image * channel);
  });
  return ndarray(data, [count, size, size, 3]);
}

beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-codes-'));
  uniflow = awaken(UniFlow.random(config));
  pixels = images(7, 32);
  await mkdir(inDir('pictures'));
  for (let i = 0; i < 7; i++)
    await sharp(Buffer.from(pixels.data.subarray(i * 3072, (i + 1) * 3072)), { raw: { width: 32, height: 32, channels: 3 } })
      .png()
      .toFile(inDir('pictures', `${i}.png`));
});
afterAll(async () => {
  await uniflow.dispose();
  await rm(dir, { recursive: true, force: true });
});

describe('the quantiser', () => {
  const lists: Levels[] = [[2], [3], [7, 5], [4, 4, 4], [2, 3, 2, 5], [8, 5, 5, 5]];

  test.each(lists.map((levels) => [levels.join(','), levels] as const))(
    '%s: every code has its latents, and they have that code',
    async (_, levels) => {
      const all = Array.from({ length: codeCount(levels) }, (_, code) => code);
      const { latents, codes } = here(() =>
        tidy(() => {
          const latents = codesToLatents(Tensor.from({ data: Int32Array.from(all), shape: [all.length, 1] }), levels);
          return { latents, codes: latentsToCodes(latents, levels) };
        }),
      );
      expect(codes.shape).toEqual([all.length, 1]);
      expect(await take(codes)).toEqual(all);
      const expected = all.flatMap((code) => {
        let left = code;
        return levels.map((level) => {
          const digit = left % level;
          left = Math.floor(left / level);
          return Math.fround((digit - Math.floor(level / 2)) / Math.floor(level / 2));
        });
      });
      expect(await take(latents)).toEqual(expected);
    },
  );

  test('rounds what the paper bounds, and passes the gradient of the bound straight through', async () => {
    const levels = [8, 5, 2];
    const bounded = (x: number, i: number): number => {
      const level = levels[i % 3]!;
      const [range, offset] = [((level - 1) * 1.001) / 2, level % 2 ? 0 : 0.5];
      return range * Math.tanh(x + Math.atanh(offset / range)) - offset;
    };
    const halves = levels.map((level) => Math.floor(level / 2));
    const x = Float32Array.from({ length: 3 * 7 * 11 }, (_, i) => 2.5 * Math.sin(i * 1.7));
    const d = Float32Array.from({ length: x.length }, (_, i) => Math.cos(i));
    const { y, gradient } = here(() =>
      tidy(() => {
        const input = Tensor.from({ data: x, shape: [7, 33] });
        const tape = new Tape([input]);
        const y = tape.record(() => fsq(input, levels));
        return { y, gradient: tape.backward([{ output: y, gradient: Tensor.from({ data: d, shape: [7, 33] }) }]).get(input)! };
      }),
    );
    const [values, slopes] = [await take(y), await take(gradient)];
    for (const [i, v] of x.entries()) {
      const b = bounded(v, i);
      if (Math.abs(b - Math.floor(b) - 0.5) > 1e-4) expect(values[i]).toBe(Math.fround(Math.round(b) / halves[i % 3]!) + 0);
      const slope = (bounded(v + 1e-5, i) - bounded(v - 1e-5, i)) / 2e-5 / halves[i % 3]!;
      expect(slopes[i]).toBeCloseTo(d[i]! * slope, 4);
    }
  });

  test('is fitted to a normal latent nearly as well as the best quantiser of as many levels', () => {
    // Max 1960, "Quantizing for minimum distortion", table I: 1 - distortion
    for (const [level, best] of [
      [2, 0.6366],
      [3, 0.8098],
      [4, 0.8825],
      [5, 0.9201],
      [8, 0.96546],
    ] as const) {
      const { gain, offset, slope, intercept } = fitQuantiser(level); // prettier-ignore
      const [half, middle] = [Math.floor(level / 2), level % 2 ? 0 : 0.5];
      const range = ((level - 1) * 1.001) / 2;
      let [error, total] = [0, 0];
      for (let z = -6; z < 6; z += 0.001) {
        const q = Math.round(range * Math.tanh(gain * z + offset + Math.atanh(middle / range)) - middle) / half;
        const density = Math.exp(-z * z / 2); // prettier-ignore
        error += density * (z - slope * q - intercept) ** 2;
        total += density;
      }
      expect(1 - error / total).toBeGreaterThan(best - 0.02);
      expect(1 - error / total).toBeLessThan(best + 0.001);
    }
  });
});

describe('a model with codes', () => {
  test('encodes to latents that are quantised, and to their codes', async () => {
    const { latents, codes, tokens } = await uniflow.encode({ pixels }, { codes: true, tokens: true });
    expect(codes?.shape).toEqual([7, 16, 4]);
    expect(codes?.data).toBeInstanceOf(Uint16Array);
    expect(Math.max(...codes!.data)).toBeLessThan(120);
    expect(new Set(codes!.data).size).toBeGreaterThan(10);
    expect(tokens?.shape).toEqual([7, 16, 64]);
    const own = here(() => tidy(() => latentsToCodes(Tensor.from(latents), LEVELS)));
    expect(await take(own)).toEqual([...codes!.data]);
    expect((await uniflow.encode({ pixels })).codes).toBeUndefined();
  });

  test.each(['float32', 'bfloat16'] as const)('%s: decodes codes and latents to the same bits', async (dtype) => {
    await using model = awaken(UniFlow.random(config, { dtype }));
    const { latents, codes, grid } = await model.encode({ pixels }, { codes: true });
    const images = await model.decode(latents, { grid, output: 'float32' });
    expect((await model.decode({ codes: codes! }, { grid, output: 'float32' })).data).toEqual(images.data);
    const numbers = ndarray(Int32Array.from(codes!.data), codes!.shape);
    expect((await model.decode({ codes: numbers }, { grid, output: 'float32', batchSize: 3 })).data).toEqual(images.data);
  });

  test('gives an image the same codes in any batch', async () => {
    const all = (await uniflow.encode({ pixels }, { codes: true })).codes!;
    for (const batchSize of [1, 2, 5]) expect((await uniflow.encode({ pixels }, { codes: true, batchSize })).codes!.data).toEqual(all.data);
    const alone = await uniflow.encode({ pixels: ndarray(pixels.data.slice(5 * 3072, 6 * 3072), [1, 32, 32, 3]) }, { codes: true });
    expect(alone.codes!.data).toEqual(all.data.slice(5 * 64, 6 * 64));
  });

  test('takes images of another size, of odd grids', async () => {
    const { codes, grid } = await uniflow.encode(inDir('pictures', '0.png'), { codes: true, size: [24, 56] });
    expect([codes!.shape, grid]).toEqual([[1, 21, 4], { rows: 3, cols: 7 }]);
    expect((await uniflow.decode({ codes: codes! }, { grid })).shape).toEqual([1, 24, 56, 3]);
  });

  test('is saved with them, and one without them as before', async () => {
    await uniflow.save(inDir('model'));
    expect(JSON.parse(await readFile(inDir('model', 'config.json'), 'utf8'))).toMatchObject({ codes: [...LEVELS] });
    await using loaded = await UniFlow.load(inDir('model'));
    expect(loaded.config.codes).toEqual([...LEVELS]);
    expect((await loaded.encode({ pixels }, { codes: true })).codes!.data).toEqual(
      (await uniflow.encode({ pixels }, { codes: true })).codes!.data,
    );
    await using continuous = UniFlow.random('nano');
    expect('codes' in continuous.configJson).toBe(false);
    await using encoder = await VisionEncoder.load(golden('dinov2'));
    await using built = UniFlow.fromEncoder(encoder, { latentChannels: 8, codes: [8, 5], globalBlocks: 1, flowBlocks: 1 });
    expect(built.configJson).toMatchObject({ latent_ch: 8, codes: [8, 5] });
  });

  test('reports which codes are used, and how many bits they take', async () => {
    const meter = new CodeMeter({ codes: [2, 2], latentChannels: 4, patch: 4 });
    await meter.add(Int32Array.from([0, 3, 1, 3]));
    await meter.add(Int32Array.from([0, 3, 1, 3]));
    expect(meter.measure()).toEqual({ count: 4, used: [0.5, 0.25], entropy: [1, 0], bitsPerPixel: 4 / 16, entropyPerPixel: 1 / 16 });
  });
});

describe('bad input', () => {
  const codes = (values: number[], shape: number[]) => ({ codes: ndarray(Uint16Array.from(values), shape) });

  test.each([
    [[8, 1], 'BAD_CHECKPOINT: codes: expected a list of levels from 2 to 256, such as [8, 8, 8, 5, 5, 5], but got [8, 1]'],
    [[], 'BAD_CHECKPOINT: codes: expected a list of levels from 2 to 256, such as [8, 8, 8, 5, 5, 5], but got []'],
    [[256, 256, 2, 2], 'BAD_CHECKPOINT: codes: expected levels with a product of at most 65536, as codes are uint16, but got 262144'],
    [[8, 8, 8], 'BAD_CHECKPOINT: latentChannels: expected a multiple of 3, as a code takes as many channels as it has levels, but got 16'],
  ])('refuses the levels %j in a config', async (levels, message) => {
    const error = await failure(Promise.resolve().then(() => UniFlow.random({ ...config, codes: levels })));
    expect(`${error.code}: ${error.message}`).toBe(message);
  });

  test('refuses codes that do not exist, of another shape or of another type', async () => {
    const grid = { rows: 1, cols: 2 };
    const error = await failure(uniflow.decode(codes([0, 1, 119, 120, 3, 65535, 0, 0], [1, 2, 4]), { grid }));
    expect([error.code, error.subject]).toEqual(['BAD_INPUT', 'codes']);
    expect(error.message).toMatch(/expected ids from 0 to 119, but got 2 of 8 outside/);
    expect((await failure(uniflow.decode(codes([0, 1], [1, 2, 1]), { grid }))).message).toMatch(/codes: expected an ndarray \[B, N, 4\]/);
    const floats = ndarray(new Float32Array(8), [1, 2, 4]);
    expect((await failure(uniflow.decode({ codes: floats }, { grid }))).message).toMatch(/codes: expected an ndarray over a Uint16Array/);
  });

  test('says that a model with continuous latents has no codes, and how to train one that has', async () => {
    await using continuous = UniFlow.random('nano');
    for (const work of [continuous.encode({ pixels }, { codes: true }), continuous.decode(codes([0], [1, 1, 1]))]) {
      const error = await failure(work);
      expect(`${error.code}: ${error.message}`).toMatch(
        /UNSUPPORTED: codes: expected a model with codes \(uniflow train --codes 8,8,8,5,5,5\)/,
      );
    }
    expect((await failure(encodeToShards(continuous, openSource(inDir('pictures')), inDir('none'), { codes: true }))).code).toBe(
      'UNSUPPORTED',
    );
  });

  test('refuses to change the latents of an existing model, and levels that do not divide the latents', async () => {
    const settings = { data: inDir('pictures'), steps: 1 };
    const message = async (more: object): Promise<string> => (await failure(train(inDir('run'), { ...settings, ...more }))).message;
    expect(await message({ model: inDir('model'), codes: [5, 5] })).toMatch(
      /codes: expected none, as a model keeps the latents that it has/,
    );
    expect(await message({ encoder: golden('dinov2'), codes: [8, 8, 8, 5, 5, 5] })).toMatch(/latentChannels: expected a multiple of 6/);
    expect(await message({ init: 'nano', regime: 'finetune', codes: [8, 5, 5] })).toMatch(
      /latentChannels: expected a multiple of 3.*but got 16/,
    );
  });
});

describe('files', () => {
  const encodeTo = async (folder: string, options: object): Promise<string> => {
    await encodeToShards(uniflow, openSource(inDir('pictures')), inDir(folder), { shardSize: 3, batchSize: 2, codes: true, ...options });
    return inDir(folder);
  };
  const expected = async (): Promise<number[][]> => {
    const { codes } = await uniflow.encode({ pixels }, { codes: true });
    return Array.from({ length: 7 }, (_, i) => [...codes!.data.slice(i * 64, (i + 1) * 64)]);
  };

  test.each(formats)('%s: shards of codes are read back by the reader, as a folder and alone', async (format) => {
    const folder = await encodeTo(format, { format });
    const shards = await openShards(folder);
    expect(shards.manifest.header.arrays).toEqual({ codes: 4 });
    await shards.verify();
    const read = [];
    for await (const { codes, latents } of shards) {
      expect(latents).toBeUndefined();
      expect(codes!.shape).toEqual([16, 4]);
      read.push([...codes!.data]);
    }
    expect(read).toEqual(await expected());
    const whole = await openLatents(folder);
    expect(whole.array).toBe('codes');
    const alone = [];
    const ending = format === 'npy' ? '.codes.npy' : `.${format}`;
    for (const name of (await readdir(folder)).filter((name) => name.startsWith('shard-') && name.endsWith(ending)).sort()) {
      const file = await openLatents(join(folder, name));
      expect(file.array).toBe('codes');
      for (const [i, { id, grid }] of file.pictures.entries()) {
        expect([id, grid]).toEqual([`${alone.length}.png`, { rows: 4, cols: 4 }]);
        alone.push([...(await file.at(i)).data]);
      }
    }
    expect(alone).toEqual(read);
  });

  test.each(formats)('%s: codes beside latents and tokens, with grids of their own', async (format) => {
    const folder = await encodeTo(`all-${format}`, { format, fit: 'native', latents: true, tokens: true, store: 'bfloat16' });
    expect((await openLatents(folder)).array).toBe('latents');
    for await (const { codes, latents, tokens } of await openShards(folder)) {
      const own = here(() => tidy(() => latentsToCodes(Tensor.from(latents!), LEVELS)));
      expect(await take(own)).toEqual([...codes!.data]);
      expect(tokens!.shape).toEqual([16, 64]);
    }
  });

  test.each(['a.safetensors', 'a.codes.npy', 'a.tar', 'a.parquet'])('one file: %s', async (name) => {
    const { shape, files } = await encodeToFile(uniflow, openSource(inDir('pictures')), inDir(name), { codes: true });
    expect(shape).toEqual([7, 16, 4]);
    expect(files[0]).toBe(inDir(name));
    const file = await openLatents(inDir(name));
    expect(file.pictures.map(({ id }) => id)).toEqual(['0.png', '1.png', '2.png', '3.png', '4.png', '5.png', '6.png']);
    expect(await Promise.all(file.pictures.map(async (_, i) => [...(await file.at(i)).data]))).toEqual(await expected());
  });

  test('a .npy of codes has a name that says so, and latents do not', async () => {
    const write = (name: string, options: object): Promise<unknown> =>
      encodeToFile(uniflow, openSource(inDir('pictures')), inDir(name), options);
    expect((await failure(write('b.npy', { codes: true }))).message).toMatch(/out: expected a name ending in .codes.npy for codes/);
    expect((await failure(write('b.codes.npy', {}))).message).toMatch(/out: expected a name not ending in .codes.npy for latents/);
    await writeFile(inDir('c.codes.npy'), Buffer.concat([npyHeader('<f4', [1, 4, 4]), Buffer.alloc(64)]));
    expect((await failure(openLatents(inDir('c.codes.npy')))).message).toMatch(/c.codes.npy: expected <u2, but got <f4/);
  });

  test('are a fraction of the latents in size', async () => {
    const size = async (folder: string, name: string): Promise<number> => (await stat(join(folder, name))).size - 512; // but for the header
    const latents = await encodeTo('latents', { format: 'npy', codes: false });
    const codes = await encodeTo('codes-only', { format: 'npy' });
    const ratio = (await size(latents, 'shard-000000.latents.npy')) / (await size(codes, 'shard-000000.codes.npy'));
    expect(ratio).toBeGreaterThan(7);
  });

  test('the documented Python turns codes into the latents', async () => {
    const folder = await encodeTo('python/folder', { format: 'npy', latents: true });
    const text = await readFile(join(root, 'docs', 'codes.md'), 'utf8');
    const code = [...text.matchAll(/^```python\n(.*?)^```/gms)].map(([, code]) => code!).join('\n');
    const program = `
import json, numpy as np
${code}
for shard in (0, 1, 2):
    codes = np.load(f"folder/shard-{shard:06}.codes.npy")
    latents = np.load(f"folder/shard-{shard:06}.latents.npy")
    back = latents_of(codes, ${JSON.stringify(LEVELS)})
    print(json.dumps([bool((back == latents).all()), list(back.shape), str(back.dtype), bool((codes_of(latents, ${JSON.stringify(LEVELS)}) == codes).all())]))
`;
    const interpreter = (await import(join(root, 'scripts', 'system.mjs'))).pythonWithNumpy() as string;
    const { stdout } = await promisify(execFile)(interpreter, ['-c', program], { cwd: join(folder, '..') });
    const lines = stdout.trim().split('\n').map((line) => JSON.parse(line) as unknown); // prettier-ignore
    expect(lines).toEqual([3, 3, 1].map((n) => [true, [n, 16, 16], 'float32', true]));
  });
});

describe('training', () => {
  const shape = { ...presets.nano, hidden_size: 256, vit_hidden_size: 256, intermediate_size: 256, num_attention_heads: 4, patch_size: 8 };
  const base = { ...shape, image_size: 64, latent_ch: 24, num_hidden_layers: 1, num_decoder_layers: 1, position_embedding_type: 'rope' };

  test('a linear start fits the codec to the range of the quantiser, for new and for pretrained encoders', async () => {
    const data = await openDataset(photos);
    try {
      const quality = async (model: UniFlow, encoder: 'random' | 'pretrained'): Promise<number> => {
        await linearStart(model, data, { encoder, size: 64 });
        return (await model.reconstruct([join(photos, 'dogs.jpg'), join(photos, 'fig.jpg'), join(photos, 'brook.jpg')], { size: 64 })).psnr;
      };
      await using plain = UniFlow.random(base);
      const continuous = await quality(plain, 'random');
      const found: Record<string, number> = {};
      for (const encoder of ['random', 'pretrained'] as const)
        for (const levels of [[8, 5], [256], [16, 16]]) {
          await using model = UniFlow.random({ ...base, codes: levels }, { seed: 1 });
          found[`${encoder} ${levels.join()}`] = await quality(model, encoder);
        }
      for (const encoder of ['random', 'pretrained']) {
        expect(found[`${encoder} 256`]).toBeGreaterThan(continuous - 0.3);
        expect(found[`${encoder} 16,16`]).toBeGreaterThan(found[`${encoder} 8,5`]! + 2);
        expect(found[`${encoder} 8,5`]).toBeGreaterThan(continuous - 6);
      }
    } finally {
      await data.close();
    }
  }, 240_000);

  test('uniflow train --codes uses most of the codes, and its codes decode', async () => {
    const command = async (...args: string[]): Promise<string> => {
      const { code, stdout, stderr } = await startCommand(args).ended;
      expect(`${code} ${stderr}`).toMatch(/^0 /);
      return stdout;
    };
    const [run, settings] = [inDir('trained'), inDir('settings.json')];
    await writeFile(
      settings,
      JSON.stringify({ init: base, size: 64, batch: 6, scale: [0.3, 1], lr: 1e-3, warmup: 5, dtype: 'float32', ema: 0.9 }),
    );
    const data = ['--data', photos, '--validation', photos];
    const trained = await command(
      'train',
      '--config',
      settings,
      ...data,
      '--regime',
      'finetune',
      '--codes',
      '5,5,4',
      '--steps',
      '30',
      '-o',
      run,
      '--json',
    );
    const { validation } = JSON.parse(trained) as { validation: { psnr: number; codes: { count: number; used: number[] } } };
    expect(validation.codes.count).toBe(100);
    expect(validation.codes.used).toHaveLength(8);
    for (const used of validation.codes.used) expect(used).toBeGreaterThan(0.5);

    const evaluated = JSON.parse(await command('eval', photos, '-m', join(run, 'model'), '--size', '64', '--json')) as {
      psnr: number;
      codes: { bitsPerPixel: number; entropyPerPixel: number };
    };
    expect(evaluated.codes.bitsPerPixel).toBeCloseTo((8 * Math.log2(100)) / 64);
    expect(evaluated.codes.entropyPerPixel).toBeLessThan(evaluated.codes.bitsPerPixel);
    expect(evaluated.psnr).toBeGreaterThan(18);
    expect(await command('eval', photos, '-m', join(run, 'model'), '--size', '64')).toMatch(
      /^codes +[\d.]+ % of 100 used, .* a group; 0\.830 bits per pixel, /m,
    );

    const model = ['-m', join(run, 'model')];
    await command('encode', photos, ...model, '--size', '64', '--codes', '-o', inDir('photos.codes.npy'));
    await command('encode', photos, ...model, '--size', '64', '-o', inDir('photos.npy'));
    await command('decode', inDir('photos.codes.npy'), ...model, '-o', inDir('from-codes'));
    await command('decode', inDir('photos.npy'), ...model, '-o', inDir('from-latents'));
    const names = await readdir(inDir('from-codes'));
    expect(names.length).toBeGreaterThan(5);
    for (const name of names) expect(await readFile(inDir('from-codes', name))).toEqual(await readFile(inDir('from-latents', name)));
    expect(await command('info', join(run, 'model'))).toMatch(/codes +\[64, 8\] per image, 1\.02 kB in uint16: 100 codes, levels 5,5,4/);
  }, 240_000);
});
