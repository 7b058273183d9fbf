import { scanCacheDir } from '@huggingface/hub';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, jest, test } from '@jest/globals';
import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readdir, readFile, readlink, rm, writeFile } from 'node:fs/promises';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { UniFlowError } from '../lib/errors.js';
import { type HubProgress, resolveModel } from '../lib/io/hub.js';

type Files = Record<string, Buffer>;
type Handler = (request: IncomingMessage, response: ServerResponse) => void;

const COMMITS = ['1'.repeat(40), '2'.repeat(40)] as const;
const WEIGHTS = Buffer.alloc(700_001, 'weights');
const SMALL: Files = {
  'config.json': Buffer.from('{"model_type":"test"}'),
  'preprocessor_config.json': Buffer.from('{}'),
};
const SINGLE: Files = { ...SMALL, 'model.safetensors': WEIGHTS, 'README.md': Buffer.from('# Test'), 'pytorch_model.bin': WEIGHTS };

const sizeOf = (files: Files, names: string[]): number => names.reduce((sum, name) => sum + files[name]!.length, 0);
const sha256 = (data: Buffer): string => createHash('sha256').update(data).digest('hex');
const gitOid = (data: Buffer): string => createHash('sha1').update(`blob ${data.length}\0`).update(data).digest('hex');

function sharded(shards: Files): Files {
  const names = Object.keys(shards);
  const weight_map = Object.fromEntries(
    names.flatMap((name, i) => [
      [`a.${i}`, name],
      [`b.${i}`, name],
    ]),
  );
  return { ...SMALL, 'model.safetensors.index.json': Buffer.from(JSON.stringify({ metadata: {}, weight_map })), ...shards };
}

/** A hub with the repository `org/model`, which redirects safetensors to another origin, like the real hub. */
class FakeHub {
  readonly requests: string[] = [];
  readonly tokens: (string | undefined)[] = [];
  readonly cdnTokens: (string | undefined)[] = [];
  files: Files = SINGLE;
  commit: string = COMMITS[0];
  /** Handles a request itself if it returns true. */
  intercept: (request: IncomingMessage, response: ServerResponse) => boolean = () => false;
  /** Sends the body of a file from the other origin. */
  send = (response: ServerResponse, data: Buffer): void => void response.end(data);
  endpoint = '';
  private cdnEndpoint = '';
  private readonly servers: Server[] = [];

  async start(): Promise<void> {
    this.endpoint = await this.listen((request, response) => this.answer(request, response));
    this.cdnEndpoint = await this.listen((request, response) => {
      this.cdnTokens.push(request.headers.authorization);
      const data = this.files[request.url!.slice(1)]!;
      response.setHeader('Content-Length', data.length);
      this.send(response, data);
    });
  }

  async stop(): Promise<void> {
    for (const server of this.servers) {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    }
  }

  /** Names of the files whose contents were requested. */
  get downloads(): string[] {
    return this.requests.filter((url) => url.includes('/resolve/')).map((url) => url.split('/').at(-1)!);
  }

  private listen(handler: Handler): Promise<string> {
    const server = createServer(handler);
    this.servers.push(server);
    return new Promise((resolve) => {
      server.listen(0, '127.0.0.1', () => resolve(`http://127.0.0.1:${(server.address() as AddressInfo).port}`));
    });
  }

  private answer(request: IncomingMessage, response: ServerResponse): void {
    const { pathname } = new URL(request.url!, this.endpoint);
    this.requests.push(pathname);
    this.tokens.push(request.headers.authorization);
    if (this.intercept(request, response)) return;
    const info = /^\/api\/models\/org\/model\/revision\/(.+)$/.exec(pathname)?.[1];
    if (info && ['main', 'refs/pr/1', this.commit].includes(decodeURIComponent(info))) {
      json(response, 200, { _id: '1', id: 'org/model', sha: this.commit, lastModified: '2025-01-01T00:00:00.000Z' });
    } else if (pathname === `/api/models/org/model/tree/${this.commit}`) json(response, 200, this.tree());
    else if (pathname.startsWith(`/org/model/resolve/${this.commit}/`)) this.resolve(response, pathname.split('/').at(-1)!);
    else json(response, 404, { error: 'Repository not found' });
  }

  private tree(): unknown[] {
    return Object.entries(this.files).map(([path, data]) => {
      const entry = { type: 'file', path, size: data.length, oid: gitOid(data) };
      return path.endsWith('.safetensors') ? { ...entry, lfs: { oid: sha256(data), size: data.length, pointerSize: 134 } } : entry;
    });
  }

  private resolve(response: ServerResponse, name: string): void {
    const data = this.files[name]!;
    response.setHeader('X-Repo-Commit', this.commit);
    if (!name.endsWith('.safetensors')) {
      response.setHeader('ETag', `"${gitOid(data)}"`).end(data);
      return;
    }
    response.setHeader('X-Linked-Size', data.length).setHeader('X-Linked-Etag', `"${sha256(data)}"`);
    response.writeHead(302, { Location: `${this.cdnEndpoint}/${name}` }).end();
  }
}

function json(response: ServerResponse, status: number, value: unknown): void {
  response.writeHead(status, { 'Content-Type': 'application/json' }).end(JSON.stringify(value));
}

const ENVIRONMENT = [
  ...['HF_ENDPOINT', 'HF_HOME', 'HF_HUB_CACHE', 'HF_HUB_OFFLINE', 'HF_TOKEN', 'HF_TOKEN_PATH'],
  ...['HUGGING_FACE_HUB_TOKEN', 'HUGGINGFACE_HUB_CACHE'],
];
const before = Object.fromEntries(ENVIRONMENT.map((name) => [name, process.env[name]]));

let root: string;
let hub: FakeHub;
let cacheDir: string;
let events: HubProgress[];

beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), 'uniflow-hub-'));
});
beforeEach(async () => {
  hub = new FakeHub();
  await hub.start();
  cacheDir = await mkdtemp(join(root, 'cache-'));
  events = [];
  for (const name of ENVIRONMENT) delete process.env[name];
  process.env['HF_ENDPOINT'] = hub.endpoint;
  process.env['HF_HOME'] = join(root, 'home'); // does not exist, so that the tests never use the developer's token
});
afterEach(() => hub.stop());
afterAll(async () => {
  for (const [name, value] of Object.entries(before)) {
    if (value === undefined) delete process.env[name];
    else process.env[name] = value;
  }
  await rm(root, { recursive: true, force: true });
});

const load = (options: Parameters<typeof resolveModel>[1] = {}, model = 'org/model'): Promise<string> =>
  resolveModel(model, { cacheDir, onProgress: (event) => events.push(event), ...options });
const failure = (promise: Promise<unknown>): Promise<UniFlowError> =>
  promise.then(
    (value) => Promise.reject(new Error(`unexpected success: ${String(value)}`)),
    (error: UniFlowError) => error,
  );
/** Faster than `toEqual`, which takes a second for a file of this size. */
const holds = async (path: string, data: Buffer): Promise<boolean> => data.equals(await readFile(path));
const repository = (...path: string[]): string => join(cacheDir, 'models--org--model', ...path);
const snapshot = (commit: string = hub.commit): string => repository('snapshots', commit);
const partial = async (): Promise<string[]> => (await readdir(cacheDir, { recursive: true })).filter((name) => name.includes('incomplete'));

describe('a path', () => {
  test('of a folder is returned as it is', async () => {
    expect(await load({}, root)).toBe(root);
    expect(hub.requests).toEqual([]);
  });

  test.each(['./missing', '../missing', '/missing', '~/missing', 'a/b/c', 'a\\b', '.'.repeat(3)])('%s is no such folder', async (path) => {
    const error = await failure(load({}, path));
    expect(error).toMatchObject({ code: 'NOT_FOUND', message: `${path}: no such folder` });
  });

  test('of a file is not a model', async () => {
    const path = join(root, 'model.safetensors');
    await writeFile(path, 'x');
    expect(await failure(load({}, path))).toMatchObject({ code: 'BAD_INPUT', subject: path });
  });

  test.each(['', 'model', 'org/', 'org/mo del', 'org/model?x', 'org/a..b', 'org--x/a', '-org/a'])(
    '%j is neither path nor name',
    async (name) => {
      const error = await failure(load({}, name));
      expect(error.code).toBe('BAD_INPUT');
      expect(error.message).toContain('owner/name');
      expect(hub.requests).toEqual([]);
    },
  );

  test.each(['', '../main', '/main', 'a\\b'])('the revision %j is refused', async (revision) => {
    expect(await failure(load({ revision }))).toMatchObject({ code: 'BAD_INPUT', subject: 'revision' });
  });
});

describe('a download', () => {
  const needed = ['config.json', 'preprocessor_config.json', 'model.safetensors'];

  test('has the files of the model, and reports every byte', async () => {
    const dir = await load();
    expect(dir).toBe(snapshot());
    expect((await readdir(dir)).sort()).toEqual([...needed].sort());
    for (const name of needed) expect(await holds(join(dir, name), SINGLE[name]!)).toBe(true);
    const total = sizeOf(SINGLE, needed);
    expect(events.length).toBeGreaterThan(3);
    expect(events.every((event, i) => event.total === total && event.loaded > (events[i - 1]?.loaded ?? 0))).toBe(true);
    expect(events.at(-1)).toEqual({ file: 'model.safetensors', loaded: total, total });
  });

  test('has the layout of the cache of huggingface_hub', async () => {
    await load();
    expect(await readFile(repository('refs', 'main'), 'utf8')).toBe(hub.commit);
    expect(await readlink(join(snapshot(), 'model.safetensors'))).toBe(`../../blobs/${sha256(WEIGHTS)}`);
    expect(await readlink(join(snapshot(), 'config.json'))).toBe(`../../blobs/${gitOid(SMALL['config.json']!)}`);
    expect(await partial()).toEqual([]);
    const { repos, warnings } = await scanCacheDir(cacheDir);
    expect(warnings).toEqual([]);
    expect(repos).toMatchObject([{ id: { type: 'model', name: 'org/model' }, filesCount: 3, revisions: [{ refs: ['main'] }] }]);
  });

  test('goes to HF_HUB_CACHE by default', async () => {
    process.env['HF_HUB_CACHE'] = cacheDir;
    expect(await load({ cacheDir: undefined })).toBe(snapshot());
  });

  test('is not repeated', async () => {
    await load();
    hub.requests.length = 0;
    expect(await load()).toBe(snapshot());
    expect(hub.downloads).toEqual([]);
  });

  test('of a commit needs no request the second time', async () => {
    await load({ revision: hub.commit });
    hub.requests.length = 0;
    expect(await load({ revision: hub.commit })).toBe(snapshot());
    expect(hub.requests).toEqual([]);
  });

  test('of a revision with a slash', async () => {
    expect(await load({ revision: 'refs/pr/1' })).toBe(snapshot());
    expect(await readFile(repository('refs', 'refs', 'pr', '1'), 'utf8')).toBe(hub.commit);
  });

  test('of a new commit fetches only what changed', async () => {
    await load();
    hub.requests.length = 0;
    hub.commit = COMMITS[1];
    hub.files = { ...SINGLE, 'config.json': Buffer.from('{"model_type":"new"}') };
    const dir = await load();
    expect(dir).toBe(snapshot(COMMITS[1]));
    expect(hub.downloads).toEqual(['config.json']);
    expect(await readFile(join(dir, 'config.json'), 'utf8')).toBe('{"model_type":"new"}');
    expect(await holds(join(dir, 'model.safetensors'), WEIGHTS)).toBe(true);
    expect(events.at(-1)).toMatchObject({ loaded: sizeOf(hub.files, needed), total: sizeOf(hub.files, needed) });
  });

  test('with the processor of transformers 5', async () => {
    hub.files = { ...SINGLE, 'processor_config.json': Buffer.from('{"image_processor":{}}') };
    expect(await readdir(await load())).toContain('processor_config.json');
  });

  test('without preprocessor_config.json', async () => {
    hub.files = { 'config.json': SMALL['config.json']!, 'model.safetensors': WEIGHTS };
    expect((await readdir(await load())).sort()).toEqual(['config.json', 'model.safetensors']);
  });

  test('of a sharded model', async () => {
    hub.files = sharded({ 'model-1-of-2.safetensors': WEIGHTS, 'model-2-of-2.safetensors': Buffer.alloc(5000, 2) });
    const dir = await load();
    expect((await readdir(dir)).sort()).toEqual(Object.keys(hub.files).sort());
    expect(await readFile(join(dir, 'model-2-of-2.safetensors'))).toEqual(Buffer.alloc(5000, 2));
    const total = sizeOf(hub.files, Object.keys(hub.files));
    expect(events.at(-1)).toEqual({ file: 'model-2-of-2.safetensors', loaded: total, total });
    await hub.stop();
    expect(await load()).toBe(dir);
  });

  test('of two at once happens once', async () => {
    const dirs = await Promise.all([load(), load(), load({ revision: hub.commit })]);
    expect(dirs).toEqual([snapshot(), snapshot(), snapshot()]);
    expect([...hub.downloads].sort()).toEqual([...needed].sort());
    expect(await holds(join(snapshot(), 'model.safetensors'), WEIGHTS)).toBe(true);
  });

  test('into a folder that cannot be written', async () => {
    const file = join(root, 'not-a-folder');
    await writeFile(file, '');
    const error = await failure(load({ cacheDir: file }));
    expect(error.code).toBe('BAD_INPUT');
    expect(error.message).toMatch(/not-a-folder.*cannot be written/);
  });

  test('an error of the listener comes back as it is', async () => {
    const mine = new TypeError('mine');
    const onProgress = (): void => {
      throw mine;
    };
    expect(await failure(load({ onProgress }))).toBe(mine);
    expect(await partial()).toEqual([]);
  });
});

describe('the token', () => {
  test.each([
    ['HF_TOKEN', 'hf_first'],
    ['HUGGING_FACE_HUB_TOKEN', 'token-of-a-mirror'],
  ])('%s goes to the hub, and nowhere else', async (name, token) => {
    process.env[name] = `${token}\n`;
    await load();
    expect(new Set(hub.tokens)).toEqual(new Set([`Bearer ${token}`]));
    expect(hub.cdnTokens).toEqual([undefined]);
  });

  test('is read from the file of the login', async () => {
    process.env['HF_HOME'] = await mkdtemp(join(root, 'home-'));
    await writeFile(join(process.env['HF_HOME'], 'token'), 'hf_stored\n');
    await load();
    expect(new Set(hub.tokens)).toEqual(new Set(['Bearer hf_stored']));
  });

  test('is optional', async () => {
    await load();
    expect(new Set(hub.tokens)).toEqual(new Set([undefined]));
  });
});

describe('a refusal', () => {
  test('404: no such model', async () => {
    const error = await failure(load({}, 'org/other'));
    expect(error).toMatchObject({ code: 'NOT_FOUND', subject: 'org/other' });
    expect(error.message).toContain(`no such model or revision main at ${hub.endpoint}`);
  });

  test('404: no such revision, though another one is in the cache', async () => {
    await load();
    expect(await failure(load({ revision: 'v2' }))).toMatchObject({ code: 'NOT_FOUND' });
  });

  test.each([401, 403])('%d of the model: gated or private', async (status) => {
    hub.intercept = (_, response) => (json(response, status, { error: 'no' }), true);
    const error = await failure(load());
    expect(error.code).toBe('NETWORK');
    expect(error.message).toMatch(/gated or private: accept the licence at .*org\/model and set HF_TOKEN/);
  });

  test.each([401, 403])('%d: a complete copy in the cache is used, with a warning', async (status) => {
    const dir = await load();
    hub.intercept = (_, response) => (json(response, status, { error: 'no' }), true);
    const warning = jest.spyOn(process, 'emitWarning').mockReturnValue();
    expect(await load()).toBe(dir);
    expect(warning).toHaveBeenCalledWith(expect.stringContaining(`org/model: ${hub.endpoint} refuses access (${status};`), {
      type: 'UniFlowWarning',
    });
    warning.mockRestore();
  });

  test('403 of the files of a new commit: the copy of the old one is used', async () => {
    const dir = await load();
    hub.commit = COMMITS[1];
    hub.files = { ...SINGLE, 'config.json': Buffer.from('{"model_type":"new"}') };
    hub.intercept = (request, response) => request.url!.includes('/resolve/') && (json(response, 403, { error: 'no' }), true);
    const warning = jest.spyOn(process, 'emitWarning').mockReturnValue();
    expect(await load()).toBe(dir);
    warning.mockRestore();
  });

  test('403 of the model, with nothing but another revision in the cache', async () => {
    await load();
    hub.intercept = (_, response) => (json(response, 403, { error: 'no' }), true);
    expect(await failure(load({ revision: 'v2' }))).toMatchObject({ code: 'NETWORK' });
  });

  test('403 of a file: gated or private', async () => {
    hub.intercept = (request, response) => request.url!.includes('/resolve/') && (json(response, 403, { error: 'no' }), true);
    const error = await failure(load());
    expect(error).toMatchObject({ code: 'NETWORK' });
    expect(error.message).toContain('gated or private');
  });

  test('500 of a file', async () => {
    hub.intercept = (request, response) => request.url!.includes('/resolve/') && (json(response, 500, {}), true);
    const error = await failure(load());
    expect(error.code).toBe('NETWORK');
    expect(error.message).toContain('config.json answered with status 500');
  });

  test('no safetensors', async () => {
    hub.files = { ...SMALL, 'pytorch_model.bin': WEIGHTS };
    const error = await failure(load());
    expect(error.code).toBe('BAD_CHECKPOINT');
    expect(error.message).toMatch(
      /only safetensors are read.*without model\.safetensors but pytorch_model\.bin; in Python, .*save_pretrained/,
    );
    expect(hub.downloads).toEqual([]);
  });

  test('a shard is missing', async () => {
    hub.files = sharded({ 'a.safetensors': WEIGHTS, 'b.safetensors': WEIGHTS });
    delete hub.files['b.safetensors'];
    const error = await failure(load());
    expect(error).toMatchObject({ code: 'BAD_CHECKPOINT' });
    expect(error.message).toContain('without b.safetensors');
  });

  test('an index that is not one', async () => {
    hub.files = { ...SMALL, 'model.safetensors.index.json': Buffer.from('[') };
    expect(await failure(load())).toMatchObject({ code: 'BAD_CHECKPOINT' });
  });

  test('a shard outside the repository', async () => {
    hub.files = sharded({ '../../../escaped': WEIGHTS });
    expect(await failure(load())).toMatchObject({ code: 'BAD_CHECKPOINT' });
  });
});

describe('without the hub', () => {
  test('the cache is used', async () => {
    const dir = await load();
    await hub.stop();
    expect(await load()).toBe(dir);
  });

  test('a server in trouble counts as none', async () => {
    const dir = await load();
    hub.intercept = (_, response) => (json(response, 503, { error: 'busy' }), true);
    expect(await load()).toBe(dir);
  });

  test('nothing in the cache is an error that says what to do', async () => {
    await hub.stop();
    const error = await failure(load());
    expect(error).toMatchObject({ code: 'NETWORK', subject: 'org/model' });
    for (const part of ['org/model', hub.endpoint, 'ECONNREFUSED', cacheDir, 'HF_ENDPOINT']) expect(error.message).toContain(part);
  });

  test('an incomplete snapshot does not count', async () => {
    await load();
    await rm(repository('blobs', sha256(WEIGHTS)));
    process.env['HF_HUB_OFFLINE'] = '1';
    expect(await failure(load())).toMatchObject({ code: 'NETWORK' });
    delete process.env['HF_HUB_OFFLINE'];
    expect(await holds(join(await load(), 'model.safetensors'), WEIGHTS)).toBe(true);
  });

  test('the endpoint is not a hub', async () => {
    hub.intercept = (_, response) => (response.end('<html>Please log in'), true);
    const error = await failure(load());
    expect(error.code).toBe('NETWORK');
    expect(error.message).toContain(`no complete answer came from ${hub.endpoint}`);
  });

  test('HF_HUB_OFFLINE makes no request', async () => {
    process.env['HF_HUB_OFFLINE'] = '1';
    const error = await failure(load());
    expect(error.code).toBe('NETWORK');
    expect(error.message).toContain('HF_HUB_OFFLINE is set');
    expect(hub.requests).toEqual([]);
  });

  test('HF_HUB_OFFLINE finds what Python downloaded', async () => {
    process.env['HF_HUB_OFFLINE'] = '1';
    const dir = snapshot(COMMITS[1]);
    await mkdir(dir, { recursive: true });
    await mkdir(repository('refs'));
    await writeFile(repository('refs', 'main'), COMMITS[1]);
    for (const name of ['config.json', 'model.safetensors']) await writeFile(join(dir, name), SINGLE[name]!);
    expect(await load()).toBe(dir);
    expect(await load({ revision: COMMITS[1] })).toBe(dir);
    expect(hub.requests).toEqual([]);
  });
});

describe('a download that does not end', () => {
  const half = WEIGHTS.subarray(0, WEIGHTS.length / 2);
  const whole = new FakeHub().send;

  test('cut: an error, nothing left behind, and a second try works', async () => {
    hub.send = (response) => response.write(half, () => response.destroy());
    const error = await failure(load());
    expect(error.code).toBe('NETWORK');
    expect(error.message).toMatch(/no complete answer came from .*model\.safetensors/);
    expect(await partial()).toEqual([]);
    await expect(readFile(repository('refs', 'main'))).rejects.toMatchObject({ code: 'ENOENT' });
    hub.send = whole;
    expect(await holds(join(await load(), 'model.safetensors'), WEIGHTS)).toBe(true);
  });

  test('ended early by a server that does not say how much there is', async () => {
    hub.send = (response) => {
      response.removeHeader('Content-Length');
      response.end(half);
    };
    const error = await failure(load());
    expect(error.code).toBe('NETWORK');
    expect(error.message).toContain(`${half.length} of ${WEIGHTS.length} bytes`);
    expect(await partial()).toEqual([]);
  });

  test('cut for a new commit: the old one stays for offline use', async () => {
    const old = await load();
    hub.commit = COMMITS[1];
    hub.files = { ...SINGLE, 'model.safetensors': Buffer.alloc(WEIGHTS.length, 'new') };
    hub.send = (response) => response.write(half, () => response.destroy());
    expect(await failure(load())).toMatchObject({ code: 'NETWORK' });
    process.env['HF_HUB_OFFLINE'] = '1';
    expect(await load()).toBe(old);
  });

  test('aborted', async () => {
    const controller = new AbortController();
    hub.send = (response) => void response.write(half);
    const onProgress = ({ file }: HubProgress): void => {
      if (file === 'model.safetensors') controller.abort(new Error('enough'));
    };
    const error = await failure(load({ signal: controller.signal, onProgress }));
    expect(error).toMatchObject({ code: 'ABORTED', cause: new Error('enough') });
    expect(await partial()).toEqual([]);
  });

  test('aborted before it starts', async () => {
    expect(await failure(load({ signal: AbortSignal.abort() }))).toMatchObject({ code: 'ABORTED' });
    expect(hub.requests).toEqual([]);
  });

  test('aborted during a request, also with a copy in the cache', async () => {
    await load();
    const controller = new AbortController();
    hub.intercept = () => (controller.abort(), true);
    expect(await failure(load({ signal: controller.signal }))).toMatchObject({ code: 'ABORTED' });
  });

  test('aborted by one of two: the other one gets its model', async () => {
    const first = new AbortController();
    hub.send = (response) => void response.write(half, () => first.abort());
    const aborted = failure(load({ signal: first.signal }));
    const other = load();
    await new Promise((resolve) => first.signal.addEventListener('abort', resolve));
    hub.send = whole;
    expect(await aborted).toMatchObject({ code: 'ABORTED' });
    expect(await holds(join(await other, 'model.safetensors'), WEIGHTS)).toBe(true);
  });

  test('aborted while it waits for another', async () => {
    const first = new AbortController();
    const second = new AbortController();
    const sending = new Promise<void>((resolve) => (hub.send = (response) => void response.write(half, () => resolve())));
    const loading = failure(load({ signal: first.signal }));
    await sending;
    const waiting = failure(load({ signal: second.signal }));
    setTimeout(() => second.abort(), 20);
    expect(await waiting).toMatchObject({ code: 'ABORTED' });
    first.abort();
    expect(await loading).toMatchObject({ code: 'ABORTED' });
  });
});
