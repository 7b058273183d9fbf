/** Data sets and loader, on generated folders, lists, IDX files and tars. */
import { afterAll, beforeAll, describe, expect, jest, test } from '@jest/globals';
import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readdir, readFile, readlink, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { gzipSync } from 'node:zlib';
import sharp, { type Sharp } from 'sharp';
import { create } from 'tar';
import { openDataset, subset, type Dataset } from '../lib/sources/dataset.js';
import { batches, type Batch, type LoaderOptions } from '../lib/train/loader.js';
import { permutation } from '../lib/train/random.js';
import { UniFlowError, type ErrorCode } from '../lib/errors.js';
import { defaultPreprocessing, loadPixels } from '../lib/io/preprocess.js';

let dir: string;
/** 10 images of 3 classes in two formats, in `images`. */
const files: string[] = [];
let images: Dataset;

/** Red encodes the column and green the row, so that pixels reveal their origin; blue distinguishes images. */
function gradient(blue = 0, side = 256): Sharp {
  const data = Buffer.alloc(side * side * 3);
  for (let i = 0; i < side * side; i++) data.set([((i % side) * 256) / side, (Math.floor(i / side) * 256) / side, blue], 3 * i);
  return sharp(data, { raw: { width: side, height: side, channels: 3 } });
}

async function put(name: string, content: string | Uint8Array): Promise<string> {
  const path = join(dir, name);
  await mkdir(dirname(path), { recursive: true });
  await writeFile(path, content);
  return path;
}

beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-data-'));
  for (let i = 0; i < 10; i++) {
    const [name, bytes] =
      i % 2
        ? [`${i}.png`, gradient(25 * i, 64).png()]
        : [`deep/${i}.jpg`, gradient(25 * i).jpeg({ quality: 100, chromaSubsampling: '4:4:4' })];
    const file = `${['ant', 'bee', 'cat'][i % 3]}/${name}`;
    files.push(file);
    await put(`images/${file}`, await bytes.toBuffer());
  }
  files.sort();
  images = await openDataset(join(dir, 'images'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

async function failure(work: Promise<unknown>, code: ErrorCode, message: RegExp): Promise<void> {
  const error: unknown = await work.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(UniFlowError);
  expect(error).toMatchObject({ code, message: expect.stringMatching(message) });
}

const contents = async (dataset: Dataset): Promise<[string, number | undefined][]> =>
  Promise.all(
    Array.from({ length: dataset.length }, (_, i) => dataset.read(i).then(({ id, label }): [string, number | undefined] => [id, label])),
  );

async function take(dataset: Dataset, count: number, options: Partial<LoaderOptions> = {}): Promise<Batch[]> {
  const taken: Batch[] = [];
  for await (const batch of batches(dataset, { batchSize: 3, size: 16, ...options })) if (taken.push(batch) === count) break;
  return taken;
}

const sameBatches = (a: Batch[], b: Batch[]): void => {
  expect(a.map(({ ids, labels, step, epoch }) => ({ ids, labels, step, epoch }))).toEqual(
    b.map(({ ids, labels, step, epoch }) => ({ ids, labels, step, epoch })),
  );
  for (const [i, { pixels }] of a.entries()) expect(Buffer.compare(pixels.data, b[i]!.pixels.data)).toBe(0);
};

describe('folder', () => {
  test('uses first-level folders as classes, and finds images recursively, sorted by name', async () => {
    expect(images.classes).toEqual(['ant', 'bee', 'cat']);
    expect(await contents(images)).toEqual(files.map((file) => [file, ['ant', 'bee', 'cat'].indexOf(file.slice(0, 3))]));
  });

  test('gives no labels without class folders, or when an image is next to them', async () => {
    const flat = await openDataset(join(dir, 'images', 'bee', 'deep'));
    expect(flat.classes).toBeUndefined();
    expect((await flat.read(0)).label).toBeUndefined();
    await put('mixed/ant/1.png', '');
    await put('mixed/2.png', '');
    await put('mixed/.hidden.png', '');
    await put('mixed/notes.txt', '');
    expect(await contents(await openDataset(join(dir, 'mixed')))).toEqual([
      ['2.png', undefined],
      ['ant/1.png', undefined],
    ]);
  });

  test('follows links, but not in cycles', async () => {
    await mkdir(join(dir, 'links'));
    await symlink(join(dir, 'images', 'bee'), join(dir, 'links', 'wasp'));
    await symlink(join(dir, 'links'), join(dir, 'links', 'again'));
    await symlink(join(dir, 'nowhere'), join(dir, 'links', 'broken.png'));
    const found = await contents(await openDataset(join(dir, 'links')));
    expect(found).toEqual(files.filter((file) => file.startsWith('bee')).map((file) => [file.replace('bee', 'wasp'), 0]));
  });

  test('rejects a missing or empty folder, or another kind of file', async () => {
    await failure(openDataset(join(dir, 'nothing')), 'NOT_FOUND', /nothing: expected a file or folder, but got nothing of that name/);
    await mkdir(join(dir, 'empty'));
    await failure(openDataset(join(dir, 'empty')), 'NOT_FOUND', /empty: expected images \(jpg, .*\), but got none/);
    await failure(openDataset(await put('x.mp4', '')), 'UNSUPPORTED', /expected a folder, a list .* but got 'x\.mp4'/);
    await failure(openDataset(7 as never), 'BAD_INPUT', /path: expected the path of a dataset, but got 7/);
    await failure(openDataset(dir, { signal: AbortSignal.abort() }), 'ABORTED', /aborted/);
    await failure(images.read(10), 'BAD_INPUT', /index: expected an integer from 0 to 9, but got 10/);
  });
});

describe('list', () => {
  test('resolves paths relative to the list; numbers names in order and keeps numbers', async () => {
    const [a, b] = files as [string, string];
    const named = await openDataset(await put('images/named.tsv', `${b}\tzebra\r\n\n${a}\tape\r\n`));
    expect(named.classes).toEqual(['ape', 'zebra']);
    expect(await contents(named)).toEqual([
      [b, 1],
      [a, 0],
    ]);
    const numbered = await openDataset(await put('images/numbered.csv', `\ufeff${a},10\n${join(dir, 'images', b)}, 2\n`));
    expect(numbered.classes).toBeUndefined();
    expect((await contents(numbered)).map(([, label]) => label)).toEqual([10, 2]);
    expect((await take(numbered, 1, { batchSize: 2, crop: 'center' }))[0]!.labels).toEqual(Int32Array.of(10, 2));
    const plain = await openDataset(await put('images/plain.txt', `${a}\n${b}`));
    expect(await contents(plain)).toEqual([
      [a, undefined],
      [b, undefined],
    ]);
  });

  test('names a missing file with its line, a missing label with its image', async () => {
    await failure(openDataset(await put('images/a.txt', `${files[0]}\ngone.jpg`)), 'NOT_FOUND', /a\.txt, line 2: .*'gone\.jpg'/);
    const partly = await put('images/b.txt', `${files[0]}\t1\n${files[1]}\n`);
    await failure(
      openDataset(partly),
      'BAD_INPUT',
      new RegExp(`a label for every image, or for none, but got 1 of 2: '${files[1]}' has none`),
    );
    await failure(openDataset(await put('c.csv', '\n')), 'NOT_FOUND', /c\.csv: expected an image in each line/);
  });
});

describe('IDX', () => {
  const header = (...words: number[]): Buffer => {
    const bytes = Buffer.alloc(4 * words.length);
    words.forEach((word, i) => bytes.writeUInt32BE(word, 4 * i));
    return bytes;
  };
  const pixels = Buffer.from(Array.from({ length: 5 * 6 * 4 }, (_, i) => 2 * i));
  const images = Buffer.concat([header(0x803, 5, 6, 4), pixels]);
  const labels = Buffer.concat([header(0x801, 5), Buffer.from([3, 1, 4, 1, 5])]);

  test.each([
    ['plain', 'train-images-idx3-ubyte', images, 'train-labels-idx1-ubyte', labels],
    ['zipped', 't10k-images-idx3-ubyte.gz', gzipSync(images), 't10k-labels-idx1-ubyte.gz', gzipSync(labels)],
    ['dotted', 'train-images.idx3-ubyte', images, 'train-labels.idx1-ubyte', labels],
  ])('%s: grey images as RGB, labels from beside', async (folder, name, imageBytes, labelName, labelBytes) => {
    await put(`${folder}/${labelName}`, labelBytes);
    const dataset = await openDataset(await put(`${folder}/${name}`, imageBytes));
    expect((await contents(dataset)).map(([, label]) => label)).toEqual([3, 1, 4, 1, 5]);
    const { image } = await dataset.read(2);
    const grey = [...pixels.subarray(48, 72)];
    expect(image).toMatchObject({ width: 4, height: 6 });
    expect([...(image as { data: Uint8Array }).data]).toEqual(grey.flatMap((value) => [value, value, value]));
    for (const crop of ['center', 'random'] as const) {
      const [batch] = await take(dataset, 1, { crop, batchSize: 5, size: 32 });
      expect(batch!.pixels.shape).toEqual([5, 32, 32, 3]);
    }
  });

  test('reads images without labels, and rejects damaged files', async () => {
    const open = async (name: string, bytes: Buffer): Promise<Dataset> => openDataset(await put(`idx/${name}-images-idx3-ubyte`, bytes));
    expect((await (await open('a', images)).read(0)).label).toBeUndefined();
    await failure(open('b', images.subarray(0, 100)), 'BAD_INPUT', /expected 5 x 6 x 4 bytes and at least one, but got 84/);
    await failure(open('c', labels), 'BAD_INPUT', /expected an IDX file of 3 dimensions, but got 13 bytes starting with 0x00000801/);
    await failure(
      openDataset(await put('idx/d-images-idx3-ubyte.gz', gzipSync(images).subarray(0, 40))),
      'BAD_INPUT',
      /cannot be read: unexpected end/,
    );
    await put('idx/e-labels-idx1-ubyte', Buffer.concat([header(0x801, 1), Buffer.from([1])]));
    await failure(open('e', images), 'BAD_INPUT', /expected 5 labels, one for each image, but got 1/);
  });
});

describe('WebDataset', () => {
  const long = 'a-very-long-name-'.repeat(12); // too long for a plain header
  async function tar(name: string, content: Record<string, string | Uint8Array>, options: object = {}): Promise<string> {
    for (const [file, bytes] of Object.entries(content)) await put(`tar/${file}`, bytes);
    await create({ file: join(dir, name), cwd: join(dir, 'tar'), ...options }, Object.keys(content));
    return join(dir, name);
  }
  const png = (blue: number): Promise<Buffer> => gradient(blue, 8).png().toBuffer();

  test('matches images and labels of a key, whatever else is in the archive', async () => {
    const [a, b] = [await png(1), await png(2)];
    const path = await tar('one.tar', {
      'x/b.cls': '7\n',
      'x/b.png': b,
      'x/b.mask.png': a,
      readme: '',
      [`${long}.jpg`]: a,
      [`${long}.json`]: '{"label": 3}',
    });
    const dataset = await openDataset(path);
    expect(await contents(dataset)).toEqual([
      ['one.tar/x/b', 7],
      [`one.tar/${long}`, 3],
    ]);
    expect((await dataset.read(0)).image).toEqual(b);
    expect((await dataset.read(1)).image).toEqual(a);
  });

  test('reads an archive with GNU long names', async () => {
    const name = `${long}.jpg`;
    const block = (path: string, type: string, body: Buffer): Buffer => {
      const head = Buffer.alloc(512);
      head.write(path.slice(0, 100));
      head.write(
        `0000644\0${'0000000\0'.repeat(2)}${body.length.toString(8).padStart(11, '0')}\0${'0'.repeat(11)}\0${' '.repeat(8)}${type}ustar  \0`,
        100,
      );
      head.write(
        `${head
          .reduce((x, y) => x + y)
          .toString(8)
          .padStart(6, '0')}\0 `,
        148,
      );
      return Buffer.concat([head, body, Buffer.alloc((512 - (body.length % 512)) % 512)]);
    };
    const image = await png(9);
    const bytes = Buffer.concat([block('././@LongLink', 'L', Buffer.from(`${name}\0`)), block(name, '0', image), Buffer.alloc(1024)]);
    const dataset = await openDataset(await put('gnu.tar', bytes));
    expect(await dataset.read(0)).toEqual({ id: `gnu.tar/${long}`, label: undefined, image });
  });

  test('reads shards named by braces or in a folder', async () => {
    await mkdir(join(dir, 'shards'), { recursive: true });
    for (const i of [8, 9, 10])
      await tar(`shards/s-0${String(i).padStart(2, '0')}.tar`, { 'k.png': await png(i), 'k.cls': ['owl', 'emu', 'owl'][i - 8]! });
    const all = await openDataset(join(dir, 'shards'));
    expect(all.classes).toEqual(['emu', 'owl']);
    expect(await contents(all)).toEqual([
      ['s-008.tar/k', 1],
      ['s-009.tar/k', 0],
      ['s-010.tar/k', 1],
    ]);
    const two = await openDataset(join(dir, 'shards', 's-{009..010}.tar'));
    expect((await contents(two)).map(([id]) => id)).toEqual(['s-009.tar/k', 's-010.tar/k']);
    await failure(openDataset(join(dir, 'shards', 's-{009..011}.tar')), 'NOT_FOUND', /s-011\.tar/);
  });

  test('rejects damaged, empty or partly labelled archives', async () => {
    const bytes = await readFile(await tar('whole.tar', { 'p.png': await png(1), 'q.png': await png(2), 'q.cls': '1' }));
    await failure(openDataset(join(dir, 'whole.tar')), 'BAD_INPUT', /1 of 2: 'whole\.tar\/p' has none/);
    await failure(
      openDataset(await put('cut.tar', bytes.subarray(0, 550))),
      'BAD_INPUT',
      /cut\.tar: expected \d+ bytes or more, but got 550/,
    );
    await failure(
      openDataset(await put('between.tar', bytes.subarray(0, 1024))),
      'BAD_INPUT',
      /between\.tar: expected 512 bytes at byte 1024/,
    );
    await failure(openDataset(await put('noise.tar', Buffer.alloc(1024, 'x'))), 'BAD_INPUT', /expected a tar header at byte 0/);
    await failure(openDataset(await tar('text.tar', { 'a.txt': 'a' })), 'NOT_FOUND', /text\.tar: expected images/);
    await failure(
      openDataset(await tar('json.tar', { 'a.png': await png(1), 'a.json': '{' })),
      'BAD_INPUT',
      /a\.json: expected JSON, but got '\{'/,
    );
  });

  test('names a broken image by its key, and leaves no file open', async () => {
    const dataset = await openDataset(await tar('broken.tar', { 'bad.png': 'no image' }));
    await failure(take(dataset, 1, { batchSize: 1 }), 'BAD_INPUT', /^broken\.tar\/bad: expected a JPEG, .* but got 8 bytes/);
    if (process.platform !== 'linux') return;
    const open = await Promise.all((await readdir('/proc/self/fd')).map((fd) => readlink(`/proc/self/fd/${fd}`).catch(() => '')));
    expect(open.filter((path) => path.startsWith(dir))).toEqual([]);
  });
});

describe('hash', () => {
  test('depends on ids, labels and bytes, and changes with each', async () => {
    const expected = createHash('sha256');
    for (const [id, label] of await contents(images)) {
      const bytes = await readFile(join(dir, 'images', id));
      expected.update(`${JSON.stringify([id, label, bytes.length])}\n`).update(bytes);
    }
    const before = await images.hash();
    expect(before).toBe(expected.digest('hex'));
    const file = join(dir, 'images', files[4]!);
    const bytes = await readFile(file);
    await writeFile(file, Buffer.concat([bytes.subarray(0, -1), Buffer.from([bytes.at(-1)! ^ 1])]));
    expect(await images.hash()).not.toBe(before);
    await writeFile(file, bytes);
    expect(await images.hash()).toBe(before);
    expect(await subset(images, [1, 0]).hash()).not.toBe(await subset(images, [0, 1]).hash());
  });

  test('reports progress, and can be aborted', async () => {
    const seen: number[] = [];
    await images.hash({ onProgress: (done, total) => seen.push(done / total) });
    expect(seen).toEqual(Array.from({ length: 10 }, (_, i) => (i + 1) / 10));
    const stop = new AbortController();
    await failure(images.hash({ signal: stop.signal, onProgress: () => stop.abort() }), 'ABORTED', /aborted/);
  });
});

describe('subset', () => {
  test('has the named samples, with the classes of the whole set', async () => {
    const some = subset(images, [7, 0, 7]);
    expect((await contents(some)).map(([id]) => id)).toEqual([files[7], files[0], files[7]]);
    expect(some.classes).toEqual(images.classes);
    await some.close();
    await failure(some.read(0), 'DISPOSED', /closed/);
    expect((await images.read(0)).id).toBe(files[0]);
    expect(() => subset(images, [10])).toThrow(/indices\[0\]: expected an integer from 0 to 9, but got 10/);
  });
});

describe('loader', () => {
  test('makes a batch depend only on dataset, options, seed and step, so a run resumed at step 5 continues identically', async () => {
    const whole = await take(images, 10, { seed: 4 });
    expect(whole.map(({ step, epoch }) => [step, epoch])).toEqual(Array.from({ length: 10 }, (_, i) => [i, Math.floor(i / 3)]));
    sameBatches(await take(images, 5, { seed: 4, from: 5 }), whole.slice(5));
    const threads = sharp.concurrency();
    sharp.concurrency(3);
    sameBatches(await take(images, 10, { seed: 4, prefetch: 0 }), whole);
    sharp.concurrency(threads);
    sameBatches(await take(images, 7, { seed: 4, prefetch: 20 }), whole.slice(0, 7));
    const other = await take(images, 10, { seed: 5 });
    expect(other.map(({ ids }) => ids)).not.toEqual(whole.map(({ ids }) => ids));
  });

  test('shuffles each training epoch, uses every image at most once, and drops the partial batch', async () => {
    const taken = await take(images, 6);
    const epochs = [taken.slice(0, 3), taken.slice(3)].map((epoch) => epoch.flatMap(({ ids }) => ids));
    for (const ids of epochs) expect(new Set(ids).size).toBe(9);
    expect(epochs[0]).not.toEqual(epochs[1]);
    for (const { ids, labels } of taken) expect([...labels!]).toEqual(ids.map((id) => ['ant', 'bee', 'cat'].indexOf(id.slice(0, 3))));
    expect(await take(images, Infinity, { epochs: 2 })).toHaveLength(6);
  });

  test('yields all images in order, preprocessed as in encode, when evaluating', async () => {
    const taken = await take(images, Infinity, { crop: 'center', epochs: 1, batchSize: 4, size: [16, 12] });
    expect(taken.map(({ pixels }) => pixels.shape)).toEqual([4, 4, 2].map((b) => [b, 16, 12, 3]));
    expect(taken.flatMap(({ ids }) => ids)).toEqual(files);
    const paths = files.map((file) => ({ id: file, image: join(dir, 'images', file) }));
    const expected = await loadPixels(paths, defaultPreprocessing('internvit', [16, 12]), [16, 12]);
    expect(Buffer.compare(Buffer.concat(taken.map(({ pixels }) => pixels.data)), expected)).toBe(0);
  });

  /** The part of the gradient visible in each sample. */
  async function boxes(
    options: Partial<LoaderOptions>,
    count = 200,
  ): Promise<{ left: number; top: number; width: number; height: number }[]> {
    const size = 32;
    const one = subset(images, [files.findIndex((file) => file.endsWith('.jpg'))]);
    const taken = await take(one, count, { size, batchSize: 1, ...options });
    return taken.map(({ pixels }) => {
      const [red0, red1] = [pixels.get(0, 16, 0, 0), pixels.get(0, 16, size - 1, 0)];
      const [green0, green1] = [pixels.get(0, 0, 16, 1), pixels.get(0, size - 1, 16, 1)];
      const [width, height] = [red1 - red0, green1 - green0].map((range) => (range * size) / (size - 1)) as [number, number];
      return { left: red0 - width / size / 2, top: green0 - height / size / 2, width, height };
    });
  }

  test('keeps random crops in the range of areas and aspect ratios, and covers the whole image', async () => {
    const scale = [0.2, 0.5] as const;
    const found = await boxes({ scale, flip: false });
    const areas = found.map(({ width, height }) => (width * height) / 256 ** 2);
    const aspects = found.map(({ width, height }) => width / height);
    const mean = (values: number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
    expect(Math.min(...areas)).toBeGreaterThan(0.18);
    expect(Math.max(...areas)).toBeLessThan(0.53);
    expect(Math.abs(mean(areas) - 0.35)).toBeLessThan(0.03);
    expect(Math.min(...aspects)).toBeGreaterThan(0.7);
    expect(Math.max(...aspects)).toBeLessThan(1.42);
    expect(Math.abs(mean(aspects.map(Math.log)))).toBeLessThan(0.04);
    for (const edge of ['left', 'top'] as const) {
      expect(Math.min(...found.map((box) => box[edge]))).toBeLessThan(8);
      expect(Math.max(...found.map((box) => box[edge]))).toBeGreaterThan(90);
    }
  });

  test('mirrors about half of the samples with flip, and changes nothing else', async () => {
    const [plain, flipped] = [await boxes({ flip: false }), await boxes({})];
    const mirrored = flipped.filter(({ width }) => width < 0);
    expect(mirrored.length).toBeGreaterThan(75);
    expect(mirrored.length).toBeLessThan(125);
    const upright = flipped.map(({ left, top, width, height }) =>
      width < 0 ? { left: left + width, top, width: -width, height } : { left, top, width, height },
    );
    upright.forEach((box, i) => {
      for (const name of ['left', 'top', 'width', 'height'] as const) expect(Math.abs(box[name] - plain[i]![name])).toBeLessThan(3);
    });
    const center = { crop: 'center', batchSize: 1, size: 8, flip: true } as const;
    const reds = (await take(subset(images, [0]), 30, center)).map(({ pixels }) => pixels.get(0, 0, 0, 0) < pixels.get(0, 0, 7, 0));
    expect(new Set(reds)).toEqual(new Set([true, false]));
  });

  test('enlarges small and thin images, applies EXIF orientation, blends transparency with white', async () => {
    const thin = sharp({ create: { width: 300, height: 1, channels: 3, background: '#102030' } });
    await put('odd/1.png', await thin.png().toBuffer());
    await put('odd/2.png', await gradient(0, 1).png().toBuffer());
    await put(
      'odd/3.webp',
      await sharp({ create: { width: 9, height: 9, channels: 4, background: '#00000000' } })
        .webp()
        .toBuffer(),
    );
    await put('odd/4.jpg', await gradient().withMetadata({ orientation: 3 }).jpeg().toBuffer());
    const [batch] = await take(await openDataset(join(dir, 'odd')), 1, {
      batchSize: 4,
      size: 32,
      shuffle: false,
      flip: false,
      scale: [1, 1],
    });
    const pixel = (i: number, y: number, x: number): number[] => [0, 1, 2].map((c) => batch!.pixels.get(i, y, x, c));
    expect(pixel(0, 31, 31)).toEqual([16, 32, 48]);
    expect(pixel(1, 16, 16)).toEqual([0, 0, 0]);
    expect(pixel(2, 0, 0)).toEqual([255, 255, 255]);
    expect(pixel(3, 0, 0)[0]).toBeGreaterThan(240);
    expect(pixel(3, 31, 31)[0]).toBeLessThan(15);
  });

  test('gives the same content when a large JPEG is shrunk on load', async () => {
    await put('large/1.jpg', await gradient().resize(2048, 2048).jpeg({ quality: 95 }).toBuffer());
    await put('large/2.png', await gradient().resize(2048, 2048).png().toBuffer());
    const [batch] = await take(await openDataset(join(dir, 'large')), 1, { batchSize: 2, shuffle: false, scale: [1, 1], flip: false });
    const [jpeg, exact] = [batch!.pixels.data.subarray(0, 768), batch!.pixels.data.subarray(768)];
    expect(Math.max(...jpeg.map((value, i) => Math.abs(value - exact[i]!)))).toBeLessThan(6);
  });

  test('prefetches the given number of batches while the caller works, and no more', async () => {
    const read = jest.spyOn(images, 'read');
    const iterator = batches(images, { batchSize: 3, size: 8, prefetch: 2 });
    expect(read).toHaveBeenCalledTimes(0);
    await iterator.next();
    for (const calls of [9, 12]) {
      await new Promise((resolve) => setTimeout(resolve, 100));
      expect(read).toHaveBeenCalledTimes(calls);
      await iterator.next();
    }
    await iterator.return();
    const ended = read.mock.calls.length;
    await new Promise((resolve) => setTimeout(resolve, 50));
    expect(read).toHaveBeenCalledTimes(ended);
    expect(await iterator.next()).toEqual({ done: true, value: undefined });
    read.mockRestore();
  });

  test('rejects with the name of a broken image at its batch, after the batches before it', async () => {
    const whole = await gradient().jpeg().toBuffer();
    for (let i = 0; i < 4; i++) await put(`broken/${i}.jpg`, i === 3 ? whole.subarray(0, 700) : whole);
    const broken = await openDataset(join(dir, 'broken'));
    const iterator = batches(broken, { batchSize: 2, size: 8, shuffle: false });
    expect((await iterator.next()).value).toMatchObject({ ids: ['0.jpg', '1.jpg'], labels: undefined });
    await failure(iterator.next(), 'BAD_INPUT', /broken\/3\.jpg: the image is damaged or incomplete/);
    expect((await iterator.next()).done).toBe(true);
    await rm(join(dir, 'broken', '3.jpg'));
    await failure(take(broken, 2, { batchSize: 2, shuffle: false }), 'NOT_FOUND', /broken\/3\.jpg: expected a file, but got no such file/);
  });

  describe('with onDamaged', () => {
    let broken: Dataset;
    const met: { index: number; id: string; message: string }[] = [];
    const onDamaged: LoaderOptions['onDamaged'] = ({ index, id, error }) => void met.push({ index, id, message: error.message });
    beforeAll(async () => {
      const whole = await gradient().jpeg().toBuffer();
      for (let i = 0; i < 6; i++) await put(`damaged/${i}.jpg`, i === 2 ? 'no image' : whole);
      broken = await openDataset(join(dir, 'damaged'));
    });

    test('replaces a damaged sample by the next one of the epoch, whatever step the loader starts at', async () => {
      const options = { batchSize: 3, size: 8, seed: 4, onDamaged };
      const all = await take(broken, 6, options);
      const order = (epoch: number): string[] => [...permutation(6, 4, epoch)].map((i) => `${i}.jpg`);
      for (const { ids, step, epoch } of all) {
        const expected = order(epoch).map((id, at, ids) => (id === '2.jpg' ? ids[(at + 1) % 6]! : id));
        expect(ids).toEqual(expected.slice(3 * (step % 2), 3 * (step % 2) + 3));
      }
      expect(met.length).toBeGreaterThanOrEqual(3);
      for (const damaged of met)
        expect(damaged).toMatchObject({ index: 2, id: '2.jpg', message: expect.stringContaining('damaged/2.jpg') });
      const [later] = await take(broken, 1, { ...options, from: 3 });
      expect(later).toEqual(all[3]);
    });

    test('leaves a damaged sample out of its batch without a gap when cropping centrally', async () => {
      const [first, second] = await take(broken, 2, { batchSize: 3, size: 8, crop: 'center', epochs: 1, onDamaged });
      expect([first!.ids, second!.ids]).toEqual([
        ['0.jpg', '1.jpg'],
        ['3.jpg', '4.jpg', '5.jpg'],
      ]);
      expect(first!.pixels.shape).toEqual([2, 8, 8, 3]);
      expect(Buffer.from(first!.pixels.data)).toEqual(Buffer.from(second!.pixels.data.subarray(0, 2 * 192)));
      const [none] = await take(subset(broken, [2, 0]), 1, { batchSize: 1, size: 8, crop: 'center', epochs: 1, onDamaged });
      expect(none!.ids).toEqual(['0.jpg']); // a batch with only damaged images is skipped
    });

    test('rejects when all data is damaged', async () => {
      const all = subset(broken, [2, 2, 2]);
      await failure(
        take(all, 1, { batchSize: 2, size: 8, onDamaged }),
        'BAD_INPUT',
        /none of 3 samples in a row can be read; the last: .*2\.jpg/,
      );
    });
  });

  test('stops on abort, including all prefetched work, without unhandled rejections', async () => {
    const loose = jest.fn();
    process.on('unhandledRejection', loose);
    const stop = new AbortController();
    const iterator = batches(images, { batchSize: 3, size: 64, prefetch: 8, signal: stop.signal });
    await iterator.next();
    stop.abort(new Error('enough'));
    await failure(take(images, 1, { signal: stop.signal }), 'ABORTED', /aborted/);
    await failure(
      (async () => {
        for await (const batch of iterator) void batch;
      })(),
      'ABORTED',
      /aborted/,
    );
    await new Promise((resolve) => setTimeout(resolve, 50));
    expect(loose).not.toHaveBeenCalled();
    process.off('unhandledRejection', loose);
  });

  test.each<[Partial<LoaderOptions>, RegExp]>([
    [{ batchSize: 0 }, /batchSize: expected an integer from 1/],
    [{ batchSize: 11 }, /dataset: expected at least 11 samples \(a batch\), but got 10/],
    [{ size: 0 }, /size: expected/],
    [{ crop: 'middle' as never }, /crop: expected 'random' or 'center', but got 'middle'/],
    [{ scale: [0.5, 0.2] }, /scale: expected a range within \(0, 1\], but got \[0.5,0.2\]/],
    [{ seed: -1 }, /seed: expected/],
    [{ epochs: 0 }, /epochs: expected/],
    [{ from: 0.5 }, /from: expected/],
    [{ prefetch: -1 }, /prefetch: expected/],
    [{ signal: 'no' as never }, /signal: expected an AbortSignal/],
  ])('refuses %j at once', (options, message) => {
    expect(() => batches(images, { batchSize: 2, size: 8, ...options })).toThrow(message);
  });
});
