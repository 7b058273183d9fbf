import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { crc32, deflateSync, gzipSync } from 'node:zlib';
import sharp from 'sharp';
import { UniFlowError } from '../lib/errors.js';
import { decodeImage, type ImageSource, type RgbImage } from '../lib/images/decode.js';
import { sideBySide, writeImage } from '../lib/images/write.js';

let dir: string;
beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-image-'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

/** Four quarters: red, green / blue, white. Each is uniform, so that lossy formats nearly preserve its colour. */
const WIDTH = 48;
const HEIGHT = 32;
const CORNERS = [
  [255, 0, 0],
  [0, 255, 0],
  [0, 0, 255],
  [255, 255, 255],
];

function quarters(): Buffer {
  const data = Buffer.alloc(WIDTH * HEIGHT * 3);
  for (let y = 0; y < HEIGHT; ++y) {
    for (let x = 0; x < WIDTH; ++x) {
      data.set(CORNERS[(y < HEIGHT / 2 ? 0 : 2) + (x < WIDTH / 2 ? 0 : 1)]!, (y * WIDTH + x) * 3);
    }
  }
  return data;
}

const drawn = () => sharp(quarters(), { raw: { width: WIDTH, height: HEIGHT, channels: 3 } });

const pixel = (image: RgbImage, x: number, y: number) => {
  const at = (y * image.width + x) * 3;
  return [...image.data.subarray(at, at + 3)];
};

/** Pixels well inside the four quarters. */
const corners = (image: RgbImage) =>
  [0.25, 0.75].flatMap((v) => [0.25, 0.75].map((u) => pixel(image, Math.floor(u * image.width), Math.floor(v * image.height))));

const distance = (a: number[][], b: number[][]) => Math.max(...a.flat().map((value, i) => Math.abs(value - b.flat()[i]!)));

async function failure(source: ImageSource, options?: Parameters<typeof decodeImage>[1]): Promise<UniFlowError> {
  const error: unknown = await decodeImage(source, options).then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(UniFlowError);
  return error as UniFlowError;
}

describe('formats', () => {
  const formats: [string, () => Promise<Buffer>, number][] = [
    ['png', () => drawn().png().toBuffer(), 0],
    ['palette png', () => drawn().png({ palette: true }).toBuffer(), 0],
    ['jpeg', () => drawn().jpeg({ quality: 100, chromaSubsampling: '4:4:4' }).toBuffer(), 3],
    ['progressive jpeg', () => drawn().jpeg({ quality: 100, progressive: true }).toBuffer(), 3],
    ['webp', () => drawn().webp({ quality: 100 }).toBuffer(), 6],
    ['lossless webp', () => drawn().webp({ lossless: true }).toBuffer(), 0],
    ['avif', () => drawn().avif({ quality: 100 }).toBuffer(), 6],
    ['tiff', () => drawn().tiff({ compression: 'lzw' }).toBuffer(), 0],
    ['gif', () => drawn().gif().toBuffer(), 0],
  ];

  test.each(formats)('%s', async (_name, encode, tolerance) => {
    const image = await decodeImage(await encode());
    expect([image.width, image.height, image.data.length]).toEqual([WIDTH, HEIGHT, WIDTH * HEIGHT * 3]);
    expect(distance(corners(image), CORNERS)).toBeLessThanOrEqual(tolerance);
  });

  test('a path, a file URL, its text, a Buffer and a Uint8Array give the same', async () => {
    const bytes = await drawn().png().toBuffer();
    const path = join(dir, 'with space.png');
    await writeFile(path, bytes);
    const sources: ImageSource[] = [path, pathToFileURL(path), pathToFileURL(path).href, bytes, new Uint8Array(bytes)];
    for (const source of sources) {
      expect(Buffer.from((await decodeImage(source)).data).equals(quarters())).toBe(true);
    }
  });

  test('takes the first frame of an animation', async () => {
    const frames = Buffer.concat([quarters(), Buffer.alloc(WIDTH * HEIGHT * 3)]);
    const raw = { width: WIDTH, height: 2 * HEIGHT, channels: 3, pageHeight: HEIGHT } as const;
    const image = await decodeImage(await sharp(frames, { raw }).gif().toBuffer());
    expect([image.width, image.height]).toEqual([WIDTH, HEIGHT]);
    expect(corners(image)).toEqual(CORNERS);
  });

  test('reads a changed file again', async () => {
    const path = join(dir, 'changes.png');
    await drawn().png().toFile(path);
    expect(corners(await decodeImage(path))).toEqual(CORNERS);
    await writeFile(path, await drawn().negate().png().toBuffer());
    expect(pixel(await decodeImage(path), 0, 0)).toEqual([0, 255, 255]);
  });
});

describe('pixels', () => {
  test.each([
    // Positions of the corners according to the EXIF standard; 5 to 8 swap width and height.
    [1, [0, 1, 2, 3]],
    [2, [1, 0, 3, 2]],
    [3, [3, 2, 1, 0]],
    [4, [2, 3, 0, 1]],
    [5, [0, 2, 1, 3]],
    [6, [2, 0, 3, 1]],
    [7, [3, 1, 2, 0]],
    [8, [1, 3, 0, 2]],
  ])('EXIF orientation %i', async (orientation, order) => {
    const jpeg = drawn().withMetadata({ orientation }).jpeg({ quality: 100, chromaSubsampling: '4:4:4' });
    const image = await decodeImage(await jpeg.toBuffer());
    expect([image.width, image.height]).toEqual(orientation < 5 ? [WIDTH, HEIGHT] : [HEIGHT, WIDTH]);
    expect(
      distance(
        corners(image),
        order.map((i) => CORNERS[i]!),
      ),
    ).toBeLessThanOrEqual(3);
  });

  test('blends transparency with white', async () => {
    const data = Buffer.from([255, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 128]);
    const png = await sharp(data, { raw: { width: 3, height: 1, channels: 4 } })
      .png()
      .toBuffer();
    const image = await decodeImage(png);
    expect([pixel(image, 0, 0), pixel(image, 1, 0)]).toEqual([
      [255, 0, 0],
      [255, 255, 255],
    ]);
    expect(Math.abs(pixel(image, 2, 0)[0]! - 127)).toBeLessThanOrEqual(1);
  });

  test('grey, and grey with transparency, become RGB', async () => {
    const grey = sharp(Buffer.from([0, 100, 255]), { raw: { width: 3, height: 1, channels: 1 } });
    const image = await decodeImage(await grey.toColourspace('b-w').png().toBuffer());
    expect([...image.data]).toEqual([0, 0, 0, 100, 100, 100, 255, 255, 255]);

    const clear = sharp(Buffer.from([7, 255, 7, 0]), { raw: { width: 2, height: 1, channels: 2 } });
    const flattened = await decodeImage(await clear.toColourspace('b-w').png().toBuffer());
    expect([...flattened.data]).toEqual([7, 7, 7, 255, 255, 255]);
  });

  test('truncates 16 bits to the upper 8', async () => {
    const rgb = sharp(Uint16Array.of(0, 0x12ff, 0xffff), { raw: { width: 1, height: 1, channels: 3 } });
    const png = await rgb.toColourspace('rgb16').png().toBuffer();
    expect((await sharp(png).metadata()).depth).toBe('ushort');
    expect([...(await decodeImage(png)).data]).toEqual([0, 0x12, 0xff]);

    const grey = sharp(Uint16Array.of(0x80ff, 0x0100), { raw: { width: 2, height: 1, channels: 1 } });
    const image = await decodeImage(await grey.toColourspace('grey16').png().toBuffer());
    expect([...image.data]).toEqual([0x80, 0x80, 0x80, 1, 1, 1]);
  });

  test('CMYK becomes RGB', async () => {
    const jpeg = await drawn().toColourspace('cmyk').jpeg({ quality: 100 }).toBuffer();
    expect((await sharp(jpeg).metadata()).space).toBe('cmyk');
    const [red, green, blue, white] = corners(await decodeImage(jpeg));
    expect(red![0]).toBeGreaterThan(150);
    expect(green![1]).toBeGreaterThan(green![0]!);
    expect(blue![2]).toBeGreaterThan(blue![0]!);
    expect(distance([white!], [[255, 255, 255]])).toBeLessThanOrEqual(3);
  });

  test('RGB values are not converted from an embedded profile', async () => {
    // The sRGB red in Display P3 is stored as (234, 51, 34); converting it back would give (255, 0, 0).
    const png = await drawn().withIccProfile('p3').png().toBuffer();
    expect((await sharp(png).metadata()).icc).toBeDefined();
    expect(distance([pixel(await decodeImage(png), 0, 0)], [[234, 51, 34]])).toBeLessThanOrEqual(1);
  });
});

/** A PNG of any size with almost no data. */
function pngOf(width: number, height: number): Buffer {
  const chunk = (type: string, data: Buffer) => {
    const body = Buffer.concat([Buffer.from(type, 'latin1'), data]);
    const out = Buffer.alloc(body.length + 8);
    out.writeUInt32BE(data.length, 0);
    body.copy(out, 4);
    out.writeUInt32BE(crc32(body), body.length + 4);
    return out;
  };
  const header = Buffer.from([0, 0, 0, 0, 0, 0, 0, 0, 8, 2, 0, 0, 0]);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  const signature = Buffer.from([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
  const data = chunk('IDAT', deflateSync(Buffer.alloc(16)));
  return Buffer.concat([signature, chunk('IHDR', header), data, chunk('IEND', Buffer.alloc(0))]);
}

describe('bad input', () => {
  test('a missing file', async () => {
    const path = join(dir, 'nowhere.png');
    const error = await failure(path);
    expect(error.code).toBe('NOT_FOUND');
    expect(error.message).toBe(`${path}: expected a file, but got no such file`);
  });

  test('a directory', async () => {
    const error = await failure(dir);
    expect([error.code, error.message]).toEqual(['BAD_INPUT', `${dir}: expected a file, but got a directory`]);
  });

  test('zero bytes', async () => {
    const path = join(dir, 'empty.jpg');
    await writeFile(path, '');
    expect((await failure(path)).message).toMatch(/^.*empty\.jpg: expected a JPEG, .*, but got 0 bytes$/);
    expect((await failure(Buffer.alloc(0))).message).toMatch(/^<buffer>: /);
  });

  test('text that is named .jpg', async () => {
    const path = join(dir, 'text.jpg');
    await writeFile(path, 'hello world');
    const error = await failure(path);
    expect(error.code).toBe('BAD_INPUT');
    expect(error.message).toMatch(/text\.jpg: expected a JPEG, PNG.*, but got 11 bytes starting with "hello world"$/);
  });

  test.each(['jpeg', 'png', 'webp', 'tiff', 'gif'] as const)('half of a %s', async (format) => {
    const noise = Buffer.from(Array.from({ length: 64 * 64 * 3 }, (_, i) => (i * i * 31) & 255));
    const whole = await sharp(noise, { raw: { width: 64, height: 64, channels: 3 } })
      .toFormat(format)
      .toBuffer();
    const error = await failure(whole.subarray(0, whole.length >> 1));
    expect(error.code).toBe('BAD_INPUT');
    // The directory of a TIFF is at its end, so a truncated file is not recognised as a TIFF.
    const start = format === 'tiff' ? 'expected a JPEG' : 'the image is damaged or incomplete: ';
    expect(error.message.startsWith(`<buffer>: ${start}`)).toBe(true);
    expect(error.message).not.toContain('\n');
    expect(error.cause).toBeInstanceOf(Error);
  });

  test('ignores bytes after the end of a JPEG', async () => {
    const jpeg = await drawn().jpeg().toBuffer();
    expect((await decodeImage(Buffer.concat([jpeg, Buffer.from('trailer')]))).width).toBe(WIDTH);
  });

  test('more pixels than allowed', async () => {
    const error = await failure(pngOf(30000, 30000));
    expect(error.code).toBe('BAD_INPUT');
    expect(error.message).toBe(
      '<buffer>: expected at most 268402689 pixels (raise the option maxPixels to allow more), ' + 'but got 900000000 (30000 x 30000)',
    );
    const png = await drawn().png().toBuffer();
    expect((await failure(png, { maxPixels: WIDTH * HEIGHT - 1 })).message).toContain('at most 1535 pixels');
    expect((await decodeImage(png, { maxPixels: WIDTH * HEIGHT })).width).toBe(WIDTH);
  });

  test('a format that is known but not supported', async () => {
    const error = await failure(Buffer.from('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'));
    expect(error.code).toBe('UNSUPPORTED');
    expect(error.message).toMatch(/, but got svg$/);
  });

  test('refuses SVG without reading it, because a short one can take minutes', async () => {
    const uses = Array.from({ length: 11 }, (_, i) => `<g id="g${i + 1}">${`<use href="#g${i}"/>`.repeat(10)}</g>`).join('');
    const bomb = `<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><g id="g0"><path d="M0 0h9"/></g>${uses}</svg>`;
    for (const bytes of [Buffer.from(bomb), gzipSync(bomb)]) expect((await failure(bytes)).message).toMatch(/, but got (svg|\d+ bytes)/);
  }, 2_000);

  test('a side that is longer than any work can be done on, before it is decoded', async () => {
    expect((await failure(pngOf(1, 2 ** 20 + 1))).message).toBe('<buffer>: expected at most 1048576 pixels a side, but got 1 x 1048577');
  });

  test.each(['https://example.com/cat.jpg', new URL('http://example.com/cat.jpg'), 'data:image/png;base64,AAAA'])(
    'a URL that is not a file: %s',
    async (url) => {
      const error = await failure(url);
      expect(error.code).toBe('UNSUPPORTED');
      expect(error.message).toMatch(/: only local files are read; fetch it first/);
    },
  );

  test('an aborted signal', async () => {
    expect((await failure(await drawn().png().toBuffer(), { signal: AbortSignal.abort() })).code).toBe('ABORTED');
    const path = join(dir, 'abort.png');
    await drawn().png().toFile(path);
    const controller = new AbortController();
    const pending = failure(path, { signal: controller.signal });
    controller.abort();
    expect((await pending).code).toBe('ABORTED');
  });
});

describe('writeImage', () => {
  const image: RgbImage = { data: quarters(), width: WIDTH, height: HEIGHT };

  test.each([
    ['a.png', 'png', 0],
    ['a.jpg', 'jpeg', 3],
    ['a.JPEG', 'jpeg', 3],
    ['a.webp', 'webp', 8],
  ])('%s', async (name, format, tolerance) => {
    const path = join(dir, name);
    await writeImage(path, image);
    expect((await sharp(await readFile(path)).metadata()).format).toBe(format);
    expect(distance(corners(await decodeImage(path)), CORNERS)).toBeLessThanOrEqual(tolerance);
  });

  test('replaces a file, and leaves nothing else behind', async () => {
    const folder = await mkdtemp(join(dir, 'write-'));
    await writeFile(join(folder, 'b.png'), 'old');
    await writeImage(join(folder, 'b.png'), image);
    expect(await readdir(folder)).toEqual(['b.png']);
    expect(corners(await decodeImage(join(folder, 'b.png')))).toEqual(CORNERS);
  });

  test('rejects other extensions, data of another size, and missing folders', async () => {
    await expect(writeImage(join(dir, 'a.bmp'), image)).rejects.toMatchObject({ code: 'UNSUPPORTED' });
    await expect(writeImage(join(dir, 'a.png'), { ...image, width: 5 })).rejects.toMatchObject({ code: 'BAD_INPUT' });
    await expect(writeImage(join(dir, 'none', 'a.png'), image)).rejects.toMatchObject({
      code: 'BAD_INPUT',
      message: expect.stringContaining('cannot be written'),
    });
  });
});

describe('sideBySide', () => {
  test('puts images next to each other with a white gap', () => {
    const dot = (value: number): RgbImage => ({ data: new Uint8Array(3).fill(value), width: 1, height: 1 });
    const tall: RgbImage = { data: new Uint8Array(6).fill(9), width: 1, height: 2 };
    const joined = sideBySide([dot(1), tall, dot(3)], 1);
    expect([joined.width, joined.height]).toEqual([5, 2]);
    expect([0, 1, 2, 3, 4].map((x) => pixel(joined, x, 0)[0])).toEqual([1, 255, 9, 255, 3]);
    expect([0, 1, 2, 3, 4].map((x) => pixel(joined, x, 1)[0])).toEqual([255, 255, 9, 255, 255]);
  });

  test('needs at least one', () => {
    expect(() => sideBySide([])).toThrow(/at least one image/);
  });
});
