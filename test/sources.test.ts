/** Sources: detection of images, grouping of their companions, and reports of everything skipped. Uses generated files. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { parquetWriteBuffer } from 'hyparquet-writer';
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { gzipSync } from 'node:zlib';
import sharp from 'sharp';
import { create } from 'tar';
import { batches, decodeImage, openDataset, openSource, type ImageLike, type Item } from '../lib/index.js';
import type { Skipped } from '../lib/sources/item.js';
import { readItemImage } from '../lib/sources/read.js';
import { Skips } from '../lib/sources/skips.js';
import { blockwisePermutation } from '../lib/train/random.js';
import { failure } from './support.js';

let dir: string;
let jpeg: Buffer;
beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-sources-'));
  jpeg = await sharp({ create: { width: 8, height: 8, channels: 3, background: '#808080' } })
    .jpeg()
    .toBuffer();
});
afterAll(() => rm(dir, { recursive: true, force: true }));

const inDir = (...parts: string[]): string => join(dir, ...parts);

async function put(name: string, content: string | Uint8Array = jpeg): Promise<string> {
  const path = inDir(name);
  await mkdir(dirname(path), { recursive: true });
  await writeFile(path, content);
  return path;
}

/** Creates a tar of files with these names. */
async function tar(name: string, files: readonly string[]): Promise<string> {
  for (const file of files) await put(`${name}-files/${file}`, /\.(json|txt|cls)$/.test(file) ? '{}' : jpeg);
  await mkdir(dirname(inDir(name)), { recursive: true });
  await create({ file: inDir(name), cwd: inDir(`${name}-files`) }, [...files]);
  return inDir(name);
}

async function read(...inputs: string[]): Promise<{ ids: string[]; items: Item[]; skipped: Skipped[] }> {
  const [items, skipped]: [Item[], Skipped[]] = [[], []];
  for await (const item of openSource(inputs).items((file) => skipped.push(file))) items.push(item);
  return { ids: items.map(({ id }) => id), items, skipped };
}

const errorOf = ({ image }: Item): string | undefined => (typeof image === 'object' && 'error' in image ? image.error : undefined);
const names = (skipped: readonly Skipped[], folder: string): string[] => skipped.map(({ path }) => path.slice(inDir(folder).length + 1));

describe('a folder', () => {
  test('has the images of every usual extension, and those without one that begin as an image', async () => {
    const files = ['a.jpe', 'b.jfif', 'c.bmp', 'd.heic', 'e', 'f.weird', 'g.PNG'];
    for (const file of files) await put(`extensions/${file}`);
    await put('extensions/h', 'text');
    await put('extensions/i.unknown', 'text');
    const { ids, skipped } = await read(inDir('extensions'));
    expect(ids).toEqual(files);
    expect(names(skipped, 'extensions')).toEqual(['h', 'i.unknown']);
  });

  test('names a link that leads nowhere as a loss, and other files as no images; what belongs to an image is silent', async () => {
    for (const file of ['a.jpg', 'a.txt', 'a.json', 'a.jpg.md5', 'notes.txt', 'readme.md', 'more.txt'])
      await put(`beside/${file}`, file === 'a.jpg' ? jpeg : 'text');
    await symlink('nowhere', inDir('beside', 'lost.jpg'));
    const { ids, skipped } = await read(inDir('beside'));
    expect(ids).toEqual(['a.jpg']);
    expect(skipped.map(({ path, lost }) => [path.slice(inDir('beside').length + 1), lost])).toEqual([
      ['lost.jpg', true],
      ['more.txt', false],
      ['notes.txt', false],
      ['readme.md', false],
    ]);
    const skips = new Skips();
    skipped.forEach(skips.add);
    expect(skips.summary).toBe('4 files were not read: 2 .txt, 1 .jpg, 1 .md');
    expect(skips.losses.map(({ reason }) => reason)).toEqual(['a link that leads nowhere']);
  });

  test('without images has the archives at any depth; with both, one kind is named as left out', async () => {
    await tar('deep/train/0.tar', ['a.jpg']);
    await rm(inDir('deep', 'train', '0.tar-files'), { recursive: true });
    await put('deep/val/1.tar.gz', gzipSync(await readFile(inDir('deep', 'train', '0.tar'))));
    const { ids, items } = await read(inDir('deep'));
    expect(ids).toEqual(['train/0.tar/a', 'val/1.tar.gz/a']);
    expect(Buffer.compare((await readItemImage(items[1]!.image, {})) as Buffer, jpeg)).toBe(0);
    await put('deep/val/image.jpg');
    const mixed = await read(inDir('deep'));
    expect(mixed.ids).toEqual(['val/image.jpg', inDir('deep')]);
    expect(errorOf(mixed.items[1]!)).toMatch(/0\.tar and val\/image\.jpg; the archives are left out \(name what is meant: '.*\*\.tar'\)/);
  });

  test('that img2dataset wrote has no failures: tables and statistics are about the shards', async () => {
    const table = new Uint8Array(parquetWriteBuffer({ columnData: [{ name: 'url', data: ['x'], type: 'STRING' }] }));
    for (const shard of ['00000', '00001']) {
      await tar(`img2dataset/${shard}.tar`, ['000.jpg', '000.json', '000.txt']);
      await rm(inDir('img2dataset', `${shard}.tar-files`), { recursive: true });
      await put(`img2dataset/${shard}.parquet`, table);
      await put(`img2dataset/${shard}_stats.json`, '{}');
      await put(`folders/${shard}/000.jpg`);
      await put(`folders/${shard}/000.json`, '{}');
      await put(`folders/${shard}.parquet`, table);
      await put(`folders/${shard}_stats.json`, '{}');
    }
    const tars = await read(inDir('img2dataset'));
    expect(tars.ids).toEqual(['00000.tar/000', '00001.tar/000']);
    expect(tars.skipped).toEqual([]);
    const folders = await read(inDir('folders'));
    expect(folders.ids).toEqual(['00000/000.jpg', '00001/000.jpg']);
    expect(folders.skipped).toEqual([]);
  });
});

describe('a tar', () => {
  test('has one image a key; a second one is a loss with a name, a mask is none', async () => {
    const path = await tar('keys.tar', ['a.jpg', 'a.png', 'a.seg.png', 'a.json', 'b.txt', 'c.bmp', 'nameless']);
    const { ids, skipped } = await read(path);
    expect(ids).toEqual(['keys.tar/a', 'keys.tar/c']);
    expect(skipped.map(({ path: skip, lost }) => [skip.slice(path.length + 1), lost])).toEqual([
      ['a.png', true],
      ['b.txt', false],
      ['nameless', true],
    ]);
  });

  test('that others follow in the same file has the images of all; one without images says so', async () => {
    const [one, two, none] = [await tar('one.tar', ['a.jpg']), await tar('two.tar', ['b.jpg']), await tar('none.tar', ['c.txt'])];
    const both = await put('both.tar', Buffer.concat([await readFile(one), await readFile(two)]));
    expect((await read(both)).ids).toEqual(['both.tar/a', 'both.tar/b']);
    expect((await openDataset(both)).length).toBe(2);
    const zipped = await read(await put('both.tgz', gzipSync(await readFile(both))));
    expect(zipped.ids).toEqual(['both.tgz/a', 'both.tgz/b']);
    const { items } = await read(none);
    expect(items.map(errorOf)).toEqual([expect.stringMatching(/expected images \(KEY\.jpg, .* but got none/)]);
  });
});

describe('a list', () => {
  const idsOf = async (name: string, text: string | Uint8Array): Promise<string[]> => (await read(await put(name, text))).ids;

  test('is CSV as people write it: quotes, more columns, commas in captions, a header, any line end', async () => {
    expect(await idsOf('quotes.csv', '"a, 1.jpg","say ""hi"", twice",3\nb.jpg,a cat, on a mat,4\nc.jpg,5" pipe\n')).toEqual([
      'a, 1.jpg',
      'b.jpg',
      'c.jpg',
    ]);
    expect(await idsOf('header.csv', 'caption,file_name,label\r"two\nlines",a.jpg,1\rx,b.jpg,2')).toEqual(['a.jpg', 'b.jpg']);
    expect(await idsOf('unquoted.txt', 'photo, 1.jpg\nb.jpg,7\n')).toEqual(['photo, 1.jpg', 'b.jpg']);
    expect(await idsOf('pairs.csv', 'a.jpg,a-mask.png\n')).toEqual(['a.jpg']);
    expect(await idsOf('semicolon.csv', 'file;label\nb.jpg;1,5\n')).toEqual(['b.jpg']);
  });

  test.each([
    ['little-endian', (text: string) => Buffer.from(`\ufeff${text}`, 'utf16le')],
    ['big-endian', (text: string) => Buffer.from(`\ufeff${text}`, 'utf16le').swap16()],
  ])('is read as UTF-16, %s', async (_, encode) => {
    expect(await idsOf('utf16.tsv', encode('größe.jpg\t1\r\nb.jpg\t2\r\n'))).toEqual(['größe.jpg', 'b.jpg']);
  });

  test('with one bad line has one failure', async () => {
    const path = await put('bad.csv', 'a.jpg,1\n"open,2\n,3\nb.jpg,4\n');
    const { ids, items } = await read(path);
    expect(ids).toEqual(['a.jpg', `${path}, line 2`, `${path}, line 3`, 'b.jpg']);
    expect(items.map(errorOf)).toEqual([
      undefined,
      expect.stringMatching(/expected a quote at the end/),
      expect.stringMatching(/expected a path/),
      undefined,
    ]);
  });

  test('with a header has labels in the column of that name', async () => {
    for (const file of ['x.jpg', 'y.jpg']) await put(`labelled/${file}`);
    const dataset = await openDataset(await put('labelled/list.csv', 'label,caption,path\n4,"a, b",x.jpg\n2,c,y.jpg\n'));
    expect(await Promise.all([0, 1].map(async (i) => (await dataset.read(i)).label))).toEqual([4, 2]);
  });
});

describe('Parquet as a data set', () => {
  const COUNT = 30;
  const GROUP = 4;
  const images = Array.from({ length: COUNT }, (_, i) => sharp({ create: { width: 8, height: 8, channels: 3, background: { r: 8 * i, g: 0, b: 0 } } }).png().toBuffer()); // prettier-ignore

  async function table(name: string, begin: number, end: number, kind: 'img' | 'image'): Promise<string> {
    const bytes = await Promise.all(images.slice(begin, end));
    const label = { name: 'label', data: bytes.map((_, i) => (begin + i) % 3) };
    const cells = kind === 'image' ? bytes : bytes.map((b, i) => ({ bytes: b, path: `${i}.png` }));
    const column =
      kind === 'image'
        ? [{ name: 'image', type: 'BYTE_ARRAY' as const, repetition_type: 'OPTIONAL' as const }]
        : [
            { name: 'img', num_children: 2, repetition_type: 'OPTIONAL' as const },
            { name: 'bytes', type: 'BYTE_ARRAY' as const, repetition_type: 'OPTIONAL' as const },
            { name: 'path', type: 'BYTE_ARRAY' as const, converted_type: 'UTF8' as const, repetition_type: 'OPTIONAL' as const },
          ];
    const file = parquetWriteBuffer({
      columnData: [{ name: kind, data: cells }, label],
      schema: [{ name: 'root', num_children: 2 }, ...column, { name: 'label', type: 'INT32', repetition_type: 'OPTIONAL' }],
      rowGroupSize: GROUP,
      kvMetadata: [{ key: 'huggingface', value: JSON.stringify({ info: { features: { label: { names: ['ant', 'bee', 'cat'] } } } }) }],
    });
    return put(name, new Uint8Array(file));
  }

  test.each(['img', 'image'] as const)('%s: several files are one, with labels and the names of the classes', async (kind) => {
    await table(`${kind}/train-00000.parquet`, 0, 11, kind);
    await table(`${kind}/train-00001.parquet`, 11, COUNT, kind);
    const pattern = inDir(kind, 'train-{00000..00001}.parquet');
    for (const path of [inDir(kind), pattern, inDir(kind, '*.parquet')]) {
      const dataset = await openDataset(path);
      expect(dataset).toMatchObject({ length: COUNT, classes: ['ant', 'bee', 'cat'] });
      const sample = await dataset.read(12);
      expect(sample).toMatchObject({ id: 'train-00001.parquet/1', label: 0 });
      expect(Buffer.compare(sample.image as Uint8Array, await images[12]!)).toBe(0);
    }
    expect((await read(inDir(kind))).ids.slice(9, 13)).toEqual(['00000.parquet/9', '00000.parquet/10', '00001.parquet/0', '00001.parquet/1'].map((id) => `train-${id}`)); // prettier-ignore
  });

  test('an epoch has every image once, in an order of its own, with its pixels and label', async () => {
    const dataset = await openDataset(await table('one.parquet', 0, COUNT, 'img'));
    const seen: number[] = [];
    for await (const { pixels, labels, ids } of batches(dataset, {
      batchSize: 5,
      size: 8,
      crop: 'random',
      flip: false,
      scale: [1, 1],
      epochs: 1,
    }))
      for (const [i, id] of ids.entries()) {
        const row = Number(id.split('/')[1]);
        expect(pixels.get(i, 4, 4, 0)).toBe(8 * row);
        expect(labels![i]).toBe(row % 3);
        seen.push(row);
      }
    const rows = Array.from({ length: COUNT }, (_, i) => i);
    expect(seen).not.toEqual(rows);
    expect([...seen].sort((a, b) => a - b)).toEqual(rows);
  });

  test('an order by blocks has each once, and takes turns among as many blocks as are held', () => {
    const [length, size, held] = [103, 5, 3];
    const blocks = { begins: Uint32Array.from({ length: 21 }, (_, i) => i * size), held };
    const order = [...blockwisePermutation(length, blocks, 7, 0)];
    expect([...order].sort((a, b) => a - b)).toEqual(Array.from({ length }, (_, i) => i));
    const used = new Set<number>(); // finished blocks must not recur
    for (let begin = 0; begin < length;) {
      const window = new Set<number>();
      let end = begin;
      while (end < length && (window.has(Math.floor(order[end]! / size)) || window.size < held))
        window.add(Math.floor(order[end++]! / size));
      for (const block of window) expect(used.has(block)).toBe(false);
      window.forEach((block) => used.add(block));
      begin = end;
    }
    expect(order).not.toEqual([...blockwisePermutation(length, blocks, 7, 1)]);
  });

  test('with a row group of nulls, whose LZ4 pages are empty, has the other images', async () => {
    let empty = 0;
    /** LZ4 without matches: a token, the remaining length above 15, and the bytes. */
    const compress = (bytes: Uint8Array): Uint8Array => {
      if (bytes.length === 0) empty++;
      const more = bytes.length - 15;
      const length = more < 0 ? [bytes.length << 4] : [0xf0, ...Array<number>(Math.floor(more / 255)).fill(255), more % 255];
      return Uint8Array.from([...length, ...bytes]);
    };
    const columnData = [{ name: 'image', data: [jpeg, jpeg, null, null], type: 'BYTE_ARRAY' as const, nullable: true }];
    const options = { codec: 'LZ4_RAW' as const, compressors: { LZ4_RAW: compress }, rowGroupSize: 2 };
    const path = await put('nulls.parquet', new Uint8Array(parquetWriteBuffer({ columnData, ...options })));
    const items: Item[] = [];
    for await (const item of openSource(path)) items.push(item);
    expect(Buffer.compare((await readItemImage(items[1]!.image, {})) as Uint8Array, jpeg)).toBe(0);
    expect((await failure(readItemImage(items[2]!.image, {}))).message).toMatch(/image, row 2: expected bytes, but got nothing/);
    expect(empty).toBeGreaterThan(0);
  });

  test('without a column of images is an error that names its columns', async () => {
    const path = await put(
      'plain.parquet',
      new Uint8Array(parquetWriteBuffer({ columnData: [{ name: 'url', data: ['x'], type: 'STRING' }] })),
    );
    expect((await failure(openDataset(path))).message).toMatch(/expected a column 'image' or 'img' of bytes, .* but got the columns url/);
  });
});

describe('what users have as an image', () => {
  test('buffers, blobs, files, responses, streams, sharp pipelines and pixels are images', async () => {
    const expected = await decodeImage(jpeg);
    const buffer = new Uint8Array(jpeg).buffer;
    const likes: ImageLike[] = [
      ...[buffer, new Blob([buffer]), new File([new Blob([buffer])], 'a.jpg'), new Response(buffer), new Blob([buffer]).stream()],
      ...[sharp(jpeg), expected],
    ];
    for (const like of likes) {
      const { data, width, height } = await decodeImage(like);
      expect([width, height]).toEqual([8, 8]);
      expect(Buffer.compare(data, expected.data)).toBe(0);
    }
    expect((await failure(decodeImage(new Response('no', { status: 404 })))).message).toBe(
      'image: expected a response with an image, but got HTTP 404',
    );
    expect((await failure(decodeImage(7 as never))).message).toMatch(/^image: expected a path, .* but got 7$/);
  });

  test('an option of another name is refused: it may be a misspelt one', async () => {
    const path = await put('options/a.jpg');
    const signals = { singal: AbortSignal.abort() } as object;
    expect((await failure(openDataset(dirname(path), signals))).message).toBe("options: expected only signal, but got 'singal'");
    expect(() => openSource(path, signals)).toThrow(/expected only signal, but got 'singal'/);
    const dataset = await openDataset(dirname(path));
    expect(() => batches(dataset, { batchSize: 1, size: 8, sufle: true } as never)).toThrow(/but got 'sufle'/);
  });
});
