/** Invalid input of every kind causes an error that names the subject and the expected value; never a crash, a hang, or a wrong result. */
import { afterAll, beforeAll, describe, expect, jest, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { cp, mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { crc32, deflateSync } from 'node:zlib';
import { memoryStats, setThreads, UniFlow, UniFlowError, VisionEncoder, type ErrorCode } from '../lib/index.js';
import { Compiled } from './fixtures/child.js';
import { golden } from './support.js';

jest.setTimeout(120_000); // for busy machines

let dir: string;
let uniflow: UniFlow;
let encoder: VisionEncoder;
beforeAll(async () => {
  setThreads(1);
  dir = await mkdtemp(join(tmpdir(), 'uniflow-bad-'));
  uniflow = await UniFlow.load(golden('uniflow-tiny'));
  encoder = await VisionEncoder.load(golden('dinov2'));
});
afterAll(async () => {
  await uniflow.dispose();
  await encoder.dispose();
  await rm(dir, { recursive: true, force: true });
});

/** Expects a UniFlowError with `code` whose message contains `about`. */
async function refused(work: () => unknown, code: ErrorCode, about: string | RegExp): Promise<UniFlowError> {
  let error: unknown;
  try {
    await work();
  } catch (reason) {
    error = reason;
  }
  expect(error).toBeInstanceOf(UniFlowError);
  expect(error).toMatchObject({ code });
  expect((error as UniFlowError).message).toMatch(about);
  return error as UniFlowError;
}

const pixels = (...shape: number[]): { pixels: NdArray<Float32Array> } => ({
  pixels: random(...(shape.length > 0 ? shape : [1, 3, 56, 56])),
});
const latents = (...shape: number[]): NdArray<Float32Array> => random(...(shape.length > 0 ? shape : [1, 16, 16]));
function random(...shape: number[]): NdArray<Float32Array> {
  const size = shape.reduce((a, b) => a * b, 1);
  return ndarray(
    Float32Array.from({ length: size }, (_, i) => Math.sin(i * i)),
    shape,
  );
}

// ----- checkpoints ----------------------------------------------------------------------------------------------

type Header = Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>;
interface Weights {
  header: Header;
  data: Buffer;
}

function parse(file: Buffer): Weights {
  const end = 8 + Number(file.readBigUInt64LE());
  return { header: JSON.parse(file.toString('utf8', 8, end)) as Header, data: file.subarray(end) };
}

function serialize({ header, data }: Weights): Buffer {
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  return Buffer.concat([length, json, data]);
}

let folders = 0;

/** A copy of uniflow-tiny with changed weights, config.json or files; null removes a file. */
async function checkpoint(change: {
  weights?: (file: Buffer) => Buffer;
  config?: (json: Record<string, unknown>) => unknown;
  files?: Record<string, string | Buffer | null>;
}): Promise<string> {
  const folder = join(dir, `checkpoint-${folders++}`);
  await mkdir(folder);
  const [config, weights] = ['config.json', 'model.safetensors'];
  const json = JSON.parse(await readFile(join(golden('uniflow-tiny'), config), 'utf8')) as Record<string, unknown>;
  await writeFile(join(folder, config), JSON.stringify(change.config ? change.config(json) : json));
  const file = await readFile(join(golden('uniflow-tiny'), weights));
  await writeFile(join(folder, weights), change.weights ? change.weights(file) : file);
  for (const [name, content] of Object.entries(change.files ?? {})) {
    if (content === null) await rm(join(folder, name));
    else await writeFile(join(folder, name), content);
  }
  return folder;
}

/** Edits the header of the weights. */
const said =
  (change: (header: Header) => void) =>
  (file: Buffer): Buffer => {
    const { header, data } = parse(file);
    change(header);
    return serialize({ header, data });
  };

const qkv = 'encoder.layers.0.attn.qkv.weight';

describe('weights', () => {
  test.each<[string, (file: Buffer) => Buffer, string | RegExp]>([
    ['an empty file', () => Buffer.alloc(0), /model\.safetensors.*at least 8 bytes/],
    ['another file', () => Buffer.from('PK\x03\x04 not a checkpoint at all'), /model\.safetensors.*header/],
    ['a file cut in the data', (file) => file.subarray(0, file.length - 1000), /model\.safetensors/],
    ['a file cut in the header', (file) => file.subarray(0, 100), /model\.safetensors.*header length/],
    ['a file with bytes behind the last tensor', (file) => Buffer.concat([file, Buffer.alloc(8)]), /model\.safetensors/],
    ['a header longer than the file', (file) => Buffer.concat([Buffer.from('ffffffffffffff7f', 'hex'), file.subarray(8)]), /header length/],
    ['a header of no bytes', (file) => Buffer.concat([Buffer.alloc(8), file.subarray(8)]), /header/],
    ['a header that is no JSON', (file) => (file.fill('{', 8, 40), file), /JSON/],
    [
      'a header nested without end',
      () => Buffer.concat([Buffer.from([64, 0, 1, 0, 0, 0, 0, 0]), Buffer.alloc(65600, '{"a":')]),
      /model\.safetensors/,
    ],
    ['a tensor outside the data', said((h) => (h[qkv]!.data_offsets = [1e12, 1e12 + 49152])), qkv],
    ['offsets in the wrong order', said((h) => h[qkv]!.data_offsets.reverse()), qkv],
    ['two tensors in one place', said((h) => (h[qkv]!.data_offsets = h['encoder.layers.1.attn.qkv.weight']!.data_offsets)), /overlap|hole/],
    ['a negative dimension', said((h) => (h[qkv]!.shape = [-192, -64])), qkv],
    ['a shape whose size overflows', said((h) => (h[qkv]!.shape = [2 ** 40, 2 ** 40])), qkv],
    ['a shape larger than its data', said((h) => (h[qkv]!.shape = [193, 64])), qkv],
    ['an unknown element type', said((h) => (h[qkv]!.dtype = 'F33')), /F33/],
    ['weights of integers', said((h) => (h[qkv]!.dtype = 'I32')), new RegExp(`${qkv}.*I32`)],
    ['the transposed shape', said((h) => (h[qkv]!.shape = [64, 192])), new RegExp(`${qkv}.*\\[192, 64\\].*\\[64, 192\\]`)],
    ['another rank', said((h) => (h[qkv]!.shape = [192 * 64])), new RegExp(`${qkv}.*\\[12288\\]`)],
  ])('%s', async (_, weights, about) => {
    await refused(async () => UniFlow.load(await checkpoint({ weights })), 'BAD_CHECKPOINT', about);
  });

  test('every tensor that is missing, unexpected or misshapen is named at once', async () => {
    const folder = await checkpoint({
      weights: said((h) => {
        h['first.stranger'] = h[qkv]!;
        delete h[qkv];
        h['second.stranger'] = h['chal_proj.c_fc.bias']!;
        delete h['chal_proj.c_fc.bias'];
        h['encoder.layers.2.ls1']!.shape = [1, 64];
      }),
    });
    const { message } = await refused(() => UniFlow.load(folder), 'BAD_CHECKPOINT', folder);
    expect(message).toMatch(`${qkv}: missing`);
    expect(message).toMatch('chal_proj.c_fc.bias: missing');
    expect(message).toMatch('first.stranger: unexpected');
    expect(message).toMatch('second.stranger: unexpected');
    expect(message).toMatch('encoder.layers.2.ls1: expected shape [64], but got [1, 64]');
  });

  test('a refused checkpoint leaves nothing in memory', async () => {
    const folder = await checkpoint({ config: (json) => ({ ...json, num_hidden_layers: 4 }) });
    const before = memoryStats();
    await refused(() => UniFlow.load(folder), 'BAD_CHECKPOINT', 'missing');
    expect(memoryStats().host.active).toBe(before.host.active);
  });

  const index = (weight_map: unknown): Record<string, string | null> => ({
    'model.safetensors': null,
    'model.safetensors.index.json': JSON.stringify({ metadata: {}, weight_map }),
  });
  test.each<[string, Record<string, string | Buffer | null>, string | RegExp]>([
    ['no weights', { 'model.safetensors': null }, 'model.safetensors'],
    ['an index that names absent files', index({ [qkv]: 'model-00001-of-00002.safetensors' }), 'model-00001-of-00002.safetensors'],
    ['an index that names files elsewhere', index({ [qkv]: '../uniflow.safetensors' }), /weight_map.*\.\.\/uniflow/],
    ['an index with an absolute path', index({ [qkv]: '/etc/hostname' }), /weight_map.*hostname/],
    ['an index that names its own folder', index({ [qkv]: '..' }), /\.\.|folder/],
    ['an index of numbers', index({ [qkv]: 7 }), /weight_map.*7/],
    ['an index without its map', index(undefined), 'weight_map'],
    ['an index whose map is a list', index(['model.safetensors']), 'weight_map'],
    ['an index that is no JSON', { 'model.safetensors': null, 'model.safetensors.index.json': '{"weight_map": ' }, 'index.json'],
    ['an index that is a list', { 'model.safetensors': null, 'model.safetensors.index.json': '[]' }, 'index.json'],
  ])('%s', async (_, files, about) => {
    await refused(async () => UniFlow.load(await checkpoint({ files })), 'BAD_CHECKPOINT', about);
  });

  test('a folder in place of the weights', async () => {
    const folder = await checkpoint({ files: { 'model.safetensors': null } });
    await mkdir(join(folder, 'model.safetensors'));
    await refused(() => UniFlow.load(folder), 'BAD_CHECKPOINT', /model\.safetensors.*folder/);
  });

  test('a link to nowhere in place of the weights', async () => {
    const folder = await checkpoint({ files: { 'model.safetensors': null } });
    await symlink(join(folder, 'nowhere'), join(folder, 'model.safetensors'));
    await refused(() => UniFlow.load(folder), 'BAD_CHECKPOINT', 'model.safetensors');
  });

  test('one tensor in two shards', async () => {
    const weights = await readFile(join(golden('uniflow-tiny'), 'model.safetensors'));
    const folder = await checkpoint({
      files: { ...index({ a: 'a.safetensors', b: 'b.safetensors' }), 'a.safetensors': weights, 'b.safetensors': weights },
    });
    await refused(() => UniFlow.load(folder), 'BAD_CHECKPOINT', 'several files');
  });
});

describe('config.json', () => {
  test.each<[string, Record<string, string | null>, string]>([
    ['missing', { 'config.json': null }, 'config.json'],
    ['empty', { 'config.json': '' }, 'config.json'],
    ['not JSON', { 'config.json': '{"model_type": "uniflow",' }, 'config.json'],
    ['a list', { 'config.json': '[]' }, 'config.json'],
    ['null', { 'config.json': 'null' }, 'config.json'],
  ])('%s', async (_, files, about) => {
    await refused(async () => UniFlow.load(await checkpoint({ files })), 'BAD_CHECKPOINT', about);
  });

  test.each<[string, Record<string, unknown>, string, ErrorCode?]>([
    ['of another model', { model_type: 'bert' }, "'bert'", 'UNSUPPORTED'],
    ['without a model type', { model_type: undefined }, 'model_type', 'UNSUPPORTED'],
    ['an unknown field', { rope_scaling: 2 }, 'rope_scaling'],
    ['a field named as an object has methods', { toString: 1, constructor: 2 }, 'toString'],
    ['a negative size', { hidden_size: -64 }, 'hidden_size'],
    ['a fractional size', { num_hidden_layers: 2.5 }, 'num_hidden_layers'],
    ['no layers', { num_hidden_layers: 0 }, 'num_hidden_layers'],
    ['no heads', { num_attention_heads: 0 }, 'num_attention_heads'],
    ['no latent channels', { latent_ch: 0 }, 'latent_ch'],
    ['a number as a string', { hidden_size: '64' }, 'hidden_size'],
    ['a flag as a string', { qkv_bias: 'true' }, 'qkv_bias'],
    ['a field missing', { hidden_size: undefined }, 'hidden_size'],
    ['an image smaller than a patch', { image_size: 13 }, 'image_size'],
    ['heads that do not divide the width', { num_attention_heads: 5 }, 'num_attention_heads'],
    ['no Euler steps', { num_sampling_steps: '0' }, 'num_sampling_steps'],
    ['steps in words', { num_sampling_steps: 'four' }, 'num_sampling_steps'],
    ['two widths that differ', { vit_hidden_size: 128 }, 'vit_hidden_size'],
    ['four channels', { num_channels: 4 }, 'num_channels'],
    ['another activation', { hidden_act: 'relu6' }, 'hidden_act'],
    ['another decoder', { decoder_type: 'unet' }, 'decoder_type'],
    ['a vision_config that is none', { vision_config: 7 }, 'vision_config'],
    ['more layers than there are', { num_hidden_layers: 4 }, 'encoder.layers.3.norm1.weight: missing'],
    ['fewer layers than there are', { num_hidden_layers: 2 }, 'encoder.layers.2.norm1.weight: unexpected'],
    ['another width', { hidden_size: 128, vit_hidden_size: 128 }, 'encoder.layers.0.norm1.weight: expected shape [128], but got [64]'],
  ])('%s', async (_, fields, about, code = 'BAD_CHECKPOINT') => {
    const config = (json: Record<string, unknown>): unknown => ({ ...json, ...fields });
    await refused(async () => UniFlow.load(await checkpoint({ config })), code, about);
  });

  test('every problem is named at once', async () => {
    const config = (json: Record<string, unknown>): unknown => ({ ...json, hidden_size: 0, patch_size: 'x', surprise: true });
    const { message } = await refused(async () => UniFlow.load(await checkpoint({ config })), 'BAD_CHECKPOINT', 'hidden_size');
    expect(message).toMatch('patch_size');
    expect(message).toMatch('surprise');
  });

  test('an encoder that is none', async () => {
    await refused(() => VisionEncoder.load(golden('uniflow-tiny')), 'UNSUPPORTED', 'uniflow');
    await refused(() => UniFlow.load(golden('dinov2')), 'UNSUPPORTED', 'dinov2');
  });

  test('a preprocessor_config.json that is wrong', async () => {
    const folder = join(dir, 'preprocessor');
    await cp(golden('dinov2'), folder, { recursive: true });
    for (const [json, code, about] of [
      ['{', 'BAD_CHECKPOINT', 'preprocessor_config.json'],
      ['{"size": "large"}', 'BAD_CHECKPOINT', 'size'],
      ['{"image_std": [1, 1]}', 'BAD_CHECKPOINT', 'image_std'],
      ['{"image_std": [1, 0, 1]}', 'BAD_CHECKPOINT', 'image_std'],
      ['{"resample": 99}', 'UNSUPPORTED', 'resample'],
      ['{"rescale_factor": 1}', 'UNSUPPORTED', 'rescale_factor'],
    ] as const) {
      await writeFile(join(folder, 'preprocessor_config.json'), json);
      await refused(() => VisionEncoder.load(folder), code, about);
    }
  });
});

describe('load()', () => {
  test.each<[string, unknown, unknown, ErrorCode, string]>([
    ['a folder that is not there', './no/such/folder', {}, 'NOT_FOUND', 'no/such/folder'],
    ['null', null, {}, 'BAD_INPUT', 'model'],
    ['a number', 7, {}, 'BAD_INPUT', 'model'],
    ['an empty name', '', {}, 'BAD_INPUT', 'model'],
    ["dtype 'float16'", golden('uniflow-tiny'), { dtype: 'float16' }, 'BAD_INPUT', 'dtype.*float16'],
    ["device 'tpu'", golden('uniflow-tiny'), { device: 'tpu' }, 'BAD_INPUT', 'device.*tpu'],
    ["device 'cuda:x'", golden('uniflow-tiny'), { device: 'cuda:x' }, 'BAD_INPUT', 'device.*cuda:x'],
    ['null for options', golden('uniflow-tiny'), null, 'BAD_INPUT', 'options'],
    ['a string for options', golden('uniflow-tiny'), 'cpu', 'BAD_INPUT', 'options'],
  ])('%s', async (_, model, options, code, about) => {
    await refused(() => UniFlow.load(model as never, options as never), code, new RegExp(about));
    await refused(() => VisionEncoder.load(model as never, options as never), code, new RegExp(about));
  });

  test('a file', async () => {
    const file = join(golden('uniflow-tiny'), 'config.json');
    await refused(() => UniFlow.load(file), 'BAD_INPUT', file);
  });

  test('a device that this build or machine does not have', async () => {
    await refused(() => UniFlow.load(golden('uniflow-tiny'), { device: 'cuda:63' }), 'UNSUPPORTED', 'cuda:63');
  });
});

describe('fresh models', () => {
  test.each<[string, () => unknown, string]>([
    ['an unknown preset', () => UniFlow.random('pico' as never), 'pico'],
    ['no config', () => UniFlow.random(undefined as never), 'preset'],
    [
      'a preset named as objects have methods',
      () => UniFlow.random('constructor' as never),
      "preset: expected nano, tiny, small, base, official, but got 'constructor'",
    ],
    ['an encoder of nothing', () => VisionEncoder.random(undefined as never), 'config'],
    ['a negative seed', () => UniFlow.random('nano', { seed: -1 }), 'seed'],
    ['a fractional seed', () => UniFlow.random('nano', { seed: 0.5 }), 'seed'],
    ['another dtype', () => UniFlow.random('nano', { dtype: 'float16' as never }), 'dtype'],
    ['no encoder', () => UniFlow.fromEncoder(undefined as never), 'encoder'],
    ['a model for an encoder', () => UniFlow.fromEncoder(uniflow as never), 'encoder'],
    ['negative latentChannels', () => UniFlow.fromEncoder(encoder, { latentChannels: -1 }), 'latentChannels'],
    ['fractional latentChannels', () => UniFlow.fromEncoder(encoder, { latentChannels: 1.5 }), 'latentChannels'],
    ['negative globalBlocks', () => UniFlow.fromEncoder(encoder, { globalBlocks: -1 }), 'globalBlocks'],
    ['fractional globalBlocks', () => UniFlow.fromEncoder(encoder, { globalBlocks: 1.5 }), 'globalBlocks'],
    ['NaN flowBlocks', () => UniFlow.fromEncoder(encoder, { flowBlocks: NaN }), 'flowBlocks'],
    ['null for options', () => UniFlow.fromEncoder(encoder, null as never), 'options'],
  ])('%s', async (_, make, about) => {
    await refused(make, 'BAD_INPUT', about);
  });
});

// ----- encode ---------------------------------------------------------------------------------------------------

describe('images', () => {
  test.each<[string, unknown, ErrorCode, string]>([
    ['undefined', undefined, 'BAD_INPUT', 'image'],
    ['null', null, 'BAD_INPUT', 'image'],
    ['a number', 5, 'BAD_INPUT', 'image'],
    ['an object', { pixel: 1 }, 'BAD_INPUT', 'image'],
    ['a list with a hole', ['a.png', undefined], 'BAD_INPUT', 'image'],
    ['a list of lists', [['a.png']], 'BAD_INPUT', 'image'],
    ['no images', [], 'BAD_INPUT', 'images'],
    ['no bytes', new Uint8Array(), 'BAD_INPUT', '0 bytes'],
    ['a missing file', 'no/such/image.png', 'NOT_FOUND', 'no/such/image.png'],
    ['a missing file among others', [join(golden('preprocess'), 'photo.png'), 'no/such.png'], 'NOT_FOUND', 'no/such.png'],
    ['a folder', tmpdir(), 'BAD_INPUT', tmpdir()],
    ['a path with a zero byte', 'a\0.png', 'BAD_INPUT', 'a'],
    ['a web address', 'https://example.com/a.png', 'UNSUPPORTED', 'only local files'],
  ])('%s', async (_, images, code, about) => {
    await refused(() => uniflow.encode(images as never), code, about);
    await refused(() => encoder.encode(images as never), code, about);
    await refused(() => uniflow.reconstruct(images as never), code, about);
  });

  test('text that is named .jpg, a file of no bytes, half an image: their names are said', async () => {
    const image = await readFile(join(golden('preprocess'), 'center_crop_224.png'));
    for (const [name, content] of [
      ['text.jpg', 'hello'],
      ['empty.png', ''],
      ['half.png', image.subarray(0, image.length / 2)],
    ] as const) {
      await writeFile(join(dir, name), content);
      await refused(() => uniflow.encode(join(dir, name)), 'BAD_INPUT', name);
    }
  });

  test('an image of 30,000 x 30,000 is refused before it is decoded', async () => {
    const chunk = (type: string, data: Buffer): Buffer => {
      const body = Buffer.concat([Buffer.from(type), data]);
      const [length, sum] = [Buffer.alloc(4), Buffer.alloc(4)];
      length.writeUInt32BE(data.length);
      sum.writeUInt32BE(crc32(body));
      return Buffer.concat([length, body, sum]);
    };
    const head = Buffer.alloc(13);
    head.writeUInt32BE(30_000, 0);
    head.writeUInt32BE(30_000, 4);
    head.set([1, 0, 0, 0, 0], 8); // one bit per pixel
    const rows = deflateSync(Buffer.alloc(30_000 * (1 + 30_000 / 8)), { level: 1 });
    const png = Buffer.concat([
      Buffer.from('\x89PNG\r\n\x1a\n', 'latin1'),
      chunk('IHDR', head),
      chunk('IDAT', rows),
      chunk('IEND', Buffer.alloc(0)),
    ]);
    await refused(() => uniflow.encode(png), 'BAD_INPUT', '30000 x 30000');
  });

  test('of a stream: the error comes where the image does', async () => {
    const photo = join(golden('preprocess'), 'center_crop_224.png');
    const ids: string[] = [];
    await refused(
      async () => {
        for await (const batch of uniflow.encodeStream([photo, photo, 'missing.png'], { batchSize: 1 })) ids.push(...batch.ids);
      },
      'NOT_FOUND',
      'missing.png',
    );
    expect(ids).toEqual([photo, photo]);
    for (const item of [null, undefined, 7, { id: 'a' }, { id: 7, image: photo }])
      await refused(() => uniflow.encodeStream([item as never]).next(), 'BAD_INPUT', /image|id|item/);
    for (const source of [null, undefined, 7, {}]) await refused(() => uniflow.encodeStream(source as never).next(), 'BAD_INPUT', 'source');
  });
});

describe('pixels', () => {
  const bytes = ndarray(new Uint8Array(3 * 56 * 56), [1, 3, 56, 56]);
  const doubles = ndarray(new Float64Array(3 * 56 * 56), [1, 3, 56, 56]);
  const list = ndarray(new Array<number>(3 * 56 * 56).fill(0), [1, 3, 56, 56]);
  const short = ndarray(new Float32Array(7), [1, 3, 56, 56]);
  test.each<[string, unknown, string]>([
    ['null', null, 'pixels'],
    ['a number', 7, 'pixels'],
    ['a typed array', new Float32Array(3 * 56 * 56), 'pixels'],
    ['one image without its batch', random(3, 56, 56), 'pixels.*\\[3, 56, 56\\]'],
    ['channels last', random(1, 56, 56, 3), 'pixels.*\\[1, 56, 56, 3\\]'],
    ['bytes, channels first', bytes, 'pixels.*\\[1, 3, 56, 56\\]'],
    ['doubles', doubles, 'pixels.*Float64Array'],
    ['a list of numbers', list, 'pixels.*Array'],
    ['less data than the shape says', short, 'pixels'],
    ['a height below one patch', random(1, 3, 13, 56), '14.*13'],
    ['no height', random(1, 3, 0, 56), 'size|pixels'],
    ['no images', random(0, 3, 56, 56), 'pixels|images'],
  ])('%s', async (_, array, about) => {
    await refused(() => uniflow.encode({ pixels: array as never }), 'BAD_INPUT', new RegExp(about));
    await refused(() => encoder.encode({ pixels: array as never }), 'BAD_INPUT', new RegExp(about));
  });

  test.each([NaN, Infinity, -Infinity])('%d among them', async (value) => {
    const input = pixels(2, 3, 56, 56);
    input.pixels.set(1, 2, 55, 55, value);
    await refused(() => uniflow.encode(input), 'BAD_INPUT', /pixels.*finite/);
    await refused(() => uniflow.encode(input, { batchSize: 1 }), 'BAD_INPUT', /pixels.*finite/);
    expect((await uniflow.encode(pixels())).latents.shape).toEqual([1, 16, 16]); // the next call is unaffected
  });

  test('views of any strides give what a copy in C order gives', async () => {
    const plain = pixels(2, 3, 42, 56).pixels;
    const { latents: expected } = await uniflow.encode({ pixels: plain });
    const last = ndarray(new Float32Array(plain.size), [2, 42, 56, 3]).transpose(0, 3, 1, 2);
    const backward = ndarray(new Float32Array(plain.size), [2, 3, 42, 56]).step(1, 1, -1, -1);
    const inner = ndarray(new Float32Array(3 * 3 * 50 * 60), [3, 3, 50, 60])
      .lo(1, 0, 4, 2)
      .hi(2, 3, 42, 56);
    for (const view of [last, backward, inner]) {
      for (let b = 0; b < 2; b++)
        for (let c = 0; c < 3; c++) for (let y = 0; y < 42; y++) for (let x = 0; x < 56; x++) view.set(b, c, y, x, plain.get(b, c, y, x));
      expect((await uniflow.encode({ pixels: view })).latents).toEqual(expected);
    }
    const same = ndarray(new Float32Array(3 * 56).fill(0.5), [2, 3, 56, 56], [0, 56, 0, 1]);
    const filled = ndarray(new Float32Array(2 * 3 * 56 * 56).fill(0.5), [2, 3, 56, 56]);
    expect((await uniflow.encode({ pixels: same })).latents).toEqual((await uniflow.encode({ pixels: filled })).latents);
  });

  test('that were transferred away', async () => {
    for (const data of [new Float32Array(3 * 56 * 56), new Uint8Array(3 * 56 * 56)]) {
      const array = ndarray(data, data instanceof Uint8Array ? [1, 56, 56, 3] : [1, 3, 56, 56]);
      structuredClone(data, { transfer: [data.buffer] });
      await refused(() => uniflow.encode({ pixels: array }), 'BAD_INPUT', /pixels: expected data of at least 9408.*transferred/);
    }
    const image = new Uint8Array(await readFile(join(golden('preprocess'), 'center_crop_224.png')));
    structuredClone(image, { transfer: [image.buffer] });
    await refused(() => uniflow.encode(image), 'BAD_INPUT', '0 bytes');
  });

  test('in shared memory', async () => {
    const plain = pixels().pixels;
    const shared = ndarray(new Float32Array(new SharedArrayBuffer(4 * plain.size)), plain.shape);
    shared.data.set(plain.data);
    expect((await uniflow.encode({ pixels: shared })).latents).toEqual((await uniflow.encode({ pixels: plain })).latents);
  });
});

describe('options of encode()', () => {
  const photo = join(golden('preprocess'), 'center_crop_224.png');
  test.each<[string, unknown, string]>([
    ['batchSize 0', { batchSize: 0 }, 'batchSize.*0'],
    ['batchSize -1', { batchSize: -1 }, 'batchSize.*-1'],
    ['batchSize 1.5', { batchSize: 1.5 }, 'batchSize.*1.5'],
    ['batchSize NaN', { batchSize: NaN }, 'batchSize.*NaN'],
    ["batchSize '2'", { batchSize: '2' }, 'batchSize.*2'],
    ['size 0', { size: 0 }, 'size.*14.*0'],
    ['size -14', { size: -14 }, 'size.*-14'],
    ['size 13', { size: 13 }, 'size.*14.*13'],
    ['size 56.5', { size: 56.5 }, 'size.*56.5'],
    ["size '56'", { size: '56' }, 'size.*56'],
    ['size [56]', { size: [56] }, 'size.*56'],
    ['size [56, "56"]', { size: [56, '56'] }, 'size'],
    ['size {}', { size: {} }, 'size'],
    ['size as large as no memory', { size: 14 * 2 ** 40 }, 'size'],
    ['a signal that is none', { signal: {} }, 'signal'],
    ['null', null, 'options'],
    ['a string', 'large', 'options'],
  ])('%s', async (_, options, about) => {
    await refused(() => uniflow.encode(photo, options as never), 'BAD_INPUT', new RegExp(about));
    await refused(() => encoder.encode(photo, options as never), 'BAD_INPUT', new RegExp(about));
    await refused(() => uniflow.encodeStream([photo], options as never).next(), 'BAD_INPUT', new RegExp(about));
  });

  test('a size for pixels, which have one', async () => {
    await refused(() => uniflow.encode(pixels(), { size: 56 }), 'BAD_INPUT', 'size');
  });
});

// ----- decode ---------------------------------------------------------------------------------------------------

describe('latents', () => {
  test.each<[string, unknown, string]>([
    ['undefined', undefined, 'latents'],
    ['null', null, 'latents'],
    ['a number', 7, 'latents'],
    ['a typed array', new Float32Array(256), 'latents'],
    ['what encode() gives, whole', { latents: latents(), grid: { rows: 4, cols: 4 } }, 'latents'],
    ['of other channels', random(1, 16, 15), 'latents.*16.*\\[1, 16, 15\\]'],
    ['without a batch', random(16, 16), 'latents.*\\[16, 16\\]'],
    ['none', random(0, 16, 16), 'latents|images'],
    ['of no patches', random(1, 0, 16), 'latents|grid'],
    ['bytes', ndarray(new Uint8Array(256), [1, 16, 16]), 'latents.*uint8'],
    ['doubles', ndarray(new Float64Array(256), [1, 16, 16]), 'latents.*Float64Array'],
    ['too few for their shape', ndarray(new Float32Array(7), [1, 16, 16]), 'latents'],
    ['NaN', ndarray(new Float32Array(256).fill(NaN), [1, 16, 16]), 'latents.*finite'],
    ['of no square grid, and none is given', random(1, 15, 16), 'grid.*15'],
  ])('%s', async (_, array, about) => {
    await refused(() => uniflow.decode(array as never), 'BAD_INPUT', new RegExp(about));
  });

  test('views of any strides give what a copy in C order gives', async () => {
    const plain = latents(2, 16, 16);
    const view = ndarray(new Float32Array(2 * 16 * 16), [16, 2, 16]).transpose(1, 2, 0);
    for (let b = 0; b < 2; b++) for (let n = 0; n < 16; n++) for (let z = 0; z < 16; z++) view.set(b, n, z, plain.get(b, n, z));
    expect(await uniflow.decode(view)).toEqual(await uniflow.decode(plain));
  });
});

describe('options of decode()', () => {
  const digits = (zeros: number): string => `0.${'0'.repeat(zeros)}1`;
  test.each<[string, unknown, string]>([
    ['steps 0', { steps: 0 }, 'steps.*0'],
    ['steps -1', { steps: -1 }, 'steps.*-1'],
    ['steps 1.5', { steps: 1.5 }, 'steps.*1.5'],
    ['steps NaN', { steps: NaN }, 'steps.*NaN'],
    ['steps 1e9', { steps: 1e9 }, 'steps.*1000000000'],
    ["steps '4'", { steps: '4' }, 'steps'],
    ["schedule 'cubic'", { schedule: 'cubic' }, 'schedule.*cubic'],
    ["schedule 'pow_'", { schedule: 'pow_' }, 'schedule.*pow_'],
    ["schedule 'pow_-1'", { schedule: 'pow_-1' }, 'schedule.*pow_-1'],
    ["schedule 'pow_0'", { schedule: 'pow_0' }, 'schedule.*pow_0'],
    ["schedule 'pow_1e3'", { schedule: 'pow_1e3' }, 'schedule.*pow_1e3'],
    ['schedule pow_ of a number without end', { schedule: `pow_${'9'.repeat(400)}` }, 'schedule'],
    ['schedule pow_ of almost nothing', { schedule: `pow_${digits(309)}`, steps: 2 }, 'schedule'],
    ['schedule 7', { schedule: 7 }, 'schedule.*7'],
    ['guidance NaN', { guidance: NaN }, 'guidance.*NaN'],
    ['guidance Infinity', { guidance: Infinity }, 'guidance.*Infinity'],
    ["guidance '2'", { guidance: '2' }, 'guidance'],
    ['seed -1', { seed: -1 }, 'seed.*-1'],
    ['seed 0.5', { seed: 0.5 }, 'seed.*0.5'],
    ['seed NaN', { seed: NaN }, 'seed.*NaN'],
    ['seed 2^60', { seed: 2 ** 60 }, 'seed'],
    ["seed '7'", { seed: '7' }, 'seed.*7'],
    ['imageIds too few', { imageIds: [] }, 'imageIds.*1'],
    ['imageIds -1', { imageIds: [-1] }, 'imageIds.*-1'],
    ['imageIds 2^32', { imageIds: [2 ** 32] }, 'imageIds'],
    ['imageIds 7', { imageIds: 7 }, 'imageIds'],
    ['a grid of other patches', { grid: { rows: 3, cols: 5 } }, 'grid.*16'],
    ['a grid of negatives', { grid: { rows: -4, cols: -4 } }, 'grid'],
    ['a grid of fractions', { grid: { rows: 2.5, cols: 6.4 } }, 'grid'],
    ['a grid of strings', { grid: { rows: '4', cols: '4' } }, 'grid'],
    ['a grid that is a number', { grid: 4 }, 'grid'],
    ['output png', { output: 'png' }, 'output.*png'],
    ['noise of another shape', { noise: random(1, 16, 587) }, 'noise.*588.*587'],
    ['noise in bytes', { noise: ndarray(new Uint8Array(16 * 588), [1, 16, 588]) }, 'noise.*uint8'],
    ['noise of NaN', { noise: ndarray(new Float32Array(16 * 588).fill(NaN), [1, 16, 588]) }, 'noise.*finite'],
    ['noise that is a number', { noise: 7 }, 'noise'],
    ['batchSize 0', { batchSize: 0 }, 'batchSize.*0'],
    ['a signal that is none', { signal: 'now' }, 'signal'],
    ['null', null, 'options'],
    ['a number', 4, 'options'],
  ])('%s', async (_, options, about) => {
    await refused(() => uniflow.decode(latents(), options as never), 'BAD_INPUT', new RegExp(about));
  });
});

// ----- save -----------------------------------------------------------------------------------------------------

describe('save()', () => {
  test('to a path below a file, onto a file, to nowhere', async () => {
    const file = join(dir, 'file');
    await writeFile(file, 'mine');
    await refused(() => uniflow.save(join(file, 'model')), 'BAD_INPUT', file);
    await refused(() => uniflow.save(file), 'BAD_INPUT', file);
    expect(await readFile(file, 'utf8')).toBe('mine');
    await refused(() => uniflow.save('a\0b'), 'BAD_INPUT', /cannot be written/);
    await refused(() => uniflow.save(undefined as never), 'BAD_INPUT', /dir|folder|written/);
    await refused(() => uniflow.save(7 as never), 'BAD_INPUT', /dir|folder|written/);
  });

  test('to where the names are taken by folders', async () => {
    const folder = join(dir, 'taken');
    await mkdir(join(folder, 'model.safetensors'), { recursive: true });
    await refused(() => uniflow.save(folder), 'BAD_INPUT', folder);
  });

  test('in another dtype', async () => {
    await refused(() => uniflow.save(join(dir, 'half'), { dtype: 'float16' as never }), 'BAD_INPUT', /dtype.*float16/);
    await refused(() => encoder.save(join(dir, 'half'), { dtype: 'float16' as never }), 'BAD_INPUT', /dtype.*float16/);
    await refused(() => uniflow.save(join(dir, 'half'), null as never), 'BAD_INPUT', 'options');
  });
});

// ----- the addon itself, in a separate process whose survival is checked --------------------------------------------

/** Outcome of each script: '' on success, `CODE message` of a UniFlowError, `Name: message` of another error, or how the process died. */
async function outcomes(scripts: readonly string[]): Promise<string[]> {
  const compiled = await Compiled.library();
  const results: string[] = [];
  try {
    while (results.length < scripts.length) {
      const from = results.length;
      const { code, signal, printed } = await compiled.run(
        `${hostile}
        for (const script of ${JSON.stringify(scripts.slice(from))}) {
          let result = '';
          try {
            const made = await new AsyncFunction('lib', 'native', 'raw', script)(lib, native, raw);
            if (made instanceof native.TensorHandle) await native.synchronize([made]);
            await native.synchronize();
          } catch (error) {
            result = (error.name === 'UniFlowError' ? error.code + ' ' : error.name + ': ') + error.message;
          }
          print(result);
          native.setErrorClass(lib.UniFlowError);
        }`,
        { timeout: 20_000, flags: ['--expose-gc', '--max-old-space-size=512'] },
      );
      results.push(...(printed as string[]));
      if (results.length < scripts.length) results.push(`the process died: ${signal ?? `exit code ${code}`}`);
    }
  } finally {
    await compiled.remove();
  }
  return results;
}

const hostile = `
  const lib = await library();
  const native = await addon();
  lib.setThreads(1);
  const AsyncFunction = (async () => {}).constructor;
  const tensor = (shape, type = Float32Array) => native.fromHost(new type(shape.reduce((a, b) => a * b, 1)), shape);
  const packed = (out, inputs) => native.packLinear(tensor([out, inputs]), 'float32');
  const layer = (out, inputs) => ({ weight: packed(out, inputs), bias: tensor([out]) });
  const block = (d) => ({ normWeight: tensor([d]), normBias: tensor([d]), fc1: layer(d, d), fc2: layer(d, d), modulation: layer(3 * d, d) });
  const normalisation = { mean: Float32Array.of(0, 0, 0), std: Float32Array.of(1, 1, 1) };
  const head = (change = {}, d = 16, p = 12) => ({
    time1: layer(d, 256), time2: layer(d, d), condition: layer(d, d), input: layer(d, p), blocks: [block(d)],
    finalModulation: layer(2 * d, d), output: layer(p, d), ...change,
  });
  const flow = (change = {}) => ({
    time: Float32Array.of(0), step: Float32Array.of(1), guidance: 1, noise: undefined, seed: 0, ids: Uint32Array.of(0), rows: 2, cols: 2, patch: 2,
    normalisation, output: 'float32', ...change,
  });
  const raw = { tensor, packed, layer, block, normalisation, head, flow, random, pixels, latents, fixture };
`;

const jpeg = join(import.meta.dirname, 'fixtures', 'jpeg', '422.jpg');

/** Includes a valid call, to show that the others fail for their own reasons. */
const survived: [script: string, outcome: RegExp][] = [
  ['return native.flowIntegrate(raw.head(), raw.tensor([1, 4, 16]), raw.flow())', /^$/],

  // values of the wrong kind
  ['native.linear()', /^BAD_INPUT/],
  ['native.linear({}, {}, {})', /^BAD_INPUT/],
  ['native.linear(raw.tensor([1, 4]), raw.packed(4, 4), { bias: 7 })', /^BAD_INPUT bias/],
  ['native.linear(raw.tensor([1, 4]), raw.packed(4, 4), { activation: "relu" })', /^BAD_INPUT activation/],
  ['native.linear(raw.packed(4, 4), raw.packed(4, 4), {})', /^BAD_INPUT x/],
  ['native.linear(raw.tensor([1, 5]), raw.packed(4, 4), {})', /^BAD_INPUT x/],
  ['native.linear(raw.tensor([]), raw.packed(4, 4), {})', /^BAD_INPUT x/],
  ['native.norm(raw.tensor([]), { eps: 1e-6 })', /^BAD_INPUT x/],
  ['native.norm(raw.tensor([4]), { eps: NaN })', /^BAD_INPUT eps/],
  ['native.norm(raw.tensor([4]), { eps: 1e-6, scale: raw.tensor([4]) })', /^BAD_INPUT scale/],
  ['native.swiglu(raw.tensor([3]))', /^BAD_INPUT x/],
  ['native.attention(raw.tensor([1, 4, 16]), 4)', /^BAD_INPUT qkv/],
  ['native.attention(raw.tensor([1, 4, 12]), 0)', /^BAD_INPUT heads/],
  ['native.attention(raw.tensor([1, 4, 12], Int32Array), 1)', /^BAD_INPUT qkv/],
  ['native.attention(raw.tensor([1, 4, 3 * 1024]), 1)', /^(BAD_INPUT|UNSUPPORTED)/],
  ['native.rope(raw.tensor([1, 4, 12]), 1, 5, raw.tensor([2, 4, 4]))', /^BAD_INPUT prefix/],
  ['native.rope(raw.tensor([1, 4, 9]), 1, 0, raw.tensor([2, 4, 3]))', /^(BAD_INPUT|$)/],
  ['native.assemble(raw.tensor([1, 4, 8]), raw.tensor([]), undefined)', /^BAD_INPUT prefix/],
  ['native.sliceTokens(raw.tensor([1, 2, 4]), 2, 1)', /^BAD_INPUT tokens/],
  ['native.cast(raw.tensor([4]), "int32")', /^BAD_INPUT/],
  ['native.cast(raw.tensor([4]), "float64")', /^BAD_INPUT dtype/],
  ['native.packLinear(raw.tensor([4, 4]), "uint8")', /^BAD_INPUT dtype/],
  ['native.packLinear(raw.tensor([4]), "float32")', /^BAD_INPUT weight/],
  ['native.parameterBytes(raw.tensor([4], Int32Array), "float32")', /^BAD_INPUT parameter/],
  ['native.checkFinite(raw.tensor([4], Int32Array), "it")', /^BAD_INPUT it/],
  ['native.imageQuality(raw.tensor([1, 2, 2, 3], Uint8Array), raw.tensor([1, 3, 3, 3], Uint8Array), "standard")', /^BAD_INPUT b/],
  ['return native.imageQuality(raw.tensor([1, 0, 7, 3], Uint8Array), raw.tensor([1, 0, 7, 3], Uint8Array), "standard")', /^(BAD_INPUT|$)/],
  ['native.imageQuality(raw.tensor([1, 2, 2, 3], Uint8Array), raw.tensor([1, 2, 2, 3], Uint8Array), "ours")', /^BAD_INPUT convention/],
  ['native.openSafetensors("/dev/zero")', /^BAD_CHECKPOINT/],
  ['native.openSafetensors("a\\0b")', /^BAD_CHECKPOINT/],
  ['native.openSafetensors(7)', /^BAD_INPUT path/],
  ['native.loadParameter([{ file: native.createToken(), name: "x" }], [1], "float32", false)', /^BAD_INPUT file/],
  ['native.loadParameter([{ rows: -1 }, { rows: 2 }], [1], "float32", false)', /^BAD_(INPUT|CHECKPOINT)/],
  ['native.loadParameter([{ rows: 2 ** 53 - 1 }], [4, 8], "float32", false)', /^BAD_(INPUT|CHECKPOINT)/],
  ['native.cancel({})', /^BAD_INPUT token/],
  ['native.useToken(5)', /^BAD_INPUT token/],
  ['native.setThreads(0)', /^BAD_INPUT threads/],
  ['native.setThreads(NaN)', /^BAD_INPUT threads/],
  ['native.measurePeak(new Float64Array(2))', /^BAD_INPUT into/],
  ['native.synchronize(new Array(2 ** 32 - 1))', /^BAD_INPUT/],
  ['native.synchronize([{}])', /^BAD_INPUT/],

  // sizes
  ['native.fromHost(new Float32Array(4), [5])', /^BAD_INPUT data/],
  ['native.fromHost(new Float32Array(1), [NaN])', /^BAD_INPUT shape/],
  ['native.fromHost(new Float32Array(1), [-1, -1])', /^BAD_INPUT shape/],
  ['native.fromHost(new Float32Array(1), [0.5, 2])', /^BAD_INPUT shape/],
  ['native.fromHost(new Float32Array(0), [2 ** 40, 2 ** 40])', /^BAD_INPUT shape/],
  ['native.fromHost(new Float32Array(1), new Array(9).fill(1))', /^BAD_INPUT shape/],
  ['return native.fromHost(new Float32Array(0), [0, 2 ** 53 - 1, 2 ** 53 - 1])', /^(BAD_INPUT|$)/],
  ['native.fromHost(new Float64Array(1), [1])', /^BAD_INPUT data/],
  ['native.fromHost([1], [1])', /^BAD_INPUT data/],
  ['return native.randomParameter([2 ** 20, 2 ** 20], "float32", false, 0, 0, 1)', /^OUT_OF_MEMORY/],
  ['return native.randomParameter([2 ** 20, 2 ** 20], "float32", true, 0, 0, 1)', /^OUT_OF_MEMORY/],
  ['return native.noise(0, Uint32Array.of(0), 2 ** 53 - 1, 2 ** 53 - 1)', /^(BAD_INPUT|OUT_OF_MEMORY)/],
  ['return native.noise(0, Uint32Array.of(0), 2 ** 32, 2 ** 32)', /^(BAD_INPUT|OUT_OF_MEMORY)/],
  ['return native.ropeTable(2 ** 31, 2 ** 31, 64, 100, "image")', /^(BAD_INPUT|OUT_OF_MEMORY)/],
  ['return native.ropeTable(2 ** 40, 2 ** 40, 64, 100, "image")', /^(BAD_INPUT|OUT_OF_MEMORY)/],
  ['return native.ropeTable(2 ** 20, 2 ** 20, 64, 100, "image")', /^(BAD_INPUT|OUT_OF_MEMORY)/],
  ['return native.resizeTable(raw.tensor([4, 8]), 2, 2, 2 ** 40, 2 ** 40, false)', /^(BAD_INPUT|OUT_OF_MEMORY)/],
  ['return native.resizeTable(raw.tensor([0, 8]), 2 ** 32, 2 ** 32, 2, 2, false)', /^BAD_INPUT/],
  ['return native.fold(raw.tensor([1, 4, 12]), -1, 1, 2, raw.normalisation, "float32")', /^BAD_INPUT/],
  ['return native.fold(raw.tensor([1, 4, 12]), -2, -2, 2, raw.normalisation, "float32")', /^BAD_INPUT/],
  ['return native.unfold(raw.tensor([1, 3, 4, 4]), 2 ** 40, raw.normalisation, "float32")', /^BAD_INPUT/],
  ['return native.unfold(raw.tensor([1, 3, 4, 4]), -2, raw.normalisation, "float32")', /^BAD_INPUT/],
  ['return native.packLinear(raw.tensor([0, 4]), "float32")', /^BAD_INPUT/],
  ['return native.packLinear(raw.tensor([4, 0]), "float32")', /^BAD_INPUT/],
  ['return native.randomParameter([0, 4], "float32", true, 0, 0, 1)', /^BAD_INPUT/],

  // the flow head
  ['return native.flowIntegrate(raw.head(), raw.tensor([1, 4, 16]), raw.flow({ rows: -2, cols: -2 }))', /^BAD_INPUT/],
  ['return native.flowIntegrate(raw.head(), raw.tensor([1, 4, 16]), raw.flow({ rows: -1, cols: 1 }))', /^BAD_INPUT/],
  ['return native.flowIntegrate(raw.head(), raw.tensor([1, 4, 16]), raw.flow({ patch: 0 }))', /^BAD_INPUT/],
  ['return native.flowIntegrate(raw.head(), raw.tensor([1, 4, 16]), raw.flow({ time: new Float32Array() }))', /^BAD_INPUT/],
  ['return native.flowIntegrate(raw.head(), raw.tensor([1, 4, 16]), raw.flow({ step: new Float32Array(2) }))', /^BAD_INPUT/],
  ['return native.flowIntegrate(raw.head(), raw.tensor([1, 4, 16]), raw.flow({ ids: new Uint32Array() }))', /^BAD_INPUT/],
  ['return native.flowIntegrate(raw.head(), raw.tensor([1, 4, 17]), raw.flow())', /^BAD_INPUT/],
  ['return native.flowIntegrate(raw.head(), raw.tensor([0, 4, 16]), raw.flow({ ids: new Uint32Array() }))', /^(BAD_INPUT|$)/],
  [
    'return native.flowIntegrate(raw.head({ output: { weight: raw.tensor([]), bias: undefined } }), raw.tensor([1, 4, 16]), raw.flow())',
    /^BAD_INPUT/,
  ],
  [
    'return native.flowIntegrate(raw.head({ blocks: [{ ...raw.block(16), normWeight: raw.tensor([16], Uint8Array) }] }), raw.tensor([1, 4, 16]), raw.flow())',
    /^BAD_INPUT/,
  ],
  ['return native.flowIntegrate(raw.head({ blocks: {} }), raw.tensor([1, 4, 16]), raw.flow())', /^BAD_INPUT blocks/],
  ['return native.flowIntegrate(raw.head({ time1: undefined }), raw.tensor([1, 4, 16]), raw.flow())', /^BAD_INPUT time1/],

  // training
  ['return native.globalNorm([undefined])', /^BAD_INPUT/],
  ['return native.globalNorm([raw.tensor([4], Int32Array)])', /^BAD_INPUT/],
  ['return native.concat([])', /^BAD_INPUT/],
  ['return native.split(raw.tensor([4, 6]), 0, 4)', /^BAD_INPUT/],
  ['return native.sumRows(raw.tensor([4, 6]), 3)', /^BAD_INPUT/],
  ['return native.padTokens(raw.tensor([1, 4, 8]), 2, 5)', /^BAD_INPUT/],
  ['return native.padTokens(raw.tensor([2048, 1, 1024]), 0, 2 ** 53 - 1)', /^(BAD_INPUT|OUT_OF_MEMORY)/],
  [
    'native.linearBackward(raw.tensor([2, 0]), raw.tensor([4, 0]), raw.tensor([2, 4]), true, true, true); await native.synchronize()',
    /^(BAD_INPUT|$)/,
  ],
  ['native.resizeTableBackward(raw.tensor([0, 8]), 2, 2, 2 ** 32, 2 ** 32, false)', /^BAD_INPUT/],
  ['native.distillation([], [], 1, 0, "adaptive", true)', /^BAD_INPUT/],
  ['native.distillation([raw.tensor([1, 4, 8])], [raw.tensor([1, 5, 8])], 1, 0, "adaptive", true)', /^BAD_INPUT/],
  ['native.distillation([undefined], [undefined], 1, 0, "adaptive", true)', /^BAD_INPUT/],
  [
    `native.adamw([{ parameter: raw.tensor([1 << 20]), grad: raw.tensor([1 << 20]), m: raw.tensor([1 << 20]), v: raw.tensor([1 << 20]),
       average: raw.tensor([1]), lr: 1, weightDecay: 0 }], raw.tensor([1]), { beta1: 0.9, beta2: 0.9, eps: 1e-8, ema: 0.9, clip: 1, step: 1 });
     await native.synchronize()`,
    /^BAD_INPUT average/,
  ],
  [
    `native.adamw([{ parameter: raw.tensor([1 << 20]), grad: raw.tensor([1 << 20]), m: raw.tensor([1 << 20]), v: raw.tensor([1 << 20]),
       compute: raw.tensor([1]), lr: 1, weightDecay: 0 }], raw.tensor([1]), { beta1: 0.9, beta2: 0.9, eps: 1e-8, ema: 0.9, clip: 1, step: 1 });
     await native.synchronize()`,
    /^BAD_INPUT compute/,
  ],
  [
    `native.adamw([{ parameter: raw.tensor([4]), grad: raw.tensor([4]), m: raw.tensor([4]), v: raw.tensor([5]), lr: 1, weightDecay: 0 }],
       raw.tensor([1]), { beta1: 0.9, beta2: 0.9, eps: 1e-8, ema: 0.9, clip: 1, step: 1 })`,
    /^BAD_INPUT v/,
  ],
  [
    'native.qkNormBackward(raw.tensor([1, 1, 3 << 16]), raw.tensor([1, 1, 3 << 16]), raw.tensor([1 << 16], Uint8Array), raw.tensor([1 << 16], Uint8Array), 1e-6)',
    /^BAD_INPUT qWeight/,
  ],

  // handles
  ['const t = raw.tensor([4]); t.dispose(); t.dispose(); if (!t.disposed) throw new Error(); t.shape', /^DISPOSED/],
  ['const t = raw.tensor([4]); t.dispose(); await t.read(new Float32Array(4))', /^DISPOSED/],
  ['const t = raw.tensor([1, 4]); t.dispose(); native.linear(t, raw.packed(4, 4), {})', /^DISPOSED x/],
  ['raw.tensor([4]).reshape([5])', /^BAD_INPUT shape/],
  ['raw.tensor([4]).slice(1, 5)', /^BAD_INPUT slice/],
  ['raw.tensor([4]).slice(-1, 2)', /^BAD_INPUT slice/],
  ['raw.tensor([]).slice(0, 0)', /^BAD_INPUT slice/],
  ['raw.packed(4, 4).slice(0, 1)', /^BAD_INPUT slice/],
  ['new native.TensorHandle()', /^BAD_INPUT/],
  ['new native.TensorHandle(native.createToken())', /^(TypeError|BAD_INPUT)/],
  [
    'const t = raw.tensor([4]); new t.constructor(native.openSafetensors(raw.fixture + "/model.safetensors").handle)',
    /^(TypeError|BAD_INPUT)/,
  ],
  ['raw.tensor([4]).read.call({}, new Float32Array(4))', /Error/],
  ['Object.setPrototypeOf({}, raw.tensor([4])).shape', /Error/],
  ['native.linear(Object.create(raw.tensor([1, 4])), raw.packed(4, 4), {})', /^BAD_INPUT x/],

  // memory owned by the caller
  ['await raw.tensor([4]).read(new Float32Array(5))', /^BAD_INPUT into/],
  ['await raw.tensor([4]).read(new Int32Array(4))', /^BAD_INPUT into/],
  ['await raw.tensor([4]).read([0, 0, 0, 0])', /^BAD_INPUT into/],
  ['await raw.tensor([4]).read()', /^BAD_INPUT into/],
  ['const a = new Float32Array(4); structuredClone(a, { transfer: [a.buffer] }); native.fromHost(a, [4])', /^BAD_INPUT data/],
  ['const a = new Float32Array(4); structuredClone(a, { transfer: [a.buffer] }); await raw.tensor([4]).read(a)', /^BAD_INPUT into/],
  ['return native.fromHost(new Float32Array(new SharedArrayBuffer(16)), [4])', /^(BAD_INPUT|$)/],
  ['await raw.tensor([4]).read(new Float32Array(new SharedArrayBuffer(16)))', /^(BAD_INPUT|$)/],
  [
    `const a = new Float32Array(1 << 24), shape = [0]; // the array goes while the shape is read
     Object.defineProperty(shape, 0, { get() { structuredClone(a, { transfer: [a.buffer] }); gc(); gc(); return 1 << 24; } });
     native.fromHost(a, shape)`,
    /^BAD_INPUT/,
  ],
  [
    `const { createContext, runInContext } = await import('node:vm');
     const realm = createContext({});
     const t = native.fromHost(runInContext('new Float32Array([1, 2, 3])', realm), runInContext('[3]', realm));
     const into = runInContext('new Float32Array(3)', realm);
     await t.read(into);
     if (into[2] !== 3) throw new Error(String(into));`,
    /^$/,
  ],

  // images
  [
    'await native.resample(new Uint8Array(11), 2, 2, new Uint8Array(12), { width: 2, height: 2, mode: "cover", edge: 2, filter: "box" })',
    /^BAD_INPUT pixels/,
  ],
  [
    'await native.resample(new Uint8Array(12), 2, 2, new Uint8Array(11), { width: 2, height: 2, mode: "cover", edge: 2, filter: "box" })',
    /^BAD_INPUT into/,
  ],
  [
    'await native.resample(new Uint8Array(12), -2, -2, new Uint8Array(12), { width: 2, height: 2, mode: "cover", edge: 2, filter: "box" })',
    /^BAD_INPUT width/,
  ],
  [
    'await native.resample(new Uint8Array(0), 0, 0, new Uint8Array(12), { width: 2, height: 2, mode: "cover", edge: 2, filter: "box" })',
    /^BAD_INPUT width/,
  ],
  [
    'await native.resample(new Uint8Array(12), 2, 2, new Uint8Array(12), { width: 2, height: 2, mode: "tile", edge: 2, filter: "box" })',
    /^BAD_INPUT mode/,
  ],
  [
    'await native.resample(new Uint8Array(12), 2, 2, new Uint8Array(12), { width: 2, height: 2, mode: "cover", edge: 2, filter: "sinc" })',
    /^BAD_INPUT filter/,
  ],
  [
    'await native.resample(new Uint8Array(12), 2, 2, new Uint8Array(12), { width: 2, height: 2, mode: "shortest_edge", edge: 1, filter: "box" })',
    /^BAD_INPUT/,
  ],
  [
    'await native.resample(new Uint8Array(3 << 20), 1 << 20, 1, new Uint8Array(12), { width: 2, height: 2, mode: "shortest_edge", edge: 1 << 20, filter: "lanczos" })',
    /^(BAD_INPUT|OUT_OF_MEMORY|$)/,
  ],

  ['await native.openJpeg(7, 1)', /^BAD_INPUT file/],
  ['await native.openJpeg("a.jpg", NaN)', /^BAD_INPUT maxPixels/],
  [
    'await native.openJpeg(new Uint8Array(new ArrayBuffer(8, { maxByteLength: 16 })), 1)',
    /^BAD_INPUT file: expected an array of fixed length/,
  ],
  ['await native.decodeJpeg({}, new Uint8Array(12), undefined)', /^BAD_INPUT file/],
  ['await native.decodeJpeg(native.createToken(), new Uint8Array(12), undefined)', /^BAD_INPUT file/],
  [
    `const { file } = await native.openJpeg(${JSON.stringify(jpeg)}, 1e9);
     await native.decodeJpeg(file, new Uint8Array(12), undefined);`,
    /^BAD_INPUT into/,
  ],
  [
    `const { file, width, height } = await native.openJpeg(${JSON.stringify(jpeg)}, 1e9);
     for (let i = 0; i < 2; i++) await native.decodeJpeg(file, new Uint8Array(3 * width * height), undefined);`,
    /^BAD_INPUT file: expected a JPEG that was not decoded yet/,
  ],

  // storage types of shards
  ['await native.store(new Float32Array(2), "float16", new Uint16Array(3))', /^BAD_INPUT bits/],
  ['await native.store(new Float32Array(2), "float32", new Uint16Array(2))', /^BAD_INPUT type/],
  ['await native.store(new Float32Array([1e30]), "float16", new Uint16Array(1))', /^UNSUPPORTED store: .* but got 1e\+30/],
  ['await native.restore(new Uint16Array(2), "bfloat16", new Float32Array(1))', /^BAD_INPUT bits/],
  ['await native.moments(new Float32Array(7), 2, new Float64Array(2), new Float64Array(2))', /^BAD_INPUT channels/],
  ['await native.moments(new Float32Array(8), 2, new Float64Array(2), new Float64Array(1))', /^BAD_INPUT squares/],

  // invalid error classes
  ['native.setErrorClass(123)', /^(BAD_INPUT|TypeError|Error)/],
  ['native.setErrorClass()', /^(BAD_INPUT|TypeError|Error)/],
  ['native.setErrorClass({}); native.linear()', /^(BAD_INPUT|TypeError|Error)/],
  ['native.setErrorClass(() => 0); native.linear()', /Error/],
  [
    'native.setErrorClass(() => 0); const t = native.fromHost(Float32Array.of(NaN), [1]); native.checkFinite(t, "t"); await t.read(new Float32Array(1))',
    /Error|NaN/,
  ],
  [
    'native.setErrorClass(class { constructor() { throw new Error("no"); } }); const t = native.fromHost(Float32Array.of(NaN), [1]); native.checkFinite(t, "t"); await t.read(new Float32Array(1))',
    /Error|NaN/,
  ],

  // the library: input that could crash the process or exhaust memory
  [
    'await lib.UniFlow.random({ ...lib.presets.nano, hidden_size: 1024, vit_hidden_size: 1024, num_attention_heads: 1 }).encode(raw.pixels())',
    /^(BAD_CHECKPOINT|BAD_INPUT|UNSUPPORTED)/,
  ],
  ['await lib.UniFlow.random({ ...lib.presets.nano, num_hidden_layers: 1e9 })', /^(BAD_CHECKPOINT|BAD_INPUT|UNSUPPORTED|OUT_OF_MEMORY)/],
  ['await lib.UniFlow.random({ ...lib.presets.nano, num_decoder_layers: 1e9 })', /^(BAD_CHECKPOINT|BAD_INPUT|UNSUPPORTED|OUT_OF_MEMORY)/],
  ['await lib.UniFlow.random({ ...lib.presets.nano, image_size: 14 * 2 ** 30 })', /^(BAD_CHECKPOINT|BAD_INPUT|UNSUPPORTED|OUT_OF_MEMORY)/],
  [
    'await lib.UniFlow.random({ ...lib.presets.nano, hidden_size: 2 ** 24, vit_hidden_size: 2 ** 24 })',
    /^(BAD_CHECKPOINT|BAD_INPUT|UNSUPPORTED|OUT_OF_MEMORY)/,
  ],
  [
    'lib.UniFlow.fromEncoder(await lib.VisionEncoder.load(raw.fixture + "/../dinov2"), { latentChannels: 0 })',
    /^BAD_INPUT.*latentChannels/,
  ],
  ['lib.UniFlow.fromEncoder(await lib.VisionEncoder.load(raw.fixture + "/../dinov2"), { globalBlocks: 1e9 })', /^BAD_INPUT.*globalBlocks/],
  [
    'const u = await lib.UniFlow.load(raw.fixture); await u.encode(raw.fixture + "/../preprocess/photo.png", { size: 14 * 2 ** 20 })',
    /^(BAD_INPUT|OUT_OF_MEMORY)/,
  ],
];

// Slow: about 10 s, and longer with each script that kills the process.
describe('the addon survives', () => {
  let results: string[];
  beforeAll(async () => {
    results = await outcomes(survived.map(([script]) => script));
  }, 600_000);

  test.each(survived.map(([script, outcome], i) => ({ script, outcome, i })))('$script', ({ outcome, i }) => {
    expect(results[i]).toMatch(outcome);
  });
});
