/**
 * Decoded pixels equal Pillow's, which published models were trained with; images that Pillow reads differently are refused with the
 * reason.
 */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { execFileSync } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { decodeImage, type RgbImage } from '../lib/index.js';
import { failure, root } from './support.js';

/** Images of an odd size in all 8-bit modes of each format, and Pillow's conversion of them to RGB. */
const PROGRAM = `
import sys
from PIL import Image
W, H = 37, 23
rgb = Image.new("RGB", (W, H))
rgb.putdata([((x * 7) % 256, (y * 11) % 256, (x * y * 5) % 256) for y in range(H) for x in range(W)])
modes = {"RGB": rgb, "L": rgb.convert("L"), "P": rgb.convert("P", palette=Image.ADAPTIVE, colors=200), "1": rgb.convert("1")}
files = [(f, m, {}) for f in ("png", "bmp", "tiff") for m in modes]
files += [("tiff", "RGB", {"compression": c}) for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits")]
files += [("gif", m, {}) for m in ("P", "L")] + [("webp", "RGB", {"lossless": True}), ("webp", "RGB", {"quality": 80})]
files += [("jpg", "RGB", {"subsampling": s, "progressive": p}) for s in (0, 1, 2) for p in (False, True)] + [("jpg", "L", {})]
for i, (format, mode, options) in enumerate(files):
    path = "%02d-%s.%s" % (i, mode, format)
    modes[mode].save(path, **options)
    open(path + ".rgb", "wb").write(Image.open(path).convert("RGB").tobytes())
    print(path)
`;

let dir: string;
beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-pillow-'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

test('8-bit PNG, JPEG, WebP, GIF, TIFF and BMP have the bytes that Pillow decodes', async () => {
  const { pythonWithPillow } = await import(join(root, 'scripts', 'system.mjs'));
  const names = execFileSync(pythonWithPillow() as string, ['-c', PROGRAM], { cwd: dir, encoding: 'utf8' })
    .trim()
    .split('\n');
  expect(names).toHaveLength(26);
  const different: string[] = [];
  for (const name of names) {
    const { data, width, height } = await decodeImage(join(dir, name));
    expect([width, height]).toEqual([37, 23]);
    if (Buffer.compare(data, await readFile(join(dir, `${name}.rgb`))) !== 0) different.push(name);
  }
  expect(different).toEqual([]);
});

// ----- TIFF -----------------------------------------------------------------------------------------------------

interface Tiff {
  samples: number;
  bits: number;
  photometric: number;
  extra?: number[];
  format?: number;
}

const [WIDTH, HEIGHT] = [96, 64];

/** An uncompressed TIFF; `pixel` writes the samples of one pixel at an offset. */
function tiff(
  { samples, bits, photometric, extra = [], format = 1 }: Tiff,
  pixel: (data: Buffer, at: number, x: number, y: number) => void,
): Buffer {
  const size = Math.ceil((samples * bits) / 8);
  const data = Buffer.alloc(size * WIDTH * HEIGHT);
  for (let i = 0; i < WIDTH * HEIGHT; i++) pixel(data, i * size, i % WIDTH, Math.floor(i / WIDTH));
  const all = (value: number): number[] => Array<number>(samples).fill(value);
  const tags: [tag: number, values: number[]][] = [
    [256, [WIDTH]], [257, [HEIGHT]], [258, all(bits)], [259, [1]], [262, [photometric]], [273, [0]], [277, [samples]], [278, [HEIGHT]],
    [279, [data.length]], ...(extra.length > 0 ? [[338, extra] as [number, number[]]] : []), [339, all(format)],
  ]; // prettier-ignore
  const head = Buffer.alloc(14 + 12 * tags.length);
  head.write('II*\0');
  head.writeUInt32LE(8, 4);
  head.writeUInt16LE(tags.length, 8);
  const values: Buffer[] = [];
  let end = head.length;
  for (const [i, [tag, list]] of tags.entries()) {
    const at = 10 + 12 * i;
    head.writeUInt16LE(tag, at);
    head.writeUInt16LE(tag === 279 ? 4 : 3, at + 2);
    head.writeUInt32LE(list.length, at + 4);
    const place = Buffer.alloc(4 * Math.ceil(list.length / 2));
    list.forEach((value, n) => (tag === 279 ? place.writeUInt32LE(value, 0) : place.writeUInt16LE(value, 2 * n)));
    if (place.length <= 4) place.copy(head, at + 8);
    else {
      head.writeUInt32LE(end, at + 8);
      values.push(place);
      end += place.length;
    }
  }
  head.writeUInt32LE(end, 10 + 12 * tags.findIndex(([tag]) => tag === 273) + 8);
  return Buffer.concat([head, ...values, data]);
}

const ramp = (x: number, y: number): number[] => [Math.floor((x * 255) / 95), Math.floor((y * 255) / 63), 128];
const row = ({ data }: RgbImage): number[][] => [0, 48, 95].map((x) => [...data.subarray(3 * x, 3 * x + 3)]);

describe('bands of a TIFF', () => {
  const colours = [[0, 0, 128], [128, 0, 128], [255, 0, 128]]; // prettier-ignore

  test('a fourth band that is no transparency, as near infrared, is left out; so are more', async () => {
    const infrared = tiff({ samples: 4, bits: 8, photometric: 2, extra: [0] }, (data, at, x, y) =>
      data.set([...ramp(x, y), 255 - ramp(x, y)[0]!], at),
    );
    expect(row(await decodeImage(infrared))).toEqual(colours);
    const five = tiff({ samples: 5, bits: 8, photometric: 2, extra: [0, 0] }, (data, at, x, y) => data.set([...ramp(x, y), 9, 9], at));
    expect(row(await decodeImage(five))).toEqual(colours);
  });

  test('a fourth band that is transparency is laid over white', async () => {
    const alpha = tiff({ samples: 4, bits: 8, photometric: 2, extra: [2] }, (data, at, x, y) =>
      data.set([...ramp(x, y), x < 48 ? 255 : 0], at),
    );
    expect(row(await decodeImage(alpha))).toEqual([colours[0], [255, 255, 255], [255, 255, 255]]);
  });

  test.each<[string, Tiff, RegExp]>([
    ['float grey', { samples: 1, bits: 32, photometric: 1, format: 3 }, /float samples of 32 bits/],
    ['float RGB', { samples: 3, bits: 32, photometric: 2, format: 3 }, /float samples of 32 bits/],
    ['signed', { samples: 1, bits: 16, photometric: 1, format: 2 }, /signed samples of 16 bits/],
    ['12 bits', { samples: 1, bits: 12, photometric: 1 }, /samples of 12 bits/],
    ['CIELAB', { samples: 3, bits: 8, photometric: 8 }, /CIELAB/],
    ['grey of four bands', { samples: 4, bits: 8, photometric: 1, extra: [0, 0, 0] }, /4 bands, 1 of them grey/],
  ])('%s is UNSUPPORTED, by what it is', async (_, layout, message) => {
    const path = join(dir, 'odd.tif');
    await writeFile(
      path,
      tiff(layout, (data, at) => void data.fill(1, at, at + 1)),
    );
    const error = await failure(decodeImage(path));
    expect(error.code).toBe('UNSUPPORTED');
    expect(error.message).toMatch(message);
    expect(error.subject).toBe(path);
  });
});

describe('BMP', () => {
  /** 24-bit BGR, bottom row first. */
  function bmp(width: number, height: number): Buffer {
    const stride = Math.ceil((3 * width) / 4) * 4;
    const bytes = Buffer.alloc(54 + stride * Math.abs(height), 200);
    bytes.fill(0, 0, 54);
    bytes.write('BM');
    bytes.writeUInt32LE(54, 10);
    bytes.writeUInt32LE(40, 14);
    bytes.writeInt32LE(width, 18);
    bytes.writeInt32LE(height, 22);
    bytes.writeUInt16LE(1, 26);
    bytes.writeUInt16LE(24, 28);
    return bytes;
  }

  test('half of one is damaged; more pixels than allowed are refused before they are decoded', async () => {
    const whole = bmp(10, 10);
    expect(await decodeImage(whole)).toMatchObject({ width: 10, height: 10 });
    expect((await failure(decodeImage(whole.subarray(0, 200)))).message).toMatch(/<buffer>: the image is damaged or incomplete/);
    expect((await failure(decodeImage(whole, { maxPixels: 99 }))).message).toMatch(/at most 99 pixels/);
  });

  test('rows from the top are as they are', async () => {
    const [up, down] = [bmp(2, 2), bmp(2, -2)];
    for (const bytes of [up, down]) bytes.set([1, 2, 3], 54); // the first stored row
    expect([...(await decodeImage(up)).data.subarray(6, 9)]).toEqual([3, 2, 1]);
    expect([...(await decodeImage(down)).data.subarray(0, 3)]).toEqual([3, 2, 1]);
  });
});
