/** Batch encoding: every kind of source, every format, and interrupted runs, with real files and a real server. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { parquetWriteBuffer } from 'hyparquet-writer';
import ndarray from 'ndarray';
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { appendFile, cp, link, mkdir, mkdtemp, open, readdir, readFile, rm, symlink, truncate, utimes, writeFile } from 'node:fs/promises';
import { createServer, type RequestListener, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { crc32, gzipSync } from 'node:zlib';
import sharp from 'sharp';
import { create, Header } from 'tar';
import { download } from '../lib/sources/url.js';
import { place, placementOf, type Target } from '../lib/images/fit.js';
import { openImage } from '../lib/images/decode.js';
import { mergeMoments, momentsOf, type Moments } from '../lib/shards/moments.js';
import type { ByteRange } from '../lib/shards/output.js';
import { readItemImage } from '../lib/sources/read.js';
import { encodePipeline } from '../lib/shards/pipeline.js';
import { fromStored, toStored } from '../lib/shards/store.js';
import {
  encodeToShards,
  FolderOutput,
  openShards,
  openSource,
  UniFlow,
  type Item,
  type RunOptions,
  type ShardSample,
  type Source,
} from '../lib/index.js';
import { ArrayFile } from '../lib/io/arrays.js';
import { pathExists } from '../lib/io/files.js';
import { readNpy } from '../lib/io/npy.js';
import { failure } from './support.js';
import { Compiled } from './fixtures/child.js';

let dir: string;
let uniflow: UniFlow;
/** Twelve small images of several shapes, below `pictures`, in walking order. */
let names: string[];
const inDir = (...parts: string[]): string => join(dir, ...parts);
const picture = (name: string): string => inDir('pictures', name);

async function put(name: string, content: string | Uint8Array): Promise<string> {
  const path = inDir(name);
  await mkdir(dirname(path), { recursive: true });
  await writeFile(path, content);
  return path;
}

function photo(width: number, height: number, seed: number): Promise<Buffer> {
  const data = Buffer.alloc(width * height * 3);
  for (let i = 0; i < data.length; i++) data[i] = (((i % (3 * width)) * (seed + 2)) / 9 + (i / width) * 3 + 40 * seed) & 255;
  return sharp(data, { raw: { width, height, channels: 3 } })
    .jpeg()
    .toBuffer();
}

beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-batch-'));
  uniflow = UniFlow.random('nano');
  const shapes: [number, number][] = [[64, 64], [96, 48], [40, 90], [64, 48]]; // prettier-ignore
  names = Array.from({ length: 12 }, (_, i) => `${['ant', 'bee', 'cat'][i % 3]}/${String(i).padStart(2, '0')}.jpg`).sort();
  for (const [i, name] of names.entries()) await put(`pictures/${name}`, await photo(...shapes[i % 4]!, i));
});
afterAll(async () => {
  await uniflow.dispose();
  await rm(dir, { recursive: true, force: true });
});

async function itemsOf(...inputs: string[]): Promise<Item[]> {
  const items: Item[] = [];
  for await (const item of openSource(inputs)) items.push(item);
  return items;
}
const idsOf = async (...inputs: string[]): Promise<string[]> => (await itemsOf(...inputs)).map(({ id }) => id);

/** The bytes of the image in a source's item. */
async function bytesOf({ image }: Item): Promise<Uint8Array> {
  const source = await readItemImage(image, { backoff: 1 });
  if (typeof source === 'string') return readFile(source);
  return (source as { data?: Uint8Array }).data ?? (source as Uint8Array);
}

async function samplesOf(folder: string): Promise<ShardSample[]> {
  const samples: ShardSample[] = [];
  for await (const sample of await openShards(folder)) samples.push(sample);
  return samples;
}

/** sha256 of a run's files by name, except the commits, which name attempts. */
async function contents(folder: string): Promise<Record<string, string>> {
  const found: Record<string, string> = {};
  for (const name of await new FolderOutput(folder).list(''))
    if (!name.startsWith('records/'))
      found[name] = createHash('sha256')
        .update(await readFile(join(folder, name)))
        .digest('hex');
  return found;
}

const encode = (folder: string, options: RunOptions = {}, source: Parameters<typeof encodeToShards>[1] = openSource(inDir('pictures'))) =>
  encodeToShards(uniflow, source, inDir(folder), { shardSize: 5, batchSize: 2, ...options });

describe('sources', () => {
  test('walks a folder recursively, sorted by name, visiting linked folders once', async () => {
    await cp(inDir('pictures'), inDir('linked'), { recursive: true });
    await symlink('..', inDir('linked', 'bee', 'above'));
    await symlink(inDir('linked', 'ant'), inDir('linked', 'zebra'));
    await symlink('nowhere', inDir('linked', 'broken.jpg'));
    await put('linked/.hidden.jpg', '');
    await put('linked/notes.md', '');
    expect(await idsOf(inDir('linked'))).toEqual(names);
    expect(await bytesOf((await itemsOf(inDir('linked')))[3]!)).toEqual(await readFile(picture(names[3]!)));
    const two = await idsOf(inDir('pictures', 'ant'), inDir('pictures', 'bee'));
    expect(two).toEqual(names.filter((name) => !name.startsWith('cat')).map(picture));
  });

  test('reads paths relative to a list, and URLs, ignoring text after a comma', async () => {
    const list = await put('pictures/list.csv', `\ufeff${names[1]},cat\r\n\n${names[0]}\nhttp://localhost/a,b.jpg\ngone.jpg`);
    const items = await itemsOf(list);
    expect(items.map(({ id }) => id)).toEqual([names[1], names[0], 'http://localhost/a,b.jpg', 'gone.jpg']);
    expect(await bytesOf(items[0]!)).toEqual(await readFile(picture(names[1]!)));
    expect(items[2]!.image).toEqual({ url: 'http://localhost/a,b.jpg' });
    await rm(list);
  });

  test('expands globs and braces', async () => {
    expect(await idsOf(inDir('pictures', '{cat,bee}', '*[13].jpg'))).toEqual(
      ['cat', 'bee'].flatMap((kind) => names.filter((name) => new RegExp(`^${kind}.*[13]\\.jpg`).test(name))).map(picture),
    );
    expect(await idsOf(inDir('pictures', '**', '0?.jpg'))).toEqual(names.filter((name) => /0.\.jpg/.test(name)).map(picture));
    const [many] = await itemsOf('{000000..100000}.jpg');
    expect(many!.image).toEqual({ error: expect.stringMatching(/expected at most 100000 names/) });
    const [none] = await itemsOf(inDir('pictures', '*.xyz'));
    expect(none!.image).toEqual({ error: expect.stringMatching(/expected files that match it/) });
  });

  test('reads one image per WebDataset key at its offset, with long names', async () => {
    const long = `${'deep/'.repeat(30)}long`;
    for (const [i, key] of ['a', 'b', long].entries()) {
      await put(`web/${key}.json`, '{}');
      await put(`web/${key}.jpg`, await readFile(picture(names[i]!)));
      await put(`web/${key}.png`, 'a second picture of the key');
    }
    const files = ['a', 'b', long].flatMap((key) => [`${key}.json`, `${key}.jpg`, `${key}.png`]);
    await create({ file: inDir('web.tar'), cwd: inDir('web') }, files);
    const items = await itemsOf(inDir('web.tar'));
    expect(items.map(({ id }) => id)).toEqual(['web.tar/a', 'web.tar/b', `web.tar/${long}`]);
    for (const [i, item] of items.entries()) expect(await bytesOf(item)).toEqual(await readFile(picture(names[i]!)));
    await cp(inDir('web.tar'), inDir('tars', '1.tar'));
    await cp(inDir('web.tar'), inDir('tars', '2.tar'));
    expect((await idsOf(inDir('tars'))).length).toBe(6);
    await put('tars/._1.tar', 'what a Mac leaves');
    await mkdir(inDir('tars', 'unpacked.tar'));
    expect((await idsOf(inDir('tars'))).length).toBe(6);
    await cp(inDir('tars'), inDir('more'), { recursive: true });
    const both = [inDir('tars'), inDir('more')].map((folder) => `${folder}/1.tar/a`);
    expect((await idsOf(inDir('tars'), inDir('more'))).filter((id) => id.endsWith('1.tar/a'))).toEqual(both);
    expect((await idsOf(inDir('{tars,more}', '*.tar'))).filter((id) => id.endsWith('1.tar/a'))).toEqual(both);
    await truncate(inDir('tars', '1.tar'), 3000);
    const [, broken] = await itemsOf(inDir('tars'));
    expect(broken!.image).toEqual({ error: expect.stringMatching(/incomplete/) });
    const [zipped] = await itemsOf(await put('zipped.tar', gzipSync(await readFile(inDir('web.tar')), { level: 0 })));
    expect(zipped!.image).toEqual({ error: 'expected a tar header at byte 0, but got other bytes' });
  });

  test('reports images next to archives', async () => {
    await cp(inDir('web.tar'), inDir('mixed', 'web.tar'));
    await cp(picture(names[0]!), inDir('mixed', 'below', '1.jpg'));
    const items = await itemsOf(inDir('mixed'));
    expect(items.map(({ id }) => id)).toEqual([...(await idsOf(inDir('web.tar'))), inDir('mixed')]);
    const advice = `name what is meant: '${inDir('mixed', '**', '*.jpg')}'`;
    expect(items.at(-1)!.image).toEqual({ error: expect.stringContaining(advice) });
    expect(await idsOf(inDir('mixed', '**', '*.jpg'))).toEqual([inDir('mixed', 'below', '1.jpg')]);
  });

  test('names links, sparse files and names with several dots in a tar', async () => {
    const bytes = await readFile(picture(names[0]!));
    for (const name of ['a.jpg', 'a.mask.png', 'b.1.jpg', 'b.2.jpg']) await put(`other/${name}`, bytes);
    await link(inDir('other', 'a.jpg'), inDir('other', 'hard.jpg'));
    await symlink('a.jpg', inDir('other', 'soft.jpg'));
    const entries = ['a.jpg', 'a.mask.png', 'b.1.jpg', 'b.2.jpg', 'hard.jpg', 'soft.jpg'];
    await create({ file: inDir('other.tar'), cwd: inDir('other') }, entries);
    const items = await itemsOf(inDir('other.tar'));
    expect(items.map(({ id }) => id)).toEqual(['a', 'b.1.jpg', 'b.2.jpg', 'hard', 'soft'].map((name) => `other.tar/${name}`));
    expect(await bytesOf(items[0]!)).toEqual(bytes);
    const dots = { error: expect.stringMatching(/name with more dots/) };
    const linked = { error: expect.stringMatching(/expected a file, but got a (hard|symbolic) link/) };
    expect(items.slice(1).map(({ image }) => image)).toEqual([dots, dots, linked, linked]);
  });

  test('names an image of more than 2 GiB in a tar, and reads those after it', async () => {
    const header = (path: string, size: number): Buffer => {
      const block = Buffer.alloc(512);
      new Header({ path, size, type: 'File', mode: 0o644 }).encode(block, 0);
      return block;
    };
    const bytes = await readFile(picture(names[0]!));
    const file = await open(inDir('large.tar'), 'w');
    await file.write(header('large.jpg', 2 ** 31), 0, 512, 0);
    const [at, end] = [512 + 2 ** 31, 1024 + 2 ** 31 + bytes.length]; // a sparse file, which takes no space
    await file.write(header('small.jpg', bytes.length), 0, 512, at);
    await file.write(bytes, 0, bytes.length, at + 512);
    await file.truncate(512 * Math.ceil(end / 512) + 1024);
    await file.close();
    const [large, small] = await itemsOf(inDir('large.tar'));
    expect(large).toEqual({ id: 'large.tar/large', image: { error: 'expected at most 2147483647 bytes, but got 2147483648' } });
    expect(await bytesOf(small!)).toEqual(bytes);
    const part = { path: inDir('large.tar'), offset: 512, size: 2 ** 31 };
    expect((await failure(readItemImage(part, {}))).message).toMatch(/expected at most 2147483647 bytes/);
  });

  test.each(['plain', 'struct'])('Parquet with a column of %s, over several row groups', async (kind) => {
    const bytes = await Promise.all(names.map((name) => readFile(picture(name))));
    const label = { name: 'label', data: names.map((_, i) => i) };
    const file =
      kind === 'plain'
        ? parquetWriteBuffer({ columnData: [{ name: 'jpg', data: bytes, type: 'BYTE_ARRAY' }, label], rowGroupSize: 5 })
        : parquetWriteBuffer({
            columnData: [{ name: 'image', data: bytes.map((b, i) => ({ bytes: b, path: names[i] })) }, label],
            schema: [
              { name: 'root', num_children: 2 },
              { name: 'image', num_children: 2, repetition_type: 'OPTIONAL' },
              { name: 'bytes', type: 'BYTE_ARRAY', repetition_type: 'OPTIONAL' },
              { name: 'path', type: 'BYTE_ARRAY', converted_type: 'UTF8', repetition_type: 'OPTIONAL' },
              { name: 'label', type: 'INT32', repetition_type: 'OPTIONAL' },
            ],
            rowGroupSize: 5,
          });
    const path = await put(`${kind}.parquet`, new Uint8Array(file));
    const items = await itemsOf(path);
    expect(items.map(({ id }) => id)).toEqual(names.map((_, i) => `${kind}.parquet/${i}`));
    for (const [i, item] of items.entries())
      expect(Buffer.compare(await bytesOf(JSON.parse(JSON.stringify(item)) as Item), bytes[i]!)).toBe(0);
  });

  test.each(['', '.gz'])('IDX%s, picture by picture', async (ending) => {
    const header = Buffer.from([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5]);
    const idx = Buffer.concat([header, Buffer.from(Array.from({ length: 60 }, (_, i) => i))]);
    const items = await itemsOf(await put(`images-idx3-ubyte${ending}`, ending ? gzipSync(idx) : idx));
    expect(items.map(({ id }) => id)).toEqual([0, 1, 2].map((i) => `images-idx3-ubyte/${i}`));
    expect([...(await bytesOf(items[1]!))]).toEqual(Array.from({ length: 60 }, (_, i) => 20 + Math.floor(i / 3)));
    const endless = await itemsOf(
      await put('none-images-idx3-ubyte', Buffer.concat([header.subarray(0, 4), Buffer.alloc(12, 0).fill(1, 0, 4)])),
    );
    expect(endless.map(({ image }) => image)).toEqual([{ error: 'expected images of at least one pixel, but got 0 x 0' }]);
  });

  test('rejects pipes, devices and lists with endless lines', async () => {
    const pipes = ['pipe.jpg', 'pipe.txt', 'pipe.tar', 'pipe.jsonl', 'pipe.parquet'].map((name) => inDir(name));
    await promisify(execFile)('mkfifo', pipes);
    await symlink('/dev/zero', inDir('zero.jpg'));
    for (const path of [...pipes, inDir('zero.jpg')])
      expect((await itemsOf(path))[0]!.image).toEqual({ error: 'expected a file, but got a pipe or device' });
    const [listed] = await itemsOf(await put('pipes.txt', 'pipe.jpg'));
    expect((await failure(readItemImage(listed!.image, {}))).message).toMatch(/pipe\.jpg: expected a file, but got a pipe or device/);
    const [endless] = await itemsOf(await put('endless.jsonl', 'x'.repeat(2 ** 22)));
    expect(endless!.image).toEqual({ error: expect.stringMatching(/line 1: expected at most 1048576 characters/) });
  });

  test('treats missing and duplicate files as unreadable images', async () => {
    const [missing] = await itemsOf(inDir('missing'));
    expect(missing).toEqual({ id: inDir('missing'), image: inDir('missing') });
    await mkdir(inDir('empty'), { recursive: true });
    expect((await itemsOf(inDir('empty')))[0]!.image).toEqual({ error: expect.stringMatching(/expected images/) });
    const twice = await itemsOf(picture(names[0]!), picture(names[1]!), picture(names[0]!));
    expect(twice[2]).toEqual({ id: picture(names[0]!), image: { error: 'another image before it has the same id' } });
    for (const bad of [[], [''], [7], undefined]) expect(() => openSource(bad as never)).toThrow(/inputs: expected paths of images/);
  });
});

describe('over HTTP', () => {
  let server: Server;
  let base: string;
  const seen = new Map<string, number>();
  const answer: RequestListener = (request, response) => {
    const path = request.url!;
    const attempt = (seen.get(path) ?? 0) + 1;
    seen.set(path, attempt);
    const image = (): unknown => response.writeHead(200, { 'content-type': 'image/jpeg' }).end(jpeg);
    if (path.startsWith('/flaky')) {
      if (attempt === 1) response.writeHead(503, { 'retry-after': '0.01' }).end();
      else if (attempt === 2) request.socket.destroy();
      else if (attempt === 3)
        response.writeHead(200, { 'content-length': jpeg.length }).write(jpeg.subarray(0, 100), () => request.socket.destroy());
      else image();
    } else if (path === '/busy' && attempt === 1)
      response.writeHead(429, { 'retry-after': new Date(Date.now() + 2000).toUTCString() }).end();
    else if (path === '/slow') setTimeout(image, 5000).unref();
    else if (path === '/large') response.writeHead(200).end(Buffer.alloc(5000));
    else if (path === '/gone') response.writeHead(404).end('no');
    else if (path === '/moved') response.writeHead(302, { location: '/good' }).end();
    else image();
  };
  let jpeg: Buffer;
  beforeAll(async () => {
    jpeg = await readFile(picture(names[0]!));
    server = createServer(answer).listen(0, '127.0.0.1');
    await new Promise((resolve) => server.once('listening', resolve));
    base = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  });
  afterAll(() => {
    server.closeAllConnections();
    server.close();
  });

  test('retries transient failures only', async () => {
    expect(await download(`${base}/flaky`, { backoff: 1 })).toEqual(jpeg);
    expect(seen.get('/flaky')).toBe(4);
    expect(await download(`${base}/moved`)).toEqual(jpeg);
    const asked = Date.now();
    expect(await download(`${base}/busy`, { backoff: 1 })).toEqual(jpeg);
    expect(Date.now() - asked).toBeGreaterThan(900); // a date in whole seconds
    expect(await failure(download(`${base}/gone`, { backoff: 1 }))).toMatchObject({
      code: 'NETWORK',
      message: expect.stringMatching(/HTTP 404/),
    });
    expect(seen.get('/gone')).toBe(1);
    expect((await failure(download(`${base}/flaky-2`, { retries: 1, backoff: 1 }))).message).toMatch(/cannot be downloaded/);
    expect((await failure(download(`${base}/large`, { maxBytes: 4999, backoff: 1 }))).message).toMatch(/more than 4999 bytes/);
    expect((await failure(download(`${base}/slow`, { timeout: 50, retries: 1, backoff: 1 }))).message).toMatch(/timeout/);
    expect((await failure(download('ftp://x/y'))).message).toMatch(/expected an http or https URL/);
    expect((await failure(download(`${base}/slow`, { signal: AbortSignal.timeout(50) }))).code).toBe('ABORTED');
  });

  test('writes a shard from a JSONL list of URLs, and names broken ones', async () => {
    const lines = [
      `"${base}/1"`,
      `{ "url": "${base}/2", "id": "two" }`,
      `{ "url": "${base}/gone", "id": 3 }`,
      'not json',
      '',
      '{"id":"x"}',
    ];
    const { manifest } = await encode('remote', { download: { backoff: 1 } }, openSource(await put('urls.jsonl', lines.join('\n'))));
    expect(manifest).toMatchObject({ count: 2, failures: 3 });
    expect((await samplesOf(inDir('remote'))).map(({ id }) => id)).toEqual([`${base}/1`, 'two']);
    const failures = (await readFile(inDir('remote', 'failures.jsonl'), 'utf8')).trim().split('\n');
    expect(failures.map((line) => JSON.parse(line) as unknown)).toEqual([
      { id: '3', reason: 'cannot be downloaded: HTTP 404 Not Found' },
      { id: `${inDir('urls.jsonl')}, line 4`, reason: expect.stringMatching(/expected a URL/) },
      { id: `${inDir('urls.jsonl')}, line 6`, reason: expect.stringMatching(/expected a URL/) },
    ]);
  });
});

/** UniFlow's own resizing. */
const rule = { mode: 'cover', filter: 'bicubic', edgeRatio: 1 } as const;

describe('fit', () => {
  const target = (fit: Target['fit'], size: [number, number] = [56, 56]): Target => ({ fit, size, rule, patch: 14, mean: [0.5, 0.25, 1] });

  test('crop: the pixels of encode, and where they were in the picture', async () => {
    const image = (color: string, width: number, height: number) =>
      sharp({ create: { width, height, channels: 3, background: color } })
        .raw()
        .toBuffer();
    const placement = placementOf({ width: 300, height: 100 }, target('crop'));
    expect(placement).toEqual({ grid: { rows: 4, cols: 4 }, crop: { left: 100, top: 0, width: 100, height: 100 } });
    // The middle third is blue and must be the only visible part, except for the filter's support at its borders.
    const [red, blue] = await Promise.all([image('#f00', 300, 100), image('#00f', 100, 100)]);
    const data = await sharp(red, { raw: { width: 300, height: 100, channels: 3 } })
      .composite([{ input: blue, raw: { width: 100, height: 100, channels: 3 }, left: 100, top: 0 }])
      .removeAlpha()
      .raw()
      .toBuffer();
    const into = new Uint8Array(3 * 56 * 56);
    await place(await openImage({ data, width: 300, height: 100 }), placement, target('crop'), into);
    for (const x of [2, 28, 53]) expect([...into.subarray(3 * (28 * 56 + x), 3 * (28 * 56 + x) + 3)]).toEqual([0, 0, 255]);
  });

  test('native: the picture’s own aspect, in about the patches of the model', () => {
    const grid = (width: number, height: number) => placementOf({ width, height }, target('native', [224, 224])).grid;
    expect(grid(500, 500)).toEqual({ rows: 16, cols: 16 });
    expect(grid(800, 533)).toEqual({ rows: 13, cols: 20 });
    expect(grid(10, 1000)).toEqual({ rows: 160, cols: 2 });
    expect(grid(100000, 1)).toEqual({ rows: 1, cols: 256 });
    for (let aspect = 0.1; aspect < 10; aspect *= 1.1) {
      const { rows, cols } = grid(1000 * aspect, 1000);
      expect(Math.abs(rows * cols - 256)).toBeLessThan(32);
      expect(Math.abs(Math.sqrt(256 / aspect) - rows)).toBeLessThanOrEqual(0.5);
    }
  });

  test.each([
    [200, 100, { right: 0, bottom: 28 }],
    [100, 400, { right: 42, bottom: 0 }],
    [50, 50, { right: 0, bottom: 0 }],
  ])('pad: %i x %i at the top left, the mean colour around it', async (width, height, padding) => {
    const placement = placementOf({ width, height }, target('pad'));
    expect(placement).toEqual({ grid: { rows: 4, cols: 4 }, padding });
    const into = new Uint8Array(3 * 56 * 56).fill(7);
    await place(await openImage({ data: new Uint8Array(3 * width * height).fill(200), width, height }), placement, target('pad'), into);
    const inside = (i: number): boolean => i % 56 < 56 - padding.right && i < 56 * (56 - padding.bottom);
    const expected = Uint8Array.from({ length: into.length }, (_, i) => (inside(Math.floor(i / 3)) ? 200 : [128, 64, 255][i % 3]!));
    expect(Buffer.compare(into, expected)).toBe(0);
  });

  test('latents are those of encode; images of one shape go together, and none is lost', async () => {
    const paths = names.map(picture);
    const whole = await uniflow.encode(paths);
    const read = async (fit: 'crop' | 'native') => {
      const rows: Float32Array[] = [];
      const sizes: number[] = [];
      for await (const event of encodePipeline(uniflow, { fit, batchSize: 3 }).run(paths.map((path) => ({ id: path, image: path })))) {
        if ('error' in event) throw event.error;
        const [count, ...row] = event.latents.shape as [number, number, number];
        sizes.push(count);
        const size = row[0] * row[1];
        event.pictures.forEach(
          ({ row: r }, i) => (rows[r] = (event.latents.data as unknown as Float32Array).slice(i * size, (i + 1) * size)),
        );
      }
      return { rows, sizes };
    };
    const crop = await read('crop');
    expect(crop.sizes).toEqual([3, 3, 3, 3]);
    expect(crop.rows.flatMap((row) => [...row])).toEqual([...(whole.latents.data as unknown as Float32Array)]);
    const native = await read('native'); // four shapes with three images each
    expect(native.sizes).toEqual([3, 3, 3, 3]);
    expect(native.rows.map((row) => row.length)).toEqual(paths.map((_, i) => 16 * [4 * 4, 3 * 6, 6 * 3, 3 * 5][i % 4]!));
  });
});

describe('numbers', () => {
  test('float16 is rounded to nearest, halves to even, down to the smallest', async () => {
    const cases: [number, number][] = [
      [0, 0], [-0, -0], [1, 1], [1 + 2 ** -11, 1], [1 + 3 * 2 ** -11, 1 + 2 ** -9], [65504, 65504], [65519, 65504], [-2.5, -2.5],
      [2 ** -14, 2 ** -14], [2 ** -24, 2 ** -24], [2 ** -25, 0], [2 ** -25 * 1.01, 2 ** -24], [-(2 ** -24) * 2.5, -(2 ** -23)],
    ]; // prettier-ignore
    const stored = await toStored(
      Float32Array.from(cases, ([x]) => x),
      'float16',
    );
    expect([...(await fromStored(stored, 'float16'))]).toEqual(cases.map(([, y]) => y));
    expect((await failure(toStored(Float32Array.of(65520), 'float16'))).message).toMatch(/below 65520/);
  });

  test('moments of parts are those of the whole, computed in two passes', async () => {
    const [rows, channels] = [1000, 3];
    const x = Float32Array.from({ length: rows * channels }, (_, i) => Math.sin(i * 1.7) * (1 + (i % channels)) + 5 * (i % channels));
    let merged: Moments | undefined;
    for (const [begin, end] of [
      [0, 1],
      [1, 400],
      [400, 402],
      [402, 1000],
    ] as const)
      // prettier-ignore
      merged = mergeMoments(merged, await momentsOf(x.subarray(begin * channels, end * channels), channels));
    for (let c = 0; c < channels; c++) {
      const column = Array.from({ length: rows }, (_, r) => x[r * channels + c]!);
      const mean = column.reduce((a, b) => a + b) / rows;
      expect(merged!.mean[c]).toBeCloseTo(mean, 13);
      expect(merged!.m2[c]! / column.reduce((sum, v) => sum + (v - mean) ** 2, 0)).toBeCloseTo(1, 13);
    }
    expect(merged!.count).toBe(rows);
  });
});

describe('shards', () => {
  const formats = ['safetensors', 'npy', 'tar', 'parquet'] as const;
  const stores = ['float32', 'float16', 'bfloat16'] as const;

  test.each(formats.flatMap((format) => stores.map((store) => [format, store] as const)))(
    '%s of %s give back what was encoded',
    async (format, store) => {
      const folder = `${format}-${store}`;
      const { manifest } = await encode(folder, { format, store, fit: 'native', tokens: true });
      expect(manifest).toMatchObject({
        count: 12,
        failures: 0,
        header: { format, store, fit: 'native', arrays: { latents: 16, tokens: 64 } },
      });
      const shards = await openShards(inDir(folder));
      await shards.verify();
      const samples = await samplesOf(inDir(folder));
      expect(samples.map(({ id }) => id)).toEqual(names);
      for (const [i, sample] of samples.entries()) {
        const { width, height } = await sharp(picture(names[i]!)).metadata();
        const { grid } = sample;
        expect(sample).toMatchObject({ width, height });
        const pixels = new Uint8Array(3 * grid.rows * grid.cols * 14 ** 2);
        const data = await sharp(picture(names[i]!)).raw().toBuffer();
        await place(
          await openImage({ data, width, height }),
          { grid },
          { fit: 'native', size: [56, 56], rule, patch: 14, mean: [0, 0, 0] },
          pixels,
        );
        const expected = await uniflow.encode({ pixels: ndarray(pixels, [1, grid.rows * 14, grid.cols * 14, 3]) }, { tokens: true });
        for (const name of ['latents', 'tokens'] as const) {
          const values = expected[name]!.data as unknown as Float32Array;
          expect(sample[name]!.shape).toEqual([grid.rows * grid.cols, name === 'latents' ? 16 : 64]);
          expect([...sample[name]!.data]).toEqual([...(await fromStored(await toStored(values, store), store))]);
        }
      }
      // in any order
      expect((await shards.at(11)).latents).toEqual(samples[11]!.latents);
      expect((await shards.get(names[4]!))!.tokens).toEqual(samples[4]!.tokens);
      expect(await shards.get('nothing')).toBeUndefined();
      expect((await failure(shards.at(12))).message).toMatch(/index: expected an integer from 0 to 11/);
      expect((await (await openShards(inDir(folder), { tokens: false })).at(0)).tokens).toBeUndefined();
    },
  );

  test('files are those of uniflow encode; statistics are of all latents; damage is found', async () => {
    const { manifest } = await encode('plain', { model: 'nano' });
    const whole = await uniflow.encode(names.map(picture));
    const file = new ArrayFile(inDir('plain', 'shard-000001.safetensors'));
    expect(file.metadata).toEqual({ ids: JSON.stringify(names.slice(5, 10)), grid: '4x4', model: 'nano' });
    expect([...(await file.read('latents')).data]).toEqual([
      ...(whole.latents.data as unknown as Float32Array).subarray(5 * 256, 10 * 256),
    ]);
    await encode('plain-npy', { format: 'npy' });
    const array = await readNpy(inDir('plain-npy', 'shard-000002.latents.npy'));
    expect(array.shape).toEqual([2, 16, 16]);
    const { count, mean, variance } = manifest.statistics!;
    expect(count).toBe(12 * 16);
    for (const c of [0, 15]) {
      const column = Array.from({ length: count }, (_, i) => (whole.latents.data as unknown as Float32Array)[i * 16 + c]!);
      const m = column.reduce((a, b) => a + b) / count;
      expect(mean[c]! / m).toBeCloseTo(1, 6);
      expect(variance[c]! / (column.reduce((sum, v) => sum + (v - m) ** 2, 0) / count)).toBeCloseTo(1, 6);
    }
    const shards = await openShards(inDir('plain'));
    await appendFile(inDir('plain', 'shard-000001.jsonl'), ' ');
    expect((await failure(shards.verify())).message).toMatch(/shard-000001\.jsonl: expected sha256/);
    const begun = await open(inDir('plain', 'shard-000002.safetensors'), 'r+');
    await begun.write(Buffer.from([0, 0, 0, 192, 0, 0, 0, 0]), 0, 8, 0); // a header of 3 GiB
    await begun.close();
    expect((await failure((await openShards(inDir('plain'))).at(11))).message).toMatch(/expected 3221225480 bytes or more/);
    await rm(inDir('plain', 'shard-000001.jsonl'));
    expect((await failure(shards.verify())).code).toBe('NOT_FOUND');
  });

  test.each(formats)('%s that is damaged: an error that names the shard; read again once it is mended', async (format) => {
    const folder = `damaged-${format}`;
    await encode(folder, { format });
    for (const name of (await readdir(inDir(folder))).filter((name) => name.startsWith('shard-000001'))) {
      const bytes = await readFile(inDir(folder, name));
      for (const damaged of [
        Buffer.alloc(0),
        bytes.subarray(0, 10),
        bytes.subarray(0, bytes.length / 2),
        Buffer.alloc(bytes.length, 'x'),
      ]) {
        const shards = await openShards(inDir(folder));
        await writeFile(inDir(folder, name), damaged);
        expect(await failure(shards.at(9))).toMatchObject({ code: 'BAD_INPUT', message: expect.stringContaining('shard-000001') });
        if (name.endsWith('.jsonl')) expect((await failure(shards.get(names[0]!))).message).toContain('shard-000001');
        expect((await shards.at(0)).id).toBe(names[0]);
        await writeFile(inDir(folder, name), bytes);
        expect((await shards.at(9)).id).toBe(names[9]);
      }
      await rm(inDir(folder, name));
      expect((await failure((await openShards(inDir(folder))).at(9))).code).toBe('NOT_FOUND');
      await writeFile(inDir(folder, name), bytes);
    }
  });

  test('files of more than 2 GiB are verified in pieces; a range that a file does not have is an error, however long', async () => {
    const folder = 'large';
    await encode(folder);
    let longest = 0;
    class Watched extends FolderOutput {
      override read(name: string, range: ByteRange = { begin: 0, end: 0 }): Promise<Buffer> {
        longest = Math.max(longest, range.end - range.begin);
        return super.read(name, range.end === 0 ? undefined : range);
      }
    }
    const shards = await openShards(new Watched(inDir(folder)));
    await shards.verify();
    await truncate(inDir(folder, 'shard-000001.safetensors'), 2 ** 26);
    expect((await failure(shards.verify())).message).toMatch(/shard-000001\.safetensors: expected sha256/);
    expect(longest).toBe(2 ** 24);
    const beyond = failure(new FolderOutput(inDir(folder)).read('manifest.json', { begin: 0, end: 2 ** 31 + 1 }));
    expect((await beyond).message).toMatch(/manifest\.json: cannot be read: expected 2147483649 bytes or more, but got \d+$/);
  });

  test('tokens alone', async () => {
    await encode('tokens', { latents: false, tokens: true });
    const [first] = await samplesOf(inDir('tokens'));
    expect(first!.latents).toBeUndefined();
    expect(first!.tokens!.shape).toEqual([16, 64]);
    expect((await failure(encode('x', { latents: false }))).message).toMatch(/latents: expected true, or tokens/);
  });

  test('rejects incomplete runs and invalid options', async () => {
    expect((await failure(openShards(inDir('pictures')))).code).toBe('NOT_FOUND');
    for (const [option, value] of Object.entries({ shardSize: 0, fit: 'stretch', format: 'zip', store: 'int8', maxFailures: -1, size: 13 }))
      expect((await failure(encode('refused', { [option]: value }))).code).toBe('BAD_INPUT');
    expect(await readdir(dir)).not.toContain('refused');
  });
});

const run = promisify(execFile);

/** A folder on a file system of the given size. */
async function smallDisk(name: string, size: string): Promise<string | undefined> {
  const disk = inDir(name);
  await mkdir(disk);
  return run('mount', ['-t', 'tmpfs', '-o', `size=${size}`, 'tmpfs', disk]).then(() => disk, () => undefined); // prettier-ignore
}

describe('stopped and taken up', () => {
  const interrupted = async (folder: string, after: number, options: RunOptions = {}): Promise<void> => {
    const controller = new AbortController();
    const source = (async function* () {
      let number = 0;
      for await (const item of openSource(inDir('pictures'))) {
        if (number++ === after) controller.abort();
        await new Promise((resolve) => setTimeout(resolve, 20));
        yield item;
      }
    })();
    expect((await failure(encode(folder, { ...options, signal: controller.signal }, source))).code).toBe('ABORTED');
  };

  test('after an abort, with files that a killed process has left, the result is the same', async () => {
    await encode('straight', { store: 'float16' });
    await interrupted('stopped', 11, { store: 'float16' });
    const left = await readdir(inDir('stopped'));
    expect(left).toContain('shard-000000.safetensors');
    expect(left).not.toContain('manifest.json');
    await put('stopped/staging/local-01234567-89ab-cdef-0123-456789abcdef.shard-000002.jsonl', 'x');
    await put('stopped/manifest.json.01234567-89ab-cdef-0123-456789abcdef.tmp', 'x');
    const { before, complete } = await encode('stopped', { store: 'float16' });
    expect(before).toBeGreaterThanOrEqual(5);
    expect(complete).toBe(false);
    expect(await contents(inDir('stopped'))).toEqual(await contents(inDir('straight')));
    expect(await encode('stopped', { store: 'float16' })).toMatchObject({ complete: true, before: 12 });
  });

  test('a file that was replaced under the same name is noticed, before and after the run is complete', async () => {
    await put('replaced/a.jpg', await photo(64, 64, 1));
    await put('replaced/b.jpg', await photo(64, 64, 2));
    await put('replaced/c.jpg', await photo(64, 64, 3));
    const source = (): Source => openSource(inDir('replaced'));
    const controller = new AbortController();
    const stopped = async function* (): AsyncGenerator<Item> {
      for await (const item of source()) {
        if (item.id === 'c.jpg') {
          while (!(await pathExists(inDir('changed', 'records', 'shard-000000.json'))))
            await new Promise((resolve) => setTimeout(resolve, 20));
          controller.abort();
        }
        yield item;
      }
    };
    const options = { shardSize: 1, batchSize: 1 };
    expect((await failure(encode('changed', { ...options, signal: controller.signal }, stopped()))).code).toBe('ABORTED');
    await encode('unchanged', options, source());
    await put('replaced/a.jpg', await photo(64, 64, 4));
    const message =
      /the files of shard 0, 'a\.jpg' to 'a\.jpg': expected those that it was made of, but got a file of another size or time of change\. Choose another folder/;
    for (const folder of ['changed', 'unchanged']) expect((await failure(encode(folder, options, source()))).message).toMatch(message);
  });

  test('with verify, a file with another time and the same content is the same', async () => {
    await put('copied/a.jpg', await photo(64, 64, 1));
    const source = (): Source => openSource(inDir('copied'));
    await encode('verified', { verify: true }, source());
    await utimes(inDir('copied', 'a.jpg'), 1e9, 1e9);
    expect((await failure(encode('verified', {}, source()))).message).toMatch(/or compare the content with verify/);
    expect((await encode('verified', { verify: true }, source())).complete).toBe(true);
    const bytes = await photo(64, 64, 1);
    bytes[bytes.length - 3]! ^= 1;
    await put('copied/a.jpg', bytes);
    expect((await failure(encode('verified', { verify: true }, source()))).message).toMatch(/a file of another content/);
  });

  test('rejects a second run into the same folder without disturbing the first', async () => {
    let second: Promise<Error> | undefined;
    const source = (async function* () {
      for await (const item of openSource(inDir('pictures'))) {
        second ??= failure(encode('shared'));
        await second;
        yield item;
      }
    })();
    await encode('shared', {}, source);
    expect(await second).toMatchObject({ code: 'BAD_INPUT', message: `${inDir('shared')} is in use: another run is writing to it` });
    await encode('unshared');
    expect(await contents(inDir('shared'))).toEqual(await contents(inDir('unshared')));
  });

  test('refuses the unfinished run of an earlier version, and accepts its complete one', async () => {
    await encode('earlier');
    const header = JSON.stringify(JSON.parse(await readFile(inDir('earlier', 'run.json'), 'utf8')));
    await rm(inDir('earlier', 'run.json'));
    await rm(inDir('earlier', 'records'), { recursive: true });
    await put('earlier/manifest.jsonl', `${header}\n`);
    expect(await encode('earlier')).toMatchObject({ complete: true, before: 12 });
    await rm(inDir('earlier', 'manifest.json'));
    expect((await failure(encode('earlier'))).message).toMatch(
      /but got manifest\.jsonl, which an unfinished run of an earlier version has left/,
    );
    expect(await readFile(inDir('earlier', 'manifest.jsonl'), 'utf8')).toBe(`${header}\n`);
    await rm(inDir('earlier', 'manifest.jsonl'));
    expect(await encode('earlier')).toMatchObject({ complete: false, before: 0, manifest: { count: 12 } });
  });

  test('does not wait for a hanging image after an abort', async () => {
    let closed = 0;
    let release!: () => void;
    const released = new Promise<void>((resolve) => (release = resolve));
    const never = (aborted: () => void) =>
      (async function* () {
        try {
          yield { id: 'one', image: picture(names[0]!) };
          setTimeout(aborted, 50);
          await released;
        } finally {
          closed++;
        }
      })();
    const streaming = new AbortController();
    const stream = uniflow.encodeStream(
      never(() => streaming.abort()),
      { signal: streaming.signal },
    );
    expect((await failure(stream.next())).code).toBe('ABORTED');
    const running = new AbortController();
    const source = never(() => running.abort());
    expect((await failure(encode('waiting', { signal: running.signal }, source))).code).toBe('ABORTED');
    expect(closed).toBe(0);
    release();
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect(closed).toBe(2); // closed once they resume
  });

  test('makes a shard again when its file is missing', async () => {
    await interrupted('lost', 11);
    await rm(inDir('lost', 'shard-000000.safetensors'));
    await encode('lost');
    await encode('never-lost');
    expect(await contents(inDir('lost'))).toEqual(await contents(inDir('never-lost')));
  });

  test('rejects another model, options or images, and names the difference', async () => {
    await interrupted('mine', 11);
    expect((await failure(encode('mine', { fit: 'pad', store: 'float16' }))).message).toMatch(
      /another run; they differ in store \("float32" there, "float16" now\), fit \("crop" there, "pad" now\)/,
    );
    const other = UniFlow.random('nano', { seed: 1 });
    const refused = encodeToShards(other, openSource(inDir('pictures')), inDir('mine'), { shardSize: 5, batchSize: 2 });
    expect((await failure(refused)).message).toMatch(/differ in model\.sha256/);
    await other.dispose();
    const pictures = openSource(inDir('pictures', 'bee'));
    expect((await failure(encode('mine', {}, pictures))).message).toMatch(/the images of shard 0: expected those that it was made of/);
    const { manifest } = await encode('mine', { model: 'the same model by another name' });
    expect(manifest.header.model.name).toBe(''); // the name used when the run started
    expect((await failure(encode('mine', { size: 28 }))).message).toMatch(/differ in size/);
    expect((await failure(encode('mine', {}, pictures))).message).toMatch(/the images of shard 0: expected those that it was made of/);
    const all = await itemsOf(inDir('pictures'));
    expect((await failure(encode('mine', {}, all.slice(0, 10)))).message).toMatch(/the images of shard 2: .* but got none/);
    const withOneMore = [...all, { id: 'new', image: picture(names[0]!) }];
    expect((await failure(encode('mine', {}, withOneMore))).message).toMatch(/the images of shard 2: .* to 'new'/);
    await encode('even', { shardSize: 6 });
    expect((await failure(encode('even', { shardSize: 6 }, withOneMore))).message).toMatch(/complete, but got 'new' after them/);
  });

  test('names unreadable images once across stops, and stops the run when there are too many', async () => {
    const source = openSource([inDir('pictures'), ...Array.from({ length: 9 }, (_, i) => inDir(`gone-${i}.jpg`))]);
    expect((await failure(encode('failures', { maxFailures: 5 }, source))).message).toMatch(
      /stopped: 6 images could not be read, and 5 are/,
    );
    const named = async (): Promise<string[]> => (await readFile(inDir('failures', 'failures.jsonl'), 'utf8')).trim().split('\n');
    expect((await named()).length).toBeGreaterThanOrEqual(6);
    expect((await encode('failures', { maxFailures: 9 }, source)).manifest).toMatchObject({ count: 12, failures: 9 });
    expect((await named()).map((line) => (JSON.parse(line) as { id: string }).id)).toEqual(
      Array.from({ length: 9 }, (_, i) => inDir(`gone-${i}.jpg`)),
    );
    const nothing = failure(encode('nothing', {}, openSource(inDir('gone.jpg'))));
    expect((await nothing).message).toMatch(/nothing is written: no image could be read; see .*failures\.jsonl/);
  });

  test('reports an unwritable folder and a full disk, and continues once there is space', async () => {
    await put('file', '');
    expect((await failure(encode('file/below'))).message).toMatch(/file\/below cannot be written: /);
    const disk = await smallDisk('disk', '36k');
    if (!disk) return; // mounting requires root
    try {
      const full = await failure(encode('disk', { shardSize: 2, tokens: true }));
      expect(full.code).toBe('BAD_INPUT');
      expect(full.message).toMatch(/cannot be written: ENOSPC/);
      await run('mount', ['-o', 'remount,size=4m', disk]);
      await encode('disk', { shardSize: 2, tokens: true });
      await encode('roomy', { shardSize: 2, tokens: true });
      expect(await contents(disk)).toEqual(await contents(inDir('roomy')));
    } finally {
      await run('umount', [disk]);
    }
  });
});

test('uniflow encode: a tar on standard input to shards; given again, it says that they are complete', async () => {
  await uniflow.save(inDir('model'));
  const archive = inDir('stdin.tar');
  await put('pictures/text.jpg', 'not a picture');
  await create({ file: archive, cwd: inDir('pictures') }, [...names, 'text.jpg']);
  await rm(picture('text.jpg'));
  const cli = (...args: string[]): Promise<{ code: number | null; stdout: string; stderr: string }> =>
    new Promise((resolve) => {
      const options = { cwd: join(import.meta.dirname, '..'), env: { ...process.env, NODE_OPTIONS: '' } };
      const child = execFile(
        process.execPath,
        ['--import', 'tsx', 'lib/cli/main.ts', 'encode', ...args, '-m', inDir('model')],
        options,
        (_, stdout, stderr) => resolve({ code: child.exitCode, stdout, stderr }),
      );
      createReadStream(archive)
        .on('error', () => undefined)
        .pipe(child.stdin!)
        .on('error', () => undefined);
    });
  const args = ['-', '-o', `${inDir('piped')}/`, '--shard-size', '5', '--format', 'tar', '--fit', 'native'];
  const first = await cli(...args);
  expect(first).toMatchObject({ code: 1, stdout: `12 images in 3 shards in ${inDir('piped')}/ (1 failed: see failures.jsonl)\n` });
  expect(first.stderr).toContain('uniflow: stdin/text: expected a JPEG');
  expect((await samplesOf(inDir('piped'))).map(({ id }) => id)).toEqual(names.map((name) => `stdin/${name.replace('.jpg', '')}`));
  expect(await cli(...args)).toMatchObject({ code: 0, stdout: expect.stringMatching(/: it was complete before\n$/) });
  expect(await cli('-', '-o', inDir('stdin.parquet'))).toMatchObject({
    code: 1,
    stdout: `12 images as latents [12, 16, 16] in ${inDir('stdin.parquet')} (1 failed)\n`,
  });
  expect(await cli('-', '-o', inDir('x'), '--shard-size', '9999999')).toMatchObject({
    code: 2,
    stderr: expect.stringMatching(/shardSize: /),
  });
  expect(await cli('x.jpg', '-o', inDir('x.npy'), '--shard-size', '5')).toMatchObject({
    code: 2,
    stderr: expect.stringMatching(/--shard-size is for shards/),
  });
});

/** A PNG whose header declares another size. */
function declaring(png: Buffer, width: number, height: number): Buffer {
  const copy = Buffer.from(png);
  copy.writeUInt32BE(width, 16);
  copy.writeUInt32BE(height, 20);
  copy.writeUInt32BE(crc32(copy.subarray(12, 29)), 29);
  return copy;
}

test('slow: 10,000 images with 5 % broken ones of ten kinds: all good ones are there, all bad ones named', async () => {
  const jpeg = await readFile(picture(names[0]!));
  const raw = { create: { width: 40, height: 40, channels: 3 as const, background: '#2080c0' } };
  const png = await sharp(raw).png().toBuffer();
  const badCrc = Buffer.from(png);
  badCrc[badCrc.length - 20]! ^= 255; // in the last bytes of the pixels
  const broken: Record<string, Uint8Array | string | undefined> = {
    ...{ truncated: jpeg.subarray(0, jpeg.length / 2), empty: '', text: 'not a picture', crc: badCrc, missing: undefined },
    ...{ zero: declaring(png, 0, 40), huge: declaring(png, 100_000, 100_000), noise: Buffer.from(names.join('')), folder: undefined },
    ...{ svg: '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>' },
  };
  const good = { jpg: jpeg, png, cmyk: await sharp(raw).toColourspace('cmyk').jpeg().toBuffer(), webp: await sharp(raw).webp().toBuffer() };
  await mkdir(inDir('many', 'folder.jpg'), { recursive: true });
  for (const [name, content] of Object.entries({ ...good, ...broken })) if (content !== undefined) await put(`many/${name}.jpg`, content);
  const lines: string[] = [];
  const kinds = { good: Object.keys(good), bad: Object.keys(broken) };
  for (let i = 0; i < 10000; i++) {
    const bad = i % 20 === 7;
    const kind = bad ? kinds.bad[((i / 20) % 10) | 0]! : kinds.good[i % 4]!;
    const name = `${bad ? 'bad' : 'good'}-${String(i).padStart(4, '0')}-${kind}.jpg`;
    if (kind === 'folder') await mkdir(inDir('many', name));
    else if (kind !== 'missing') await link(inDir('many', `${kind}.jpg`), inDir('many', name));
    lines.push(name);
  }
  const list = await put('many/list.txt', lines.join('\n'));
  const { manifest } = await encode('from-many', { shardSize: 256, batchSize: 64 }, openSource(list));
  expect(manifest).toMatchObject({ count: 9500, failures: 500 });
  expect((await samplesOf(inDir('from-many'))).map(({ id }) => id)).toEqual(lines.filter((name) => name.startsWith('good')));
  const failures = (await readFile(inDir('from-many', 'failures.jsonl'), 'utf8')).trim().split('\n');
  const named = failures.map((line) => JSON.parse(line) as { id: string; reason: string });
  expect(named.map(({ id }) => id)).toEqual(lines.filter((name) => name.startsWith('bad')));
  for (const { reason } of named) expect(reason.length).toBeGreaterThan(10);
}, 300_000);

test('slow: killed at 20 random moments and taken up, the result is the same', async () => {
  const compiled = await Compiled.library();
  try {
    await mkdir(inDir('killed'), { recursive: true });
    for (let i = 0; i < 120; i++) await link(picture(names[i % 12]!), inDir('killed', `${String(i).padStart(3, '0')}.jpg`));
    await put('killed/050-text.jpg', 'not a picture');
    const run = (out: string, timeout?: number) =>
      compiled.run(
        `const { UniFlow, encodeToShards, openSource } = await library();
        const slowly = async function* (items) { for await (const item of items) { await sleep(3); yield item; } };
        const options = { shardSize: 8, batchSize: 4, store: 'float16', fit: 'native' };
        await encodeToShards(UniFlow.random('nano'), slowly(openSource(${JSON.stringify(inDir('killed'))})), ${JSON.stringify(out)}, options);
        print('done');`,
        timeout === undefined ? {} : { timeout },
      );
    const started = performance.now();
    expect(await run(inDir('unharmed'))).toMatchObject({ printed: ['done'], code: 0 });
    const whole = performance.now() - started;
    const expected = await contents(inDir('unharmed'));
    let partly = 0;
    for (let kills = 0; kills < 20;) {
      const { signal } = await run(inDir('harmed'), Math.round(whole * (0.35 + 0.6 * Math.random())));
      if (signal === 'SIGKILL') kills++;
      const left = await readdir(inDir('harmed')).catch((): string[] => []);
      if (!left.includes('manifest.json')) partly += left.length > 1 ? 1 : 0;
      else {
        expect(await contents(inDir('harmed'))).toEqual(expected);
        await rm(inDir('harmed'), { recursive: true });
      }
    }
    expect(partly).toBeGreaterThan(0);
    expect(await run(inDir('harmed'))).toMatchObject({ printed: ['done'], code: 0 });
    expect(await contents(inDir('harmed'))).toEqual(expected);
  } finally {
    await compiled.remove();
  }
}, 300_000);
