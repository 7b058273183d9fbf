/**
 * JPEG files are decoded natively or, if they use rare features, by sharp, and the results must not differ. All tests compare pixels and
 * error messages with sharp alone.
 */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { constants } from 'node:fs';
import { chmod, mkdtemp, open, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import sharp, { type JpegOptions, type Sharp } from 'sharp';
import { UniFlowError } from '../lib/errors.js';
import { failure } from './support.js';
import { decodeImage, type DecodeOptions, type ImageSource, openImage, type RgbImage } from '../lib/images/decode.js';
import { native, type Resampling } from '../lib/native.js';
import { fixtures, photos } from './support.js';

let dir: string;
beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-jpeg-'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

// ---------------------------------------------------------------------------------------------------
// The reference
// ---------------------------------------------------------------------------------------------------

const FORMATS = 'a JPEG, PNG, WebP, AVIF, TIFF, GIF or BMP image';

/** decodeImage without the native decoder. */
async function bySharp(bytes: Uint8Array, maxPixels = 16383 * 16383, name = '<buffer>'): Promise<RgbImage> {
  const bad = (what: string) => new UniFlowError('BAD_INPUT', `${name}: ${what}`);
  const damaged = (error: unknown) => bad(`the image is damaged or incomplete: ${(error as Error).message.split('\n')[0]}`);
  if (bytes.length === 0) throw bad(`expected ${FORMATS}, but got 0 bytes`);
  const { width, height, space } = await sharp(bytes, { limitInputPixels: false })
    .metadata()
    .catch((error: Error) => {
      if (!error.message.includes('unsupported image format')) throw damaged(error);
      const start = JSON.stringify(Buffer.from(bytes.subarray(0, 16)).toString('latin1'));
      throw bad(`expected ${FORMATS}, but got ${bytes.length} bytes starting with ${start}`);
    });
  if (!(width * height <= maxPixels)) {
    const allowed = `at most ${maxPixels} pixels (raise the option maxPixels to allow more)`;
    throw bad(`expected ${allowed}, but got ${width * height} (${width} x ${height})`);
  }
  try {
    const { data, info } = await sharp(bytes, { failOn: 'error', limitInputPixels: false, ignoreIcc: space !== 'cmyk' })
      .autoOrient()
      .flatten({ background: '#ffffff' })
      .toColourspace('srgb')
      .raw({ depth: 'uchar' })
      .toBuffer({ resolveWithObject: true });
    return { data, width: info.width, height: info.height };
  } catch (error) {
    throw damaged(error);
  }
}

/** An image or an error as one line: equal lines mean equal outcomes. */
async function outcome(work: Promise<RgbImage>): Promise<string> {
  try {
    const { data, width, height } = await work;
    const hash = createHash('sha256').update(data).digest('hex').slice(0, 16);
    return `${width} x ${height}, ${data.length} bytes, ${hash}`;
  } catch (error) {
    return `${error instanceof UniFlowError ? error.code : String(error)} ${(error as Error).message}`;
  }
}

async function expectAsSharp(bytes: Uint8Array, options: DecodeOptions = {}): Promise<void> {
  expect(await outcome(decodeImage(bytes, options))).toBe(await outcome(bySharp(bytes, options.maxPixels)));
}

/** Compares many files, reporting the names of those that differ. */
async function expectAllAsSharp(files: Iterable<readonly [string, Uint8Array]>, options: DecodeOptions = {}): Promise<void> {
  const got: Record<string, string> = {};
  const want: Record<string, string> = {};
  for (const [name, bytes] of files) {
    const [a, b] = [await outcome(decodeImage(bytes, options)), await outcome(bySharp(bytes, options.maxPixels))];
    if (a !== b) [got[name], want[name]] = [a, b];
  }
  expect(got).toEqual(want);
}

/** Ensures that a comparison does not pass because sharp decodes both. */
async function expectNative(bytes: Uint8Array): Promise<void> {
  const opened = await native.openJpeg(bytes, 2 ** 30);
  expect(opened).toBeDefined();
  const { file, width, height } = opened!;
  expect(await native.decodeJpeg(file, Buffer.alloc(3 * width * height), undefined)).toBe(true);
}

// ---------------------------------------------------------------------------------------------------
// Files
// ---------------------------------------------------------------------------------------------------

const photoNames = (await readdir(photos)).filter((name) => name.endsWith('.jpg'));
const photo = join(photos, 'dogs.jpg');
const scaled = (width: number, height: number): Sharp => sharp(photo).resize(width, height, { fit: 'fill' });
const jpeg = (width: number, height: number, options: JpegOptions = {}): Promise<Buffer> => scaled(width, height).jpeg(options).toBuffer();
const fixture = (name: string): Promise<Buffer> => readFile(join(fixtures, 'jpeg', `${name}.jpg`));

const EOI_BYTES = 2;
const SOI = 0xd8;
const SOF0 = 0xc0;
const SOS = 0xda;
const APP0 = 0xe0;
const APP1 = 0xe1;
const APP14 = 0xee;

function segment(marker: number, body: Uint8Array): Buffer {
  const head = Buffer.from([0xff, marker, 0, 0]);
  head.writeUInt16BE(body.length + 2, 2);
  return Buffer.concat([head, body]);
}

/** Positions of the header's segments; the last is the first SOS. */
function segments(file: Buffer): { marker: number; at: number; end: number }[] {
  const found = [];
  for (let at = 2, marker = SOI; marker !== SOS;) {
    marker = file[at + 1]!;
    const end = at + 2 + file.readUInt16BE(at + 2);
    found.push({ marker, at, end });
    at = end;
  }
  return found;
}
const find = (file: Buffer, marker: number) => segments(file).find((s) => s.marker === marker)!;
const without = (file: Buffer, marker: number): Buffer => {
  const { at, end } = find(file, marker);
  return Buffer.concat([file.subarray(0, at), file.subarray(end)]);
};
const insertAt = (file: Buffer, at: number, ...bytes: Uint8Array[]): Buffer =>
  Buffer.concat([file.subarray(0, at), ...bytes, file.subarray(at)]);
const changed = (file: Buffer, change: (copy: Buffer) => void): Buffer => {
  const copy = Buffer.from(file);
  change(copy);
  return copy;
};

const ORIENTATION = 0x0112;
const SHORT = 3;
const LONG = 4;
type Order = 'II' | 'MM';
type Entry = [tag: number, type: number, count: number, value: number];
const orientation = (value: number): Entry => [ORIENTATION, SHORT, 1, value];

function tiff(order: Order, entries: Entry[], { directory = 8, count = entries.length, magic = 42 } = {}): Buffer {
  const out = Buffer.alloc(14 + 12 * entries.length);
  const u16 = (value: number, at: number) => (order === 'MM' ? out.writeUInt16BE(value, at) : out.writeUInt16LE(value, at));
  const u32 = (value: number, at: number) => (order === 'MM' ? out.writeUInt32BE(value, at) : out.writeUInt32LE(value, at));
  out.write(order, 'latin1');
  u16(magic, 2);
  u32(directory, 4);
  u16(count, 8);
  entries.forEach(([tag, type, n, value], i) => {
    const at = 10 + 12 * i;
    u16(tag, at);
    u16(type, at + 2);
    u32(n, at + 4);
    if (type === SHORT && n === 1) u16(value, at + 8);
    else u32(value, at + 8);
  });
  return out;
}
const exif = (body: Uint8Array, head = 'Exif\x00\x00'): Buffer => segment(APP1, Buffer.concat([Buffer.from(head, 'latin1'), body]));
const withExif = (file: Buffer, ...parts: Uint8Array[]): Buffer => insertAt(file, 2, ...parts);

/** A reproducible sequence of numbers from 0 to n - 1. */
function random(seed: number): (n: number) => number {
  let state = seed;
  return (n) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * n);
  };
}

// ---------------------------------------------------------------------------------------------------
// Tests
// ---------------------------------------------------------------------------------------------------

describe('what encoders write', () => {
  test.each(photoNames)('the photograph %s', async (name) => {
    const bytes = await readFile(join(photos, name));
    await expectNative(bytes);
    await expectAsSharp(bytes);
  });

  const encodings: [string, JpegOptions][] = [
    ['4:2:0', { chromaSubsampling: '4:2:0' }],
    ['4:4:4', { chromaSubsampling: '4:4:4' }],
    ['quality 100', { quality: 100, chromaSubsampling: '4:4:4' }],
    ['quality 1', { quality: 1 }],
    ['progressive', { progressive: true }],
    ['optimised', { optimiseCoding: true }],
    ['mozjpeg', { mozjpeg: true }],
  ];
  describe.each(encodings)('%s', (_name, options) => {
    test.each([
      [1, 1],
      [7, 17],
      [17, 7],
      [1025, 3],
      [33, 64],
    ])('%i x %i', async (width, height) => {
      for (const image of [scaled(width, height), scaled(width, height).greyscale()]) {
        const bytes = await image.jpeg(options).toBuffer();
        await expectNative(bytes);
        await expectAsSharp(bytes);
      }
    });
  });

  test.each([
    ...['311', '410', '411', '422', '422-progressive', '440', '441', 'blue-finer-than-red', 'chroma-finer', 'grey-2x2'],
    ...['rgb', 'restart', 'restart-progressive', 'coarse', 'planes', 'luma-then-chroma', 'grey-two-scans'],
  ])('%s', async (name) => {
    const bytes = await fixture(name);
    await expectNative(bytes);
    await expectAsSharp(bytes);
  });

  test.each(['only-dc', 'some-ac', 'no-refinement', 'arithmetic'])('%s', async (name) => expectAsSharp(await fixture(name)));

  test('RGB that only the names of its components tell', async () => {
    const bytes = changed(without(await fixture('rgb'), APP14), (copy) => {
      const sof = find(copy, SOF0).at;
      const sos = find(copy, SOS).at;
      Buffer.from('RGB').forEach((name, i) => {
        copy[sof + 10 + 3 * i] = name;
        copy[sos + 5 + 2 * i] = name;
      });
    });
    await expectNative(bytes);
    await expectAsSharp(bytes);
  });

  test.each([0, 1, 2, 3])('the color transform %i of an Adobe marker', async (transform) => {
    const adobe = Buffer.concat([Buffer.from('Adobe'), Buffer.from([0, 100, 0, 0, 0, 0, transform])]);
    const marker = segment(APP14, adobe);
    const jfif = segment(APP0, Buffer.from('JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00', 'latin1'));
    const [color, grey] = [await jpeg(20, 10), await scaled(20, 10).greyscale().jpeg().toBuffer()];
    await expectAllAsSharp([
      ['color', insertAt(color, 2, marker)],
      ['color, which JFIF says too', insertAt(color, 2, jfif, marker)],
      ['grey', insertAt(grey, 2, marker)],
    ]);
  });

  test('CMYK, by its profile or without', async () => {
    const cmyk = scaled(30, 20).toColourspace('cmyk');
    await expectAsSharp(await cmyk.jpeg().toBuffer());
    await expectAsSharp(await cmyk.keepIccProfile().jpeg().toBuffer());
  });

  test('12 bits are UNSUPPORTED, which is not damaged; 16 are none of JPEG', async () => {
    const plain = await jpeg(20, 10);
    const of = (bits: number): Buffer => changed(plain, (copy) => (copy[find(copy, SOF0).at + 4] = bits));
    expect(await failure(decodeImage(of(12)))).toMatchObject({
      code: 'UNSUPPORTED',
      message: '<buffer>: expected a JPEG of 8 bits, but got 12 bits',
    });
    await expectAsSharp(of(16));
  });

  test.each(['p3', 'srgb'])('an embedded profile %s', async (profile) => {
    const bytes = await scaled(30, 20).withIccProfile(profile).jpeg().toBuffer();
    await expectNative(bytes);
    await expectAsSharp(bytes);
  });

  test('a gain map for bright displays', async () => {
    // Missing in sharp's types
    const bytes = await (scaled(40, 30) as Sharp & { withGainMap(): Sharp }).withGainMap().jpeg().toBuffer();
    expect((await sharp(bytes).metadata()).gainMap).toBeDefined();
    await expectAsSharp(bytes);
    await expectAsSharp(bytes.subarray(0, bytes.length - 100));
  });

  test('a hundred scans, and more', async () => {
    const file = await fixture('grey-two-scans');
    const last = file.subarray(file.lastIndexOf(Buffer.from([0xff, SOS])), file.length - EOI_BYTES);
    const repeated = (n: number) => insertAt(file, file.length - EOI_BYTES, ...Array<Buffer>(n).fill(last));
    await expectAllAsSharp([97, 98, 99, 300].map((n) => [`${n + 2} scans`, repeated(n)] as const));
  });
});

describe('EXIF', () => {
  describe.each(['II', 'MM'] as const)('%s', (order) => {
    test.each([1, 2, 3, 4, 5, 6, 7, 8])('orientation %i', async (value) => {
      for (const [width, height] of [
        [37, 23],
        [8, 5],
        [1, 9],
      ] as const) {
        for (const file of [await jpeg(width, height), await scaled(width, height).greyscale().jpeg({ progressive: true }).toBuffer()]) {
          const bytes = withExif(file, exif(tiff(order, [orientation(value)])));
          await expectNative(bytes);
          await expectAsSharp(bytes);
        }
      }
    });
  });

  const right = orientation(6);
  const turned = exif(tiff('II', [right]));
  const cases: [string, ...Uint8Array[]][] = [
    ['no entries', exif(tiff('II', []))],
    ['other entries around it', exif(tiff('MM', [[0x010f, 2, 4, 0x61620000], right, [0x0131, 2, 4, 0x61620000]]))],
    ['value 0', exif(tiff('II', [orientation(0)]))],
    ['value 9', exif(tiff('II', [orientation(9)]))],
    ['type LONG', exif(tiff('II', [[ORIENTATION, LONG, 1, 6]]))],
    ['type BYTE', exif(tiff('II', [[ORIENTATION, 1, 1, 6]]))],
    ['no type', exif(tiff('II', [[ORIENTATION, 0, 1, 6]]))],
    ['count 0', exif(tiff('II', [[ORIENTATION, SHORT, 0, 6]]))],
    ['count 2', exif(tiff('II', [[ORIENTATION, SHORT, 2, 0x00060006]]))],
    ['more in the value field than the value', exif(tiff('II', [[ORIENTATION, SHORT, 1, 6]]).fill(1, 20, 22))],
    ['twice, 6 and 3', exif(tiff('II', [right, orientation(3)]))],
    ['twice, 6 and 1', exif(tiff('II', [right, orientation(1)]))],
    ['twice, 1 and 6', exif(tiff('II', [orientation(1), right]))],
    ['twice, 9 and 6', exif(tiff('II', [orientation(9), right]))],
    ['a directory beyond the end', exif(tiff('II', [right], { directory: 4000 }))],
    ['a directory at the end', exif(tiff('II', [right], { directory: 26 }))],
    ['a directory in the header', exif(tiff('II', [right], { directory: 0 }))],
    ['more entries said than there are', exif(tiff('II', [right], { count: 9 }))],
    ['fewer entries said than there are', exif(tiff('II', [[0x0100, SHORT, 1, 5], right], { count: 1 }))],
    ['another directory beyond the end, before it', exif(tiff('II', [[0x8769, LONG, 1, 4000], right]))],
    ['another directory that is this one', exif(tiff('II', [[0x8769, LONG, 1, 8], right]))],
    ['a thumbnail beyond the end, before it', exif(tiff('II', [[0x0201, LONG, 1, 4000], [0x0202, LONG, 1, 4000], right]))],
    ['another magic number', exif(tiff('II', [right], { magic: 43 }))],
    ['another byte order', exif(changed(tiff('II', [right]), (copy) => (copy[0] = 0x4d)))],
    ['a header and no more', exif(tiff('II', []).subarray(0, 8))],
    ['nothing', exif(Buffer.alloc(0))],
    ['cut after its entries', exif(tiff('II', [right]).subarray(0, 22))],
    ['cut in its entries', exif(tiff('II', [right]).subarray(0, 21))],
    ['no zero after the name', exif(tiff('II', [right]), 'ExifX\x00')],
    ['a padding byte that is not zero', exif(tiff('II', [right]), 'Exif\x00\x01')],
    ['a name in small letters', exif(tiff('II', [right]), 'exif\x00\x00')],
    ['two segments', turned, exif(tiff('II', [orientation(3)]))],
    ['two segments, the first empty', exif(Buffer.alloc(0)), turned],
    ['two segments, the first only a part of the name', segment(APP1, Buffer.from('Exif\0')), turned],
    ['two segments, the second only a part of the name', turned, segment(APP1, Buffer.from('Exif\0'))],
    ['two segments, the first shorter than the name', segment(APP1, Buffer.from('Exi')), turned],
    ['beside XMP that says otherwise', turned, segment(APP1, Buffer.from('http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="3"/>'))],
    ['in another segment', changed(turned, (copy) => (copy[1] = 0xe3))],
  ];
  test.each(cases)('%s', async (_name, ...parts) => expectAsSharp(withExif(await jpeg(13, 6), ...parts)));
});

describe('damage', () => {
  test.each(['baseline', 'progressive'])('cut short at 40 places, %s', async (kind) => {
    const bytes = withExif(await jpeg(33, 64, { progressive: kind === 'progressive' }), exif(tiff('MM', [orientation(8)])));
    const places = Array.from({ length: 38 }, (_, i) => Math.floor((i * bytes.length) / 38));
    await expectAllAsSharp(
      [...places, bytes.length - 2, bytes.length - 1].map((at) => [`${at} of ${bytes.length}`, bytes.subarray(0, at)] as const),
    );
  });

  test('300 files with random changes', async () => {
    const next = random(20);
    const turned = withExif(await jpeg(40, 30), exif(tiff('II', [orientation(5)])));
    const files = [turned, await jpeg(40, 30, { progressive: true }), await fixture('restart'), await fixture('422'), await fixture('rgb')];
    const damaged = Array.from({ length: 300 }, (_, i): [string, Buffer] => {
      const file = files[i % files.length]!;
      const header = find(file, SOS).end;
      const copy = Buffer.from(file);
      const where: number[] = [];
      for (let n = 1 + next(3); n > 0; --n) {
        const at = next(2) ? next(header) : header + next(file.length - header);
        copy[at] = next(2) ? next(256) : copy[at]! ^ (1 << next(8));
        where.push(at);
      }
      return [`file ${i}, changed at ${where.join(', ')}`, copy];
    });
    // The size fields are damaged too: limits the memory for them
    await expectAllAsSharp(damaged, { maxPixels: 1e6 });
  });

  test('bytes after the end', async () => {
    const bytes = await jpeg(20, 10);
    await expectAllAsSharp([
      ['text', Buffer.concat([bytes, Buffer.from('trailer')])],
      ['zeros', Buffer.concat([bytes, Buffer.alloc(1000)])],
      ['an image', Buffer.concat([bytes, await jpeg(7, 7)])],
      ['another end', Buffer.concat([bytes, bytes.subarray(-EOI_BYTES)])],
    ]);
  });

  test('bytes between the segments', async () => {
    const bytes = await jpeg(20, 10);
    const places = [2, ...segments(bytes).map(({ at }) => at), bytes.length - EOI_BYTES];
    await expectAllAsSharp(
      places.flatMap((at) => [
        [`text at ${at}`, insertAt(bytes, at, Buffer.from('junk'))] as const,
        [`fill at ${at}`, insertAt(bytes, at, Buffer.from([0xff, 0xff, 0xff]))] as const,
      ]),
    );
  });

  test('an empty header, and what only begins like a JPEG', async () => {
    await expectAllAsSharp([
      ['nothing', Buffer.alloc(0)],
      ['one byte', Buffer.from([0xff])],
      ['SOI', Buffer.from([0xff, SOI])],
      ['SOI and 0xff', Buffer.from([0xff, SOI, 0xff])],
      ['SOI, EOI', Buffer.from([0xff, SOI, 0xff, 0xd9])],
      ['SOI, zeros', Buffer.concat([Buffer.from([0xff, SOI]), Buffer.alloc(500)])],
      ['SOI, text', Buffer.from('\xff\xd8hello world, this is no image', 'latin1')],
    ]);
  });
});

describe('headers', () => {
  test('every kind of frame', async () => {
    const bytes = await jpeg(20, 10);
    const kinds = Array.from({ length: 16 }, (_, i) => SOF0 + i);
    await expectAllAsSharp(
      kinds.map((kind) => [kind.toString(16), changed(bytes, (copy) => (copy[find(copy, SOF0).at + 1] = kind))] as const),
    );
  });

  test('a size that is not that of the data', async () => {
    const bytes = await jpeg(20, 10);
    const sizes = [
      [0, 10],
      [20, 0],
      [20, 9],
      [19, 10],
      [20, 20],
      [40, 10],
      [65500, 1],
      [65501, 1],
    ];
    const sized = (width: number, height: number) =>
      changed(bytes, (copy) => {
        copy.writeUInt16BE(height, find(copy, SOF0).at + 5);
        copy.writeUInt16BE(width, find(copy, SOF0).at + 7);
      });
    await expectAllAsSharp(sizes.map(([width, height]) => [`${width} x ${height}`, sized(width!, height!)] as const));
  });

  test('segments that say nothing of the pixels, and nonsense in them', async () => {
    const bytes = await jpeg(20, 10);
    const bodies: [string, number, string][] = [
      ['comment', 0xfe, 'hello'],
      ['empty comment', 0xfe, ''],
      ['profile', 0xe2, 'ICC_PROFILE\0\x01\x01garbage'],
      ['part of a profile', 0xe2, 'ICC_PROFILE\0\x05\x02garbage'],
      ['IPTC', 0xed, 'Photoshop 3.0\0garbage'],
      ['JFIF of a later version', APP0, 'JFIF\0\x09\x01\0\0\x01\0\x01\0\0'],
      ['JFIF with a thumbnail that is not there', APP0, 'JFIF\0\x01\x01\0\0\x01\0\x01\x05\x05'],
      ['part of an Adobe marker', APP14, 'Adobe'],
      ['no restarts', 0xdd, '\0\0'],
      ['number of lines', 0xdc, '\0\x0a'],
      ['a marker that is none', 0xf8, '\0\0\0\0'],
    ];
    await expectAllAsSharp([
      ...bodies.map(([name, marker, body]) => [name, insertAt(bytes, 2, segment(marker, Buffer.from(body, 'latin1')))] as const),
      ['a restart', insertAt(bytes, 2, Buffer.from([0xff, 0xd0]))],
      ['another start', insertAt(bytes, 2, Buffer.from([0xff, SOI]))],
    ]);
  });
});

describe('maxPixels', () => {
  test.each([199, 200, 201, 0, -1, Infinity, NaN])('%d', async (maxPixels) => {
    await expectAsSharp(await jpeg(20, 10), { maxPixels });
    await expectAsSharp(withExif(await jpeg(20, 10), exif(tiff('II', [orientation(6)]))), { maxPixels });
  });

  test('more pixels said than an array can hold, and allowed', async () => {
    const vast = changed(await jpeg(8, 8), (copy) => {
      copy.writeUInt16BE(65000, find(copy, SOF0).at + 5);
      copy.writeUInt16BE(65000, find(copy, SOF0).at + 7);
    });
    const cut = vast.subarray(0, find(vast, SOS).end); // without data, so that neither decoder starts on the pixels
    await expectAsSharp(vast);
    await expectAsSharp(cut, { maxPixels: Infinity });
  });
});

describe('sources', () => {
  test('a path, a URL, a Buffer, a part of an array and shared memory give the same', async () => {
    const bytes = withExif(await jpeg(33, 64), exif(tiff('MM', [orientation(7)])));
    const path = join(dir, 'ein Bild, 写真 é.jpg');
    await writeFile(path, bytes);
    const part = new Uint8Array(bytes.length + 8).subarray(3, 3 + bytes.length);
    part.set(bytes);
    const shared = new Uint8Array(new SharedArrayBuffer(bytes.length));
    shared.set(bytes);
    const want = await outcome(bySharp(bytes));
    const sources: ImageSource[] = [path, pathToFileURL(path), pathToFileURL(path).href, bytes, new Uint8Array(bytes), part, shared];
    expect(await Promise.all(sources.map((source) => outcome(decodeImage(source))))).toEqual(sources.map(() => want));
  });

  test('a file is as its bytes', async () => {
    const whole = await jpeg(20, 10);
    const path = join(dir, 'one.jpg');
    const files = [
      whole,
      whole.subarray(0, 500),
      whole.subarray(0, 100),
      Buffer.alloc(0),
      whole.subarray(0, 2),
      await fixture('arithmetic'),
    ];
    for (const bytes of files) {
      await writeFile(path, bytes);
      expect(await outcome(decodeImage(path))).toBe(await outcome(bySharp(bytes, undefined, path)));
    }
  });

  test('bytes are left as they were', async () => {
    const bytes = await jpeg(20, 10);
    const before = Buffer.from(bytes);
    await decodeImage(bytes);
    expect(bytes.equals(before)).toBe(true);
  });

  test('a missing file, and a directory', async () => {
    const path = join(dir, 'nowhere.jpg');
    expect(await outcome(decodeImage(path))).toBe(`NOT_FOUND ${path}: expected a file, but got no such file`);
    expect(await outcome(decodeImage(dir))).toBe(`BAD_INPUT ${dir}: expected a file, but got a directory`);
    expect(await outcome(decodeImage(''))).toBe('NOT_FOUND : expected a file, but got no such file');
  });

  const asRoot = process.getuid?.() === 0; // root may read everything
  (asRoot ? test.skip : test)('a file that may not be read', async () => {
    const path = join(dir, 'locked.jpg');
    await writeFile(path, await jpeg(20, 10));
    await chmod(path, 0);
    expect(await outcome(decodeImage(path))).toMatch(/^BAD_INPUT .*locked\.jpg: cannot be read: EACCES/);
  });

  test('a path with a zero in it is no path', async () => {
    const path = join(dir, 'zero.jpg');
    await writeFile(path, await jpeg(20, 10));
    expect(await outcome(decodeImage(`${path}\0.png`))).toMatch(/^BAD_INPUT .*: cannot be read: .*null bytes/);
  });

  /** Writes all bytes to the pipe at once when a reader opens it, like `program > pipe`. */
  async function feed(pipe: string, bytes: Uint8Array): Promise<{ exited: Promise<unknown> }> {
    const from = join(dir, 'fed.jpg');
    await writeFile(from, bytes);
    const script = `const fs = require('fs'); const bytes = fs.readFileSync(process.argv[1]); process.stdout.write('ready');
      fs.writeFileSync(process.argv[2], bytes)`;
    const writer = spawn(process.execPath, ['-e', script, from, pipe], { stdio: ['ignore', 'pipe', 'ignore'] });
    const exited = new Promise((resolve) => writer.on('exit', resolve));
    await new Promise((resolve) => writer.stdout.once('data', resolve));
    await new Promise((resolve) => setTimeout(resolve, 50)); // time for the writer to block on opening the pipe
    return { exited };
  }

  // Repeated five times, because losing bytes would be a race between the processes.
  test.each([1, 2, 3, 4, 5])('a named pipe, time %i', async (time) => {
    const bytes = await jpeg(20, 10);
    const pipe = join(dir, `pipe-${time}`);
    execFileSync('mkfifo', [pipe]);
    const { exited } = await feed(pipe, bytes);
    let done = false;
    const got = outcome(decodeImage(pipe)).finally(() => (done = true));
    // If the writer's bytes were lost, the reader would wait forever: send it an end of file.
    await exited;
    for (let i = 0; !done; ++i) {
      await new Promise((resolve) => setTimeout(resolve, 20));
      const end = i < 25 ? undefined : await open(pipe, constants.O_WRONLY | constants.O_NONBLOCK).catch(() => undefined);
      await end?.close();
    }
    expect(await got).toBe(await outcome(bySharp(bytes)));
  });
});

describe('an aborted signal', () => {
  test('before', async () => {
    const signal = AbortSignal.abort();
    for (const source of [await jpeg(20, 10), photo, join(dir, 'nowhere.jpg')]) {
      await expect(decodeImage(source, { signal })).rejects.toMatchObject({ code: 'ABORTED' });
      await expect(openImage(source, { signal })).rejects.toMatchObject({ code: 'ABORTED' });
    }
  });

  test('while it is read or decoded', async () => {
    for (const source of [await readFile(photo), photo]) {
      const controller = new AbortController();
      const pending = outcome(decodeImage(source, { signal: controller.signal }));
      controller.abort();
      expect(await pending).toMatch(/^ABORTED /);
    }
  });

  test('between opening and resampling', async () => {
    const controller = new AbortController();
    const image = await openImage(photo, { signal: controller.signal });
    controller.abort();
    const work = image.resample(Buffer.alloc(48), { width: 4, height: 4, mode: 'cover', edge: 0, filter: 'bicubic' });
    await expect(work).rejects.toMatchObject({ code: 'ABORTED' });
  });
});

test('fifty at once give what each gives alone', async () => {
  const kinds: ImageSource[] = [
    photo,
    await readFile(photo),
    await jpeg(33, 64, { progressive: true }),
    (await jpeg(33, 64)).subarray(0, 800),
    await fixture('arithmetic'),
  ];
  // libvips has one error buffer per process: if several decodes fail at once, a message may become "Unknown error".
  const line = async (source: ImageSource) => (await outcome(decodeImage(source))).replace(/(damaged or incomplete: ).*/, '$1');
  const alone: string[] = [];
  for (const source of kinds) alone.push(await line(source));
  const all = await Promise.all(Array.from({ length: 50 }, (_, i) => line(kinds[i % 5]!)));
  expect(all).toEqual(all.map((_, i) => alone[i % 5]));
});

describe('openImage', () => {
  const targets: Resampling[] = [
    { width: 24, height: 24, mode: 'cover', edge: 0, filter: 'bicubic' },
    { width: 16, height: 12, mode: 'shortest_edge', edge: 20, filter: 'bilinear' },
    { width: 9, height: 31, mode: 'stretch', edge: 0, filter: 'lanczos' },
  ];
  const resampled = ({ width, height }: Resampling, work: (into: Buffer) => Promise<void>): Promise<string> => {
    const data = Buffer.alloc(3 * width * height);
    return outcome(work(data).then(() => ({ data, width, height })));
  };
  const viaOpen = (source: ImageSource, to: Resampling, options?: DecodeOptions) =>
    resampled(to, async (into) => (await openImage(source, options)).resample(into, to));
  const viaSharp = (bytes: Uint8Array, to: Resampling, maxPixels?: number) =>
    resampled(to, async (into) => {
      const { data, width, height } = await bySharp(bytes, maxPixels);
      await native.resample(data, width, height, into, to);
    });

  test.each(targets)('resamples by $mode', async (to) => {
    const files: Record<string, Buffer> = {
      photo: await readFile(photo),
      turned: withExif(await jpeg(37, 53), exif(tiff('MM', [orientation(6)]))),
      progressive: await jpeg(37, 53, { progressive: true }),
      declined: await fixture('arithmetic'),
      'only-dc': await fixture('only-dc'),
      cut: (await jpeg(37, 53)).subarray(0, 900),
      headless: (await jpeg(37, 53)).subarray(0, 300),
      'not a JPEG': await scaled(37, 53).png().toBuffer(),
    };
    const got: Record<string, string> = {};
    const want: Record<string, string> = {};
    for (const [name, bytes] of Object.entries(files)) {
      got[name] = await viaOpen(bytes, to);
      want[name] = await viaSharp(bytes, to);
    }
    expect(got).toEqual(want);
  });

  test('says the size of the upright image', async () => {
    const bytes = withExif(await jpeg(37, 53), exif(tiff('II', [orientation(8)])));
    expect(await openImage(bytes)).toMatchObject({ width: 53, height: 37 });
  });

  test('of a path, as of its bytes, and twice', async () => {
    const image = await openImage(photo);
    const want = await Promise.all(targets.map(async (to) => viaSharp(await readFile(photo), to)));
    const got: string[] = [];
    for (const to of targets) got.push(await resampled(to, (into) => image.resample(into, to)));
    expect(got).toEqual(want);
  });

  test('maxPixels', async () => {
    const bytes = await jpeg(37, 53);
    for (const maxPixels of [37 * 53, 37 * 53 - 1])
      expect(await viaOpen(bytes, targets[0]!, { maxPixels })).toBe(await viaSharp(bytes, targets[0]!, maxPixels));
  });

  test('a target that makes no sense is its own error, not the file’s', async () => {
    const bytes = await jpeg(37, 53);
    const bad: Resampling = { width: 30, height: 30, mode: 'shortest_edge', edge: 20, filter: 'box' };
    expect(await viaOpen(bytes, bad)).toMatch(/^BAD_INPUT /);
    expect(await viaOpen(bytes, bad)).toBe(await viaSharp(bytes, bad));
  });
});
