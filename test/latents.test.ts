/** Latents as read by `decode`: everything that `encode` writes, and arrays from other programs. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { parquetWriteBuffer } from 'hyparquet-writer';
import { once } from 'node:events';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { create } from 'tar';
import { UniFlow } from '../lib/index.js';
import { npyHeader } from '../lib/io/npy.js';
import { encodeToShards, openShards, openSource, type RunOptions } from '../lib/shards/index.js';
import { encodeToFile } from '../lib/shards/file.js';
import { openLatents } from '../lib/shards/latents.js';
import { decodeImage } from '../lib/images/decode.js';
import { failure, golden, startCommand } from './support.js';

const SIZES: [number, number][] = [[64, 64], [96, 48], [40, 90]]; // prettier-ignore
const formats = ['safetensors', 'npy', 'tar', 'parquet'] as const;
const stores = ['float32', 'float16', 'bfloat16'] as const;

let dir: string;
let uniflow: UniFlow;
const inDir = (...parts: string[]): string => join(dir, ...parts);

async function encode(folder: string, options: RunOptions): Promise<string> {
  await encodeToShards(uniflow, openSource(inDir('pictures')), inDir(folder), { shardSize: 2, batchSize: 2, ...options });
  return inDir(folder);
}

beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-latents-'));
  uniflow = await UniFlow.load(golden('uniflow-tiny'));
  await mkdir(inDir('pictures'));
  for (const [i, [width, height]] of SIZES.entries())
    await sharp({ create: { width, height, channels: 3, background: { r: 80 * i, g: 200 - 60 * i, b: 90 } } })
      .png()
      .toFile(inDir('pictures', `${i}.png`));
});
afterAll(async () => {
  await uniflow.dispose();
  await rm(dir, { recursive: true, force: true });
});

describe('latents with grids of their own', () => {
  test.each(formats.flatMap((format) => stores.map((store) => [format, store] as const)))(
    'come from a folder, and from each shard alone: %s of %s',
    async (format, store) => {
      const folder = await encode(`${format}-${store}`, { format, store, fit: 'native', tokens: true });
      const shards = await openShards(folder);
      const whole = await openLatents(folder);
      const files = (await readdir(folder)).filter((name) => name.endsWith(format === 'npy' ? '.latents.npy' : `.${format}`)).sort();
      const alone = [];
      for (const name of files.filter((name) => name.startsWith('shard-'))) {
        const file = await openLatents(join(folder, name));
        for (const [i, picture] of file.pictures.entries()) alone.push({ picture, latents: await file.at(i) });
      }
      expect(whole.pictures).toHaveLength(3);
      for (let i = 0; i < 3; i++) {
        const { id, grid, latents } = await shards.at(i);
        const picture = { id, grid, patches: grid.rows * grid.cols };
        expect(whole.pictures[i]).toEqual(picture);
        expect(await whole.at(i)).toEqual(latents);
        expect(alone[i]).toEqual({ picture, latents });
      }
    },
  );

  test.each(formats.flatMap((format) => stores.map((store) => [format, store] as const)))(
    'are the same in one file: .%s of %s',
    async (format, store) => {
      const path = inDir(`one-${store}.${format}`);
      const { files, shape, grid } = await encodeToFile(uniflow, openSource(inDir('pictures')), path, {
        store,
        fit: 'native',
        tokens: true,
      });
      const beside = (ending: string): string => inDir(`one-${store}${ending}`);
      expect(files).toEqual(format === 'npy' ? [path, beside('.tokens.npy'), beside('.ids.json')] : [path]);
      const [one, whole] = [await openLatents(path), await openLatents(await encode(`whole-${store}`, { store, fit: 'native' }))];
      expect(one.pictures).toEqual(whole.pictures);
      for (let i = 0; i < 3; i++) expect(await one.at(i)).toEqual(await whole.at(i));
      const vectors = whole.pictures.reduce((sum, { patches }) => sum + patches, 0);
      expect([shape, grid]).toEqual([[vectors, 16], undefined]);
    },
  );

  test('decode to images of their shapes, named after the ids', async () => {
    const folder = await encode('native', { format: 'npy', store: 'bfloat16', fit: 'native' });
    const out = inDir('decoded');
    expect(await startCommand(['decode', folder, '-m', golden('uniflow-tiny'), '-o', out]).ended).toMatchObject({
      code: 0,
      stdout: `3 images in ${out}\n`,
    });
    const shards = await openShards(folder);
    for (let i = 0; i < 3; i++) {
      const { grid } = await shards.at(i);
      expect(await decodeImage(join(out, `${i}.png`))).toMatchObject({ width: 14 * grid.cols, height: 14 * grid.rows });
    }
  });
});

test('every kind of input goes into one file: a tar, a Parquet file, a URL', async () => {
  const png = await readFile(inDir('pictures', '0.png'));
  await create({ file: inDir('a.tar'), cwd: inDir('pictures') }, ['0.png', '1.png']);
  const columnData = [{ name: 'image', data: [png], type: 'BYTE_ARRAY' as const }];
  await writeFile(inDir('p.parquet'), new Uint8Array(parquetWriteBuffer({ columnData })));
  const server = createServer((_, response) => void response.end(png)).listen(0, '127.0.0.1');
  await once(server, 'listening');
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/0.png?signature=${'x'.repeat(300)}`;
  const out = inDir('inputs', 'all.safetensors');
  const run = await startCommand(['encode', inDir('a.tar'), inDir('p.parquet'), url, '-m', golden('uniflow-tiny'), '-o', out]).ended;
  server.close();
  expect(run).toMatchObject({ code: 0, stdout: `4 images as latents [4, 16, 16] in ${out}\n` });
  const latents = await openLatents(out);
  expect(latents.pictures.map(({ id }) => id)).toEqual([inDir('a.tar', '0'), inDir('a.tar', '1'), inDir('p.parquet', '0'), url]);
  expect(await latents.at(2)).toEqual(await latents.at(0));
  expect(await latents.at(3)).toEqual(await latents.at(0));
  const decoded = await startCommand(['decode', out, '-m', golden('uniflow-tiny'), '-o', inDir('named')]).ended;
  expect([decoded.code, (await readdir(inDir('named'))).sort()]).toEqual([0, ['0-2.png', '0-3.png', '0.png', '1.png']]);
});

test('ids that would make the header of .safetensors too long are beside it', async () => {
  const image = { data: new Uint8Array(3 * 64 * 64), width: 64, height: 64 };
  const items = Array.from({ length: 4 }, (_, i) => ({ id: `${i}${'x'.repeat(24e6)}`, image }));
  const { files } = await encodeToFile(uniflow, items, inDir('long.safetensors'));
  expect(files).toEqual([inDir('long.safetensors'), inDir('long.ids.json')]);
  expect((await openLatents(inDir('long.safetensors'))).pictures.map(({ id }) => id === items[Number(id?.[0])]?.id)).toEqual(
    Array(4).fill(true),
  );
  await rm(inDir('long.ids.json'));
});

test('an array of NumPy alone is latents without names: float32, float16, and bfloat16 as its bits', async () => {
  for (const [type, one] of [
    ['<f4', [0, 0, 128, 63]],
    ['<f2', [0, 60]],
    ['<u2', [128, 63]],
  ] as const) {
    await writeFile(inDir('alone.npy'), Buffer.concat([npyHeader(type, [2, 3, 4]), ...Array<Buffer>(24).fill(Buffer.from(one))]));
    const latents = await openLatents(inDir('alone.npy'));
    expect(latents.pictures).toEqual(Array(2).fill({ id: undefined, grid: undefined, patches: 3 }));
    expect([...(await latents.at(1)).data]).toEqual(Array(12).fill(1));
  }
});

describe('what is no latents is refused by name', () => {
  test.each([
    ['pictures', /pictures: expected a complete run with manifest\.json, but got none/],
    ['pictures/0.png', /latents: expected a folder .*, or a name ending in \.safetensors, \.npy, \.tar, \.parquet/],
    ['missing.npy', /missing\.npy: expected a file or folder, but got nothing of that name/],
  ])('%s', async (path, message) => {
    expect((await failure(openLatents(inDir(path)))).message).toMatch(message);
  });

  test.each(formats)('a damaged .%s', async (format) => {
    await cp(inDir('pictures', '0.png'), inDir(`damaged.${format}`));
    const error = await failure(openLatents(inDir(`damaged.${format}`)));
    expect(error.code).toBe('BAD_INPUT');
    expect(error.message).toContain(`damaged.${format}`);
  });

  test('tokens alone', async () => {
    const folder = await encode('tokens', { latents: false, tokens: true });
    expect((await failure(openLatents(folder))).message).toMatch(/expected latents, but got tokens alone/);
  });

  test('an array of another shape, or that was cut off', async () => {
    await writeFile(inDir('flat.npy'), Buffer.concat([npyHeader('<f4', [3, 4]), Buffer.alloc(48)]));
    expect((await failure(openLatents(inDir('flat.npy')))).message).toMatch(
      /expected latents \[B, N, Z\], or \[T, Z\] with grids, but got \[3, 4\]/,
    );
    await writeFile(inDir('cut.npy'), Buffer.concat([npyHeader('<f4', [2, 3, 4]), Buffer.alloc(48)]));
    expect((await failure(openLatents(inDir('cut.npy')))).message).toMatch(/expected \d+ bytes for the shape \[2, 3, 4\]/);
  });
});
