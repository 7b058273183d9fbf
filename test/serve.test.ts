/** The HTTP service: real servers on free ports, real requests. */
import { afterAll, afterEach, beforeAll, describe, expect, test } from '@jest/globals';
import { Validator } from '@seriousme/openapi-schema-validator';
import autocannon from 'autocannon';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import http, { type RequestListener } from 'node:http';
import { connect, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';
import ndarray, { type NdArray } from 'ndarray';
import sharp from 'sharp';
import { cpuInfo, decodeImage, memoryStats, serve, setThreads, UniFlow, type Service, type ServeOptions } from '../lib/index.js';
import { ArrayFile } from '../lib/io/arrays.js';
import { Batcher, type Lane } from '../lib/serve/batcher.js';
import { isPublic } from '../lib/serve/remote.js';
import { decoded, encoded, reconstructed, type EncodedJson } from '../lib/serve/schemas.js';
import { tensorOfJson } from '../lib/serve/tensors.js';
import { relativeL2, tolerances } from './support.js';

const root = fileURLToPath(new URL('..', import.meta.url));
const IMAGES = 24;

let uniflow: UniFlow;
let dir: string;
let pngs: Buffer[]; // all different
let service: Service; // with defaults
const { threads } = cpuInfo();
const opened: { close(): unknown }[] = [];

beforeAll(async () => {
  setThreads(1); // a model this small gains nothing from more threads
  uniflow = UniFlow.random('nano');
  dir = await mkdtemp(join(tmpdir(), 'uniflow-serve-'));
  pngs = await Promise.all(Array.from({ length: IMAGES }, (_, i) => image(40 + i, 60, i)));
  service = await serve(uniflow, { port: 0 });
});
afterEach(async () => {
  for (const one of opened.splice(0)) await one.close();
});
afterAll(async () => {
  setThreads(threads);
  await service.close();
  await uniflow.dispose();
  await rm(dir, { recursive: true, force: true });
});

function image(width: number, height: number, i: number): Promise<Buffer> {
  const color = `rgb(${(i * 53) % 256}, ${(i * 97) % 256}, ${(i * 29) % 256})`;
  const circle = `<svg width="${width}" height="${height}"><circle cx="${(i * 7) % 40}" cy="50%" r="${10 + (i % 9)}" fill="white"/></svg>`;
  return sharp({ create: { width, height, channels: 3, background: color } })
    .composite([{ input: Buffer.from(circle) }])
    .png()
    .toBuffer();
}

async function started(options: ServeOptions): Promise<Service> {
  const one = await serve(uniflow, { port: 0, ...options });
  opened.push(one);
  return one;
}

interface Sent {
  to?: Service;
  type?: string;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

async function post(path: string, body: RequestInit['body'], { to = service, type, headers, signal }: Sent = {}): Promise<Response> {
  const all = { ...(type === undefined ? {} : { 'Content-Type': type }), ...headers };
  return fetch(to.url + path, { method: 'POST', body, headers: all, signal: signal ?? null });
}

const postImage = (path: string, bytes: Buffer, sent: Sent = {}): Promise<Response> => post(path, bytes, { type: 'image/png', ...sent });
const postJson = (path: string, value: unknown, sent: Sent = {}): Promise<Response> =>
  post(path, JSON.stringify(value), { type: 'application/json', ...sent });
const latentsOf = ({ latents }: EncodedJson): NdArray<Float32Array> => tensorOfJson(latents, 'latents');
const bytesOf = (array: NdArray): Uint8Array => {
  const { buffer, byteOffset, byteLength } = array.data as unknown as Uint8Array;
  return new Uint8Array(buffer, byteOffset, byteLength);
};
const options = (value: unknown): string => `?options=${encodeURIComponent(JSON.stringify(value))}`;

async function expectProblem(response: Response, status: number, rest: Record<string, unknown> = {}): Promise<Record<string, unknown>> {
  const body = (await response.json()) as Record<string, unknown>;
  expect({ status: response.status, ...body }).toMatchObject({ status, ...rest });
  expect(response.headers.get('content-type')).toMatch(/^application\/problem\+json/);
  return body;
}

/** Everything that a raw connection receives until the server ends it. */
async function spoken(to: Service, ...parts: string[]): Promise<string> {
  const socket = connect(Number(new URL(to.url).port), '127.0.0.1');
  let text = '';
  socket.on('data', (chunk) => (text += String(chunk))).on('error', () => undefined);
  for (const part of parts) socket.write(part);
  await once(socket, 'close');
  return text;
}

describe('encode', () => {
  test('an image as it is: the latents of the library, to the bit', async () => {
    const response = await postImage('/v1/encode', pngs[0]!);
    const answer = encoded.parse(await response.json());
    const expected = await uniflow.encode(pngs[0]!);
    expect({ ids: answer.ids, grid: answer.grid, shape: answer.latents.shape }).toEqual({
      ids: ['0'],
      grid: expected.grid,
      shape: expected.latents.shape,
    });
    expect(Buffer.compare(bytesOf(latentsOf(answer)), bytesOf(expected.latents))).toBe(0);
  });

  test('multipart: several files, names as ids, options, tokens', async () => {
    const form = new FormData();
    for (const [i, bytes] of pngs.slice(0, 3).entries()) form.append('files', new Blob([bytes]), `${i}.png`);
    form.append('options', JSON.stringify({ tokens: true, size: [28, 56] }));
    const answer = encoded.parse(await (await post('/v1/encode', form)).json());
    const expected = await uniflow.encode(pngs.slice(0, 3), { tokens: true, size: [28, 56] });
    expect({ ids: answer.ids, grid: answer.grid }).toEqual({ ids: ['0.png', '1.png', '2.png'], grid: { rows: 2, cols: 4 } });
    expect(relativeL2(latentsOf(answer), expected.latents)).toBeLessThan(tolerances.batch);
    expect(relativeL2(tensorOfJson(answer.tokens!, 'tokens'), expected.tokens!)).toBeLessThan(tolerances.batch);
  });

  test('as a safetensors file, which the library reads and decode takes', async () => {
    const images = pngs.slice(0, 2).map((bytes) => bytes.toString('base64'));
    const response = await postJson(
      '/v1/encode',
      { images, options: { size: [28, 56] } },
      { headers: { Accept: 'application/octet-stream' } },
    );
    const bytes = Buffer.from(await response.arrayBuffer());
    await writeFile(join(dir, 'latents.safetensors'), bytes);
    const file = new ArrayFile(join(dir, 'latents.safetensors'));
    expect(file.metadata).toEqual({ ids: '["0","1"]', grid: '2x4' });
    const expected = await uniflow.encode(pngs.slice(0, 2), { size: [28, 56] });
    expect(relativeL2(await file.read('latents'), expected.latents)).toBeLessThan(tolerances.batch);
    const { images: back } = decoded.parse(await (await post('/v1/decode', bytes, { type: 'application/octet-stream' })).json());
    expect(back.map(({ width, height }) => [height, width])).toEqual([
      [28, 56],
      [28, 56],
    ]);
  });

  test('many at once: each gets its own, whatever it was computed with', async () => {
    const to = await started({ maxWait: 50 });
    const answers = await Promise.all(pngs.map(async (bytes) => (await postImage('/v1/encode', bytes, { to })).json()));
    for (const [i, bytes] of pngs.entries()) {
      const { latents } = await uniflow.encode(bytes);
      expect(relativeL2(latentsOf(answers[i] as EncodedJson), latents)).toBeLessThan(tolerances.batch);
    }
    const metrics = await (await fetch(`${to.url}/metrics`)).text();
    expect(metrics).toContain(`uniflow_images_total{work="encode"} ${IMAGES}`);
    expect(Number(/uniflow_batch_images_count\{work="encode"\} (\d+)/.exec(metrics)?.[1])).toBeLessThan(IMAGES / 2);
  });
});

describe('decode and reconstruct', () => {
  test("encode's answer can be sent to decode as it is: the images of the library", async () => {
    const answer = (await (await postImage('/v1/encode', pngs[1]!)).json()) as EncodedJson;
    const sampling = { steps: 2, seed: 5, schedule: 'pow_0.5' as const, guidance: 1.5 };
    const response = await postJson('/v1/decode', { ...answer, options: sampling }, { headers: { Accept: 'image/png' } });
    expect(response.headers.get('content-type')).toBe('image/png');
    const { data } = await decodeImage(Buffer.from(await response.arrayBuffer()));
    const expected = await uniflow.decode(latentsOf(answer), sampling);
    expect(Buffer.compare(data, bytesOf(expected))).toBe(0);
  });

  test('requests with other options do not share a batch', async () => {
    const to = await started({ maxWait: 50 });
    const { latents } = await uniflow.encode(pngs[1]!);
    const body = { latents: { shape: latents.shape, dtype: 'float32', data: Buffer.from(bytesOf(latents)).toString('base64') } };
    const seeds = [1, 2, 1, 3];
    const answers = await Promise.all(
      seeds.map(async (seed) => decoded.parse(await (await postJson('/v1/decode', { ...body, options: { seed } }, { to })).json())),
    );
    for (const [i, seed] of seeds.entries()) {
      const { data } = await decodeImage(Buffer.from(answers[i]!.images[0]!.data, 'base64'));
      expect(Buffer.compare(data, bytesOf(await uniflow.decode(latents, { seed })))).toBe(0);
    }
  });

  test('reconstruct: one image as WebP, several as JSON with their scores', async () => {
    const one = await postImage('/v1/reconstruct', pngs[2]!, { headers: { Accept: 'image/webp' } });
    expect(await sharp(Buffer.from(await one.arrayBuffer())).metadata()).toMatchObject({ format: 'webp', width: 56, height: 56 });
    const images = pngs.slice(2, 4).map((bytes) => bytes.toString('base64'));
    const response = await postJson('/v1/reconstruct', { images, options: { format: 'image/jpeg' } }, { headers: { Accept: '*/*' } });
    const answer = reconstructed.parse(await response.json());
    const expected = await uniflow.reconstruct(pngs.slice(2, 4));
    expect(answer.images.map(({ id, type }) => [id, type])).toEqual([
      ['0', 'image/jpeg'],
      ['1', 'image/jpeg'],
    ]);
    expect(answer.psnr).toBeCloseTo(expected.psnr, 3);
    expect(answer.images[1]!.ssim).toBeCloseTo(expected.perImage.ssim[1]!, 3);
  });

  test('reconstruct: the original, as it was encoded, if requested', async () => {
    const form = new FormData();
    for (const bytes of pngs.slice(4, 6)) form.append('files', new Blob([bytes]));
    form.append('options', JSON.stringify({ original: true, size: [28, 56] }));
    const { images } = reconstructed.parse(await (await post('/v1/reconstruct', form)).json());
    const pixels = await Promise.all(images.map(async ({ original }) => (await decodeImage(Buffer.from(original!, 'base64'))).data));
    const expected = await uniflow.reconstruct({ pixels: ndarray(Buffer.concat(pixels), [2, 28, 56, 3]) });
    const sent = await uniflow.reconstruct(pngs.slice(4, 6), { size: [28, 56] });
    expect(expected.perImage).toEqual(sent.perImage);
    const alone = await postImage(`/v1/reconstruct${options({ original: true })}`, pngs[4]!, { headers: { Accept: 'image/png' } });
    await expectProblem(alone, 406, { subject: 'Accept' });
    const without = reconstructed.parse(await (await postImage('/v1/reconstruct', pngs[4]!)).json());
    expect(without.images[0]).not.toHaveProperty('original');
  });

  test('latents that are not finite fail alone', async () => {
    const to = await started({ maxWait: 100 });
    const { latents } = await uniflow.encode(pngs[1]!);
    const body = (array: NdArray): unknown => ({
      latents: { shape: array.shape, dtype: 'float32', data: Buffer.from(bytesOf(array)).toString('base64') },
    });
    const bad = ndarray(new Float32Array(latents.size).fill(NaN), latents.shape);
    const [good, other, refused] = await Promise.all([latents, latents, bad].map((one) => postJson('/v1/decode', body(one), { to })));
    expect([good!.status, other!.status]).toEqual([200, 200]);
    await expectProblem(refused!, 422, { code: 'BAD_INPUT' });
  });
});

describe('what is wrong with a request is said', () => {
  test('a broken image among several is named', async () => {
    const form = new FormData();
    form.append('files', new Blob([pngs[0]!]), 'good.png');
    form.append('files', new Blob([pngs[1]!.subarray(0, 100)]), 'cut.png');
    form.append('files', new Blob(['text']), 'text.png');
    const problem = await expectProblem(await post('/v1/encode', form), 422, { code: 'BAD_INPUT', subject: 'file 1 (cut.png)' });
    expect((problem['errors'] as { subject: string }[]).map(({ subject }) => subject)).toEqual(['file 1 (cut.png)', 'file 2 (text.png)']);
  });

  test.each([
    ['JSON that is none', '/v1/encode', '{"images":', 'application/json', 400],
    ['no images', '/v1/encode', '{"images":[]}', 'application/json', 422],
    ['another field', '/v1/encode', '{"images":["aaaa"],"imagse":1}', 'application/json', 422],
    ['base64 that is none', '/v1/encode', '{"images":["*"]}', 'application/json', 422],
    ['an unknown type', '/v1/encode', 'x', 'text/plain', 415],
    ['an empty image', '/v1/encode', '', 'image/png', 422],
    ['multipart without a boundary', '/v1/encode', 'x', 'multipart/form-data', 400],
    [
      'multipart that ends early',
      '/v1/encode',
      '--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nx',
      'multipart/form-data; boundary=b',
      400,
    ],
    [
      'multipart options that are no JSON, though they say so',
      '/v1/encode',
      '--b\r\nContent-Disposition: form-data; name="options"\r\nContent-Type: application/json\r\n\r\n{"size":\r\n--b--\r\n',
      'multipart/form-data; boundary=b',
      400,
    ],
    [
      'latents of another width',
      '/v1/decode',
      '{"latents":{"shape":[1,1,1],"dtype":"float32","data":"AAAAAA=="}}',
      'application/json',
      422,
    ],
    [
      'latents that are too short',
      '/v1/decode',
      '{"latents":{"shape":[1,16,16],"dtype":"float32","data":"AAAAAA=="}}',
      'application/json',
      422,
    ],
    ['a file that is not safetensors', '/v1/decode', 'xxxxxxxxxxxx', 'application/octet-stream', 422],
  ])('%s', async (_, path, body, type, status) => {
    await expectProblem(await post(path, body, { type }), status);
  });

  test('a compressed body is refused, and not taken for a broken image', async () => {
    const headers = { 'Content-Encoding': 'gzip' };
    const refused = await postImage('/v1/encode', gzipSync(pngs[0]!), { headers });
    await expectProblem(refused, 415, { subject: 'Content-Encoding', actual: "'gzip'" });
    expect(refused.headers.get('accept-encoding')).toBe('identity');
    expect((await postImage('/v1/encode', pngs[0]!, { headers: { 'Content-Encoding': 'identity' } })).status).toBe(200);
  });

  test.each([
    ['a size that no patch fits', { size: 13 }],
    ['a size beyond the limit', { size: 14 * 1024 }],
    ['steps beyond the limit', { steps: 101 }],
    ['a schedule that does not exist', { schedule: 'cosine' }],
    ['an unknown option', { sead: 1 }],
  ])('%s', async (_, wrong) => {
    const problem = await expectProblem(await postImage(`/v1/reconstruct${options(wrong)}`, pngs[0]!), 422, { code: 'BAD_INPUT' });
    expect(String(problem['subject'])).toMatch(/options|size/);
  });

  test('an answer that nobody can give, before anything is computed; a path that does not exist, or cannot; what is not HTTP', async () => {
    const to = await started({});
    for (const path of ['/v1/encode', '/v1/reconstruct'])
      await expectProblem(await postImage(path, pngs[0]!, { to, headers: { Accept: 'text/html' } }), 406);
    expect(await (await fetch(`${to.url}/metrics`)).text()).not.toMatch(/uniflow_images_total\{/);
    await expectProblem(await fetch(`${service.url}/v2/encode`), 404);
    const read = await fetch(`${service.url}/v1/encode?size=56`);
    await expectProblem(read, 405, { subject: 'method', expected: 'POST', actual: 'GET' });
    expect(read.headers.get('allow')).toBe('POST');
    await expectProblem(await post('/healthz', ''), 405, { expected: 'GET, HEAD' });
    await expectProblem(await fetch(`${service.url}/%zz`), 400);
    expect(await spoken(service, 'NONSENSE\r\n\r\n')).toMatch(/^HTTP\/1.1 400 [^]*application\/problem\+json[^]*"status":400/);
  });
});

describe('what may be sent is said', () => {
  test('to who sends another type, or none', async () => {
    const refused = await post('/v1/encode', 'a=1', { type: 'application/x-www-form-urlencoded' });
    const expected = 'image/*, application/octet-stream, multipart/form-data, application/json';
    await expectProblem(refused, 415, { subject: 'Content-Type', expected, actual: "'application/x-www-form-urlencoded'" });
    expect(refused.headers.get('accept-post')).toBe(expected);
    const text = await post('/v1/decode', 'latents', { type: 'text/plain' });
    await expectProblem(text, 415, { expected: 'application/octet-stream, multipart/form-data, application/json' });
  });

  test('to who sends too much', async () => {
    const to = await started({ maxBody: 4000, maxImages: 2 });
    await expectProblem(await postImage('/v1/encode', Buffer.alloc(5000), { to }), 413, {
      expected: 'at most 4000 bytes',
      actual: '5000',
    });
    const three = new FormData();
    for (let i = 0; i < 3; i++) three.append('files', new Blob([pngs[0]!.subarray(0, 50)]), `${i}`);
    await expectProblem(await post('/v1/encode', three, { to }), 413, { expected: 'at most 2 files' });
  });
});

describe('pages of other origins', () => {
  const ask = (to: Service, origin: string): Promise<Response> =>
    fetch(`${to.url}/v1/encode`, {
      method: 'OPTIONS',
      headers: { Origin: origin, 'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'authorization' },
    });

  test('may ask where they are allowed, also before they show the token', async () => {
    const to = await started({ cors: ['https://example.org'], token: 'secret' });
    const allowed = await ask(to, 'https://example.org');
    expect(allowed.status).toBe(204);
    expect(Object.fromEntries(allowed.headers)).toMatchObject({
      'access-control-allow-origin': 'https://example.org',
      'access-control-allow-methods': 'GET, HEAD, POST',
      'access-control-allow-headers': 'authorization',
      vary: 'Origin',
    });
    const headers = { Origin: 'https://example.org', Authorization: 'Bearer secret' };
    const answer = await postImage('/v1/encode', pngs[0]!, { to, headers });
    expect([answer.status, answer.headers.get('access-control-allow-origin')]).toEqual([200, 'https://example.org']);
    expect((await ask(to, 'https://example.com')).headers.get('access-control-allow-origin')).toBeNull();
    expect((await ask(await started({ cors: ['*'] }), 'https://example.com')).headers.get('access-control-allow-origin')).toBe('*');
  });

  test('may not by default; what is no origin is refused', async () => {
    const refused = await ask(service, 'https://example.org');
    expect([refused.status, refused.headers.get('access-control-allow-origin')]).toEqual([405, null]);
    await expect(serve(uniflow, { port: 0, cors: ['example.org'] })).rejects.toMatchObject({ code: 'BAD_INPUT', subject: 'cors' });
  });
});

test('data: URLs are images, wherever a URL or base64 may stand', async () => {
  const url = `data:image/png;base64,${pngs[0]!.toString('base64')}`;
  const escaped = `data:image/png,${[...pngs[0]!].map((byte) => `%${byte.toString(16).padStart(2, '0')}`).join('')}`;
  const { ids, ...rest } = encoded.parse(await (await postJson('/v1/encode', { images: [url, { url }, escaped] })).json());
  const { latents } = await uniflow.encode([pngs[0]!, pngs[0]!, pngs[0]!]);
  expect(ids).toEqual(['0', '1', '2']);
  expect(relativeL2(latentsOf({ ids, ...rest }), latents)).toBeLessThan(tolerances.batch);
  await expectProblem(await postJson('/v1/encode', { images: ['data:image/png;base64'] }), 422, { subject: 'images[0]' });
  await expectProblem(await postJson('/v1/encode', { images: ['data:image/png;base64,*'] }), 422, { subject: 'images[0]' });
});

describe('limits', () => {
  test('of the body, of an image, of their number', async () => {
    const to = await started({ maxBody: 4000, maxPixels: 40 * 60, maxImages: 2 });
    const big = Buffer.alloc(5000);
    await expectProblem(await postImage('/v1/encode', big, { to }), 413);
    const form = new FormData();
    form.append('files', new Blob([big]), 'big');
    await expectProblem(await post('/v1/encode', form, { to }), 413);
    await expectProblem(await postImage('/v1/encode', pngs[3]!, { to }), 422, { actual: '2580 (43 x 60)' });
    await expectProblem(await postJson('/v1/encode', { images: ['', '', ''] }, { to }), 413, { subject: 'images' });
    const three = new FormData();
    for (let i = 0; i < 3; i++) three.append('files', new Blob([pngs[0]!]), `${i}`);
    await expectProblem(await post('/v1/encode', three, { to }), 413);
    expect((await postImage('/v1/encode', pngs[0]!, { to })).status).toBe(200);
  });

  test('a body without a length is cut off at the limit', async () => {
    const to = await started({ maxBody: 4000 });
    const chunk = `3e8\r\n${'x'.repeat(1000)}\r\n`;
    const head =
      'POST /v1/encode HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n';
    expect(await spoken(to, head, chunk.repeat(5), '0\r\n\r\n')).toMatch(/^HTTP\/1.1 413 /);
  });

  test('JSON of many values, which take far more memory than their text, is refused unread', async () => {
    const many = (value: string): string => `[${Array<string>(70_000).fill(value).join()}]`;
    const latents = (shape: string): string => `"latents":{"shape":${shape},"dtype":"float32","data":""}`;
    for (const json of [`{${latents(many('0'))}}`, `{${latents('[1,1,16]')},"tokens":${many('{}')}}`, '['.repeat(70_000)])
      await expectProblem(await post('/v1/decode', json, { type: 'application/json' }), 413, { subject: 'body' });
    const header = Buffer.from(`{"latents":{"dtype":"F32","shape":${many('0')},"data_offsets":[0,0]}}`);
    const length = Buffer.alloc(8);
    length.writeUInt32LE(header.length);
    const file = Buffer.concat([length, header]);
    await expectProblem(await post('/v1/decode', file, { type: 'application/octet-stream' }), 413, { subject: 'body' });
    const wrong = `{${latents(`[${Array(1000).fill(0).join()}]`)}}`;
    const { errors } = await expectProblem(await post('/v1/decode', wrong, { type: 'application/json' }), 422);
    expect(errors).toHaveLength(20); // the list is limited
  });

  test('a full queue: 503 with Retry-After, and everybody else is served', async () => {
    const to = await started({ maxQueue: 4, maxImages: 2, maxWait: 20 });
    const answers = await Promise.all(Array.from({ length: 40 }, (_, i) => postImage('/v1/encode', pngs[i % IMAGES]!, { to })));
    const refused = answers.filter(({ status }) => status === 503);
    expect(refused.length).toBeGreaterThan(0);
    expect(answers.filter(({ status }) => status === 200).length).toBe(40 - refused.length);
    for (const one of refused) expect(Number(one.headers.get('retry-after'))).toBeGreaterThanOrEqual(1);
    await expectProblem(refused[0]!, 503);
    expect((await postImage('/v1/encode', pngs[0]!, { to })).status).toBe(200);
  });

  test('requests under way are limited before their bodies are read', async () => {
    const to = await started({ maxRequests: 1, timeout: 5000 });
    const socket = connect(Number(new URL(to.url).port), '127.0.0.1');
    socket.write('POST /v1/encode HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nx');
    await waitFor(async () => (await postImage('/v1/encode', pngs[0]!, { to })).status === 503);
    socket.destroy();
    await waitFor(async () => (await postImage('/v1/encode', pngs[0]!, { to })).status === 200);
  });

  test('also of those who write the path in another way', async () => {
    const to = await started({ maxRequests: 1, timeout: 5000 });
    const request = (path: string): string =>
      `POST ${path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: image/png\r\nContent-Length: 1\r\n\r\n`;
    const socket = connect(Number(new URL(to.url).port), '127.0.0.1');
    socket.write(request('/%761/encode'));
    await waitFor(async () => (await postImage('/v1/encode', pngs[0]!, { to })).status === 503);
    for (const path of ['/%761/encode', '/v1/enc%6fde', 'http://x/v1/encode'])
      expect(await spoken(to, request(path), 'x')).toMatch(/^HTTP\/1.1 503 /);
    socket.destroy();
  });

  test('clients that leave while their requests wait behind each other on one connection make room', async () => {
    const to = await started({ maxRequests: 4, maxWait: 300 });
    const request = Buffer.concat([
      Buffer.from(`POST /v1/encode HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: ${pngs[0]!.length}\r\n\r\n`),
      pngs[0]!,
    ]);
    const socket = connect(Number(new URL(to.url).port), '127.0.0.1');
    socket.write(Buffer.concat([request, request, request, request]));
    const metrics = async (): Promise<string> => (await fetch(`${to.url}/metrics`)).text();
    await waitFor(async () => /^uniflow_queue_images 4$/m.test(await metrics()));
    socket.destroy();
    await waitFor(async () => /^uniflow_queue_images 0$/m.test(await metrics()));
    expect(await metrics()).toContain('uniflow_requests_total{route="/v1/encode",status="499"} 4');
    expect(await metrics()).not.toMatch(/uniflow_images_total\{/);
    const answers = await Promise.all(pngs.slice(0, 4).map((bytes) => postImage('/v1/encode', bytes, { to })));
    expect(answers.map(({ status }) => status)).toEqual([200, 200, 200, 200]);
  });

  test('slow clients: 408, and the connection is closed', async () => {
    const to = await started({ timeout: 300 });
    const head = 'POST /v1/encode HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nx';
    expect(await spoken(to, head)).toMatch(/^HTTP\/1.1 408 [^]*problem\+json/);
    expect(await spoken(to, 'POST /v1/enc')).toMatch(/^HTTP\/1.1 408 /);
  });

  test('who reads the answer too slowly is cut off, and makes room', async () => {
    const to = await started({ maxRequests: 1, timeout: 1500 });
    const body = JSON.stringify({ images: Array(24).fill(pngs[0]!.toString('base64')), options: { tokens: true, size: 448 } });
    const socket = connect(Number(new URL(to.url).port), '127.0.0.1').on('error', () => undefined);
    socket.write(`POST /v1/encode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
    const reading = setInterval(() => socket.read(10_000), 50);
    opened.unshift({ close: () => (clearInterval(reading), socket.destroy()) });
    await once(socket, 'readable');
    expect((await postImage('/v1/encode', pngs[0]!, { to })).status).toBe(503);
    await waitFor(async () => (await postImage('/v1/encode', pngs[0]!, { to })).status === 200);
  });

  test('the token', async () => {
    const to = await started({ token: 'secret' });
    for (const Authorization of ['', 'Bearer', 'Bearer secrets', 'Basic secret']) {
      const refused = await postImage('/v1/encode', pngs[0]!, { to, headers: { Authorization } });
      await expectProblem(refused, 401);
      expect(refused.headers.get('www-authenticate')).toBe('Bearer');
    }
    expect((await fetch(`${to.url}/metrics`)).status).toBe(401);
    expect((await fetch(`${to.url}/healthz`)).status).toBe(200);
    expect((await postImage('/v1/encode', pngs[0]!, { to, headers: { Authorization: 'Bearer secret' } })).status).toBe(200);
  });

  test('options that cannot be are refused', async () => {
    for (const wrong of [{ maxBatch: 0 }, { port: 70000 }, { token: '' }, { timeout: 0.5 }, { allowUrls: ['a/b'] }] as ServeOptions[])
      await expect(serve(uniflow, { port: 0, ...wrong })).rejects.toMatchObject({ code: 'BAD_INPUT', subject: Object.keys(wrong)[0] });
  });
});

async function waitFor(check: () => boolean | Promise<boolean>): Promise<void> {
  for (const end = Date.now() + 10_000; !(await check());) {
    if (Date.now() > end) throw new Error('it did not happen');
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

describe('URLs', () => {
  let asked: string[];
  /** Starts a host on this machine. */
  async function host(listener: RequestListener): Promise<string> {
    asked = [];
    const server = http.createServer((request, response) => {
      asked.push(request.url ?? '');
      listener(request, response);
    });
    await once(server.listen(0, '127.0.0.1'), 'listening');
    opened.push({ close: () => server.close() });
    return `localhost:${(server.address() as AddressInfo).port}`;
  }
  const encodeUrl = (to: Service, url: string): Promise<Response> => postJson('/v1/encode', { images: [{ url }] }, { to });

  test('of a host that is allowed', async () => {
    const at = await host((_, response) => void response.end(pngs[5]));
    const to = await started({ allowUrls: [at], allowAddress: () => true });
    const answer = encoded.parse(await (await encodeUrl(to, `http://${at}/5.png`)).json());
    expect(answer.ids).toEqual([`http://${at}/5.png`]);
    expect(relativeL2(latentsOf(answer), (await uniflow.encode(pngs[5]!)).latents)).toBeLessThan(tolerances.batch);
  });

  test('of no other: not by default, not by another port, scheme or name', async () => {
    const at = await host((_, response) => void response.end(pngs[5]));
    const to = await started({ allowUrls: [at], allowAddress: () => true });
    await expectProblem(await encodeUrl(service, `http://${at}/`), 422, { code: 'UNSUPPORTED', subject: 'images[0]', actual: at });
    for (const url of [
      'http://localhost/',
      `http://user:pw@${at}/`,
      'file:///etc/passwd',
      `http://${at.replace('localhost', '127.0.0.1')}/`,
    ])
      await expectProblem(await encodeUrl(to, url), 422, { subject: 'images[0]' });
    expect(asked).toEqual([]);
  });

  test('never of an address that is not public, whatever its name', async () => {
    const at = await host((_, response) => void response.end(pngs[5]));
    const numeric = at.replace('localhost', '127.0.0.1');
    const to = await started({ allowUrls: [at, numeric] });
    for (const url of [`http://${at}/`, `http://${numeric}/`, `http://${numeric.replace('127.0.0.1', '0x7f.1')}/`])
      await expectProblem(await encodeUrl(to, url), 422, { code: 'UNSUPPORTED', expected: 'a host with a public address' });
    expect(asked).toEqual([]);
  });

  test('a redirect is checked like the first request', async () => {
    const at = await host((request, response) => {
      const to = { '/out': 'http://example.invalid/', '/in': `http://${at}/image`, '/loop': '/loop', '/file': 'file:///etc/passwd' }[
        request.url ?? ''
      ];
      if (to === undefined) response.end(pngs[5]);
      else response.writeHead(302, { Location: to }).end();
    });
    const to = await started({ allowUrls: [at], allowAddress: () => true });
    expect((await encodeUrl(to, `http://${at}/in`)).status).toBe(200);
    for (const path of ['/out', '/file']) await expectProblem(await encodeUrl(to, `http://${at}${path}`), 422);
    await expectProblem(await encodeUrl(to, `http://${at}/loop`), 502, { expected: 'at most 3 redirects' });
  });

  test('what is too large, missing, or cut off is refused', async () => {
    const at = await host((request, response) => {
      if (request.url === '/large') response.end(Buffer.alloc(10_000));
      else if (request.url === '/small') response.end(Buffer.alloc(3000));
      else if (request.url === '/cut') response.writeHead(200, { 'Content-Length': 100 }).write('x', () => response.destroy());
      else response.writeHead(404).end();
    });
    const to = await started({ allowUrls: [at], allowAddress: () => true, maxBody: 5000 });
    await expectProblem(await encodeUrl(to, `http://${at}/large`), 422, { expected: 'at most 5000 bytes in all' });
    await expectProblem(await encodeUrl(to, `http://${at}/cut`), 502, { code: 'NETWORK' });
    await expectProblem(await encodeUrl(to, `http://${at}/none`), 502, { actual: '404' });
    const twice = { images: [{ url: `http://${at}/small` }, { url: `http://${at}/small` }] };
    const { errors } = await expectProblem(await postJson('/v1/encode', twice, { to }), 422);
    expect(errors).toContainEqual(expect.objectContaining({ expected: 'at most 5000 bytes in all' }));
  });

  test('addresses', () => {
    const inside = [
      '127.0.0.1',
      '10.1.2.3',
      '172.16.0.1',
      '192.168.1.1',
      '169.254.169.254',
      '100.64.0.1',
      '0.0.0.0',
      '224.0.0.1',
      '255.255.255.255',
    ];
    const inside6 = [
      '::1',
      '::',
      'fe80::1',
      'fc00::1',
      'fec0::1',
      '::ffff:127.0.0.1',
      '::127.0.0.1',
      '64:ff9b::7f00:1',
      '2002:7f00:1::',
      'ff02::1',
    ];
    expect([...inside, ...inside6].filter(isPublic)).toEqual([]);
    expect(['8.8.8.8', '2606:4700::1111', '::ffff:8.8.8.8'].every(isPublic)).toBe(true);
  });
});

describe('what it tells of itself', () => {
  test('the OpenAPI document is valid, with and without a token', async () => {
    for (const to of [service, await started({ token: 't' })]) {
      const document = (await (await fetch(`${to.url}/openapi.json`, { headers: { Authorization: 'Bearer t' } })).json()) as {
        paths: Record<string, { post: { responses: object } }>;
      };
      expect(await new Validator().validate(document)).toEqual({ valid: true });
      expect(Object.keys(document.paths)).toEqual(expect.arrayContaining(['/v1/encode', '/v1/decode', '/v1/reconstruct', '/metrics']));
      const statuses = Object.keys(document.paths['/v1/encode']!.post.responses).map(Number);
      expect(statuses).toEqual([200, 400, 401, 406, 408, 413, 415, 422, 500, 502, 503]);
    }
  });

  test('metrics', async () => {
    await postImage('/v1/encode', Buffer.from('x'));
    const text = await (await fetch(`${service.url}/metrics`)).text();
    for (const line of [
      /^uniflow_requests_total\{route="\/v1\/encode",status="422"\} [1-9]/m,
      /^uniflow_request_seconds_bucket\{le="1",route="\/v1\/encode"\} [1-9]/m,
      /^uniflow_batch_images_sum\{work="encode"\} [1-9]/m,
      /^uniflow_queue_images 0$/m,
      /^uniflow_native_memory_bytes [1-9]\d{4}/m,
      /^process_resident_memory_bytes [1-9]/m,
    ])
      expect(text).toMatch(line);
  });
});

describe('the batcher', () => {
  const lane = (run: Lane<number, number>['run'], maxBatch = 4): Lane<number, number> => ({ key: 'k', maxBatch, run });
  const never = new AbortController().signal;

  test('starts a batch when it is full, or when its first item has waited long enough', async () => {
    const sizes: number[] = [];
    const batcher = new Batcher(30);
    const l = lane((items) => {
      sizes.push(items.length);
      return Promise.resolve(items.map((n) => n * 2));
    });
    expect(await Promise.all([1, 2, 3, 4, 5].map((n) => batcher.submit(l, n, never)))).toEqual([2, 4, 6, 8, 10]);
    expect(sizes).toEqual([4, 1]);
  });

  test('who leaves is not computed; a batch that all have left is stopped', async () => {
    const seen: number[][] = [];
    const batcher = new Batcher(20);
    const l = lane(
      (items, signal) =>
        new Promise((_, reject) => {
          seen.push(items);
          signal.addEventListener('abort', () => reject(new Error('stopped')));
        }),
    );
    const [first, second] = [new AbortController(), new AbortController()];
    const outcomes = Promise.allSettled([batcher.submit(l, 1, first.signal), batcher.submit(l, 2, second.signal)]);
    first.abort();
    await waitFor(() => seen.length > 0);
    second.abort();
    expect((await outcomes).map((o) => (o as PromiseRejectedResult).reason.code)).toEqual(['ABORTED', 'ABORTED']);
    expect(seen).toEqual([[2]]);
  });

  test('what breaks a batch fails alone', async () => {
    const l = lane((items) => (items.includes(2) ? Promise.reject(new Error('two')) : Promise.resolve(items)));
    const batcher = new Batcher(0);
    const outcomes = await Promise.allSettled([1, 2, 3, 4].map((n) => batcher.submit(l, n, never)));
    expect(outcomes.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled', 'fulfilled']);
  });
});

describe('life', () => {
  test('clients that leave make room, and nothing else', async () => {
    const to = await started({ maxWait: 300, maxQueue: 8, maxImages: 8 });
    const controller = new AbortController();
    const left = Array.from({ length: 8 }, (_, i) => postImage('/v1/encode', pngs[i]!, { to, signal: controller.signal }));
    for (const one of left) one.catch(() => undefined);
    await waitFor(async () => /^uniflow_queue_images 8$/m.test(await (await fetch(`${to.url}/metrics`)).text()));
    expect((await fetch(`${to.url}/readyz`)).status).toBe(503);
    controller.abort();
    await waitFor(async () => /^uniflow_queue_images 0$/m.test(await (await fetch(`${to.url}/metrics`)).text()));
    expect(await (await fetch(`${to.url}/metrics`)).text()).not.toMatch(/uniflow_images_total\{/);
    expect((await postImage('/v1/encode', pngs[0]!, { to })).status).toBe(200);
  });

  test('close finishes what is under way and takes no more', async () => {
    const to = await started({ maxWait: 300 });
    const under = Promise.all(pngs.slice(0, 6).map((bytes) => postImage('/v1/encode', bytes, { to })));
    await waitFor(async () => /^uniflow_queue_images 6$/m.test(await (await fetch(`${to.url}/metrics`)).text()));
    const closed = to.close();
    expect((await under).map(({ status }) => status)).toEqual([200, 200, 200, 200, 200, 200]);
    await closed;
    await expect(postImage('/v1/encode', pngs[0]!, { to })).rejects.toThrow();
  });

  test('close ends at once where no request is under way, however clients hold on to their connections', async () => {
    const to = await started({ drain: 60_000 });
    const port = Number(new URL(to.url).port);
    const silent = connect(port, '127.0.0.1').on('error', () => undefined);
    await once(silent, 'connect');
    const kept = connect(port, '127.0.0.1').on('error', () => undefined);
    kept.write('GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n');
    await once(kept, 'data');
    const began = performance.now();
    await to.close();
    expect(performance.now() - began).toBeLessThan(2000);
  });

  test('close does not wait for ever: 503 for what is under way, slow connections are cut', async () => {
    const to = await started({ maxWait: 60_000, drain: 100 });
    const socket = connect(Number(new URL(to.url).port), '127.0.0.1').on('error', () => undefined);
    socket.write('POST /v1/encode HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nx');
    const under = postImage('/v1/encode', pngs[0]!, { to });
    await waitFor(async () => /^uniflow_queue_images 1$/m.test(await (await fetch(`${to.url}/metrics`)).text()));
    const began = performance.now();
    await to.close();
    expect(performance.now() - began).toBeLessThan(5000);
    expect((await under).headers.get('retry-after')).toBe('1');
    await expectProblem(await under, 503);
  });

  test('500 requests leave no handle and no tensor behind', async () => {
    const to = await started({});
    const state = async (): Promise<[number, number]> => {
      await new Promise((resolve) => setTimeout(resolve, 50));
      return [process.getActiveResourcesInfo().filter((name) => name !== 'TCPSocketWrap').length, memoryStats().handles];
    };
    const round = (n: number): Promise<unknown> =>
      Promise.all(Array.from({ length: n }, async (_, i) => (await postImage('/v1/encode', pngs[i % IMAGES]!, { to })).arrayBuffer()));
    await round(20);
    const before = await state();
    for (let i = 0; i < 10; i++) await round(50);
    const after = await state();
    expect(after[0]).toBeLessThanOrEqual(before[0] + 3);
    expect(after[1]).toBeLessThanOrEqual(before[1]);
  });

  test('under load: every answer is 200 or 503', async () => {
    const to = await started({ maxQueue: 32, maxImages: 1 });
    const { statusCodeStats, errors } = await autocannon({
      ...{ url: `${to.url}/v1/encode`, method: 'POST', headers: { 'content-type': 'image/png' }, body: pngs[0]! },
      ...{ connections: 64, duration: 3 },
    });
    expect(errors).toBe(0);
    expect(Object.keys(statusCodeStats ?? {}).every((status) => ['200', '503'].includes(status))).toBe(true);
    expect(statusCodeStats?.['200']?.count ?? 0).toBeGreaterThan(0);
  });
});

describe('uniflow serve', () => {
  test('says where it is, serves, and ends with 0 when told to stop', async () => {
    const model = join(dir, 'model');
    await uniflow.save(model);
    const args = [
      '--import',
      'tsx',
      join('lib', 'cli', 'main.ts'),
      'serve',
      '--model',
      model,
      '--port',
      '0',
      '--max-wait',
      '300',
      '--json',
    ];
    const child = spawn(process.execPath, args, { cwd: root, env: { ...process.env, NODE_OPTIONS: '', UNIFLOW_TOKEN: 'secret' } });
    const ended = once(child, 'close');
    const [line] = (await once(child.stdout, 'data')) as [Buffer];
    const to = JSON.parse(String(line)) as Service;
    const under = postImage('/v1/encode', pngs[0]!, { to, headers: { Authorization: 'Bearer secret' } });
    await new Promise((resolve) => setTimeout(resolve, 150));
    child.kill('SIGTERM');
    const answer = encoded.parse(await (await under).json());
    expect(relativeL2(latentsOf(answer), (await uniflow.encode(pngs[0]!)).latents)).toBeLessThan(tolerances.batch);
    expect(await ended).toEqual([0, null]);
  });
});
