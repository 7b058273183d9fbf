/** Batch encoding on many machines: worker processes, a real Redis and a real S3 server, all of which are killed. */
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, jest, test } from '@jest/globals';
// @ts-expect-error it comes without types
import Server3 from '@20minutes/s3rver';
import { parquetWriteBuffer } from 'hyparquet-writer';
import { spawn, type ChildProcess } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdir, mkdtemp, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { createServer, request as httpRequest, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { createServer as createSocket, type AddressInfo, type Server as NetServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import sharp from 'sharp';
import { create } from 'tar';
import {
  encodeOnWorkers,
  encodeToShards,
  openOutput,
  openShards,
  openSource,
  startWorker,
  UniFlow,
  type Item,
  type Output,
  type ShardRecord,
  type QueueOptions,
  type QueueResult,
  type ShardWorker,
} from '../lib/index.js';
import { S3Output } from '../lib/shards/s3-output.js';
import { Attempt, isCommitted, readRecord, recover, tidy } from '../lib/shards/commits.js';
import { connect } from '../lib/queue/jobs.js';
import { failure, startCommand, type CommandRun } from './support.js';

const S3rver = Server3 as new (options: object) => { run(): Promise<AddressInfo>; close(): Promise<void> };

const BUSY = 120_000; // for busy machines

let dir: string;
let uniflow: UniFlow;
let redis: RedisServer;
let web: Pictures;
let bucket: InstanceType<typeof S3rver>;
const inDir = (...parts: string[]): string => join(dir, ...parts);

async function until(what: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await what())) await sleep(20);
}

async function freePort(): Promise<number> {
  const socket = createSocket().listen(0, '127.0.0.1');
  await once(socket, 'listening');
  const { port } = socket.address() as AddressInfo;
  socket.close();
  return port;
}

/** Debian's redis-server with its append-only file, which survives a kill. */
class RedisServer {
  private child: ChildProcess | undefined;
  private constructor(
    private readonly port: number,
    private readonly folder: string,
  ) {}

  static async start(folder: string): Promise<RedisServer> {
    await mkdir(folder);
    const server = new RedisServer(await freePort(), folder);
    await server.start();
    return server;
  }

  get url(): string {
    return `redis://127.0.0.1:${this.port}`;
  }

  async start(): Promise<void> {
    const options = { port: this.port, bind: '127.0.0.1', dir: this.folder, appendonly: 'yes', appendfsync: 'always', save: '' };
    this.child = spawn(
      'redis-server',
      Object.entries(options).flatMap(([name, value]) => [`--${name}`, String(value)]),
      { stdio: 'ignore' },
    );
    for (;;) {
      const client = await connect(this.url).catch(() => undefined);
      client?.disconnect();
      if (client) return;
      await sleep(50);
    }
  }

  async kill(): Promise<void> {
    const ended = once(this.child!, 'exit');
    this.child!.kill('SIGKILL');
    await ended;
  }

  async command(...words: [string, ...string[]]): Promise<unknown> {
    const client = await connect(this.url);
    try {
      return await client.call(...words);
    } finally {
      client.disconnect();
    }
  }

  /** Number of jobs in a state. */
  async count(state: 'wait' | 'active' | 'failed'): Promise<number> {
    return (await this.command(state === 'failed' ? 'ZCARD' : 'LLEN', `bull:uniflow:${state}`)) as number;
  }
}

/** An HTTP server of images, some of them damaged. It answers requests up to a limit and holds the others until it is opened. */
class Pictures {
  private readonly server: Server;
  private readonly held: (() => void)[] = [];
  private limit = Infinity;
  requests = 0;

  constructor(private readonly photos: Buffer[]) {
    this.server = createServer((request, response) => {
      const answer = (): void => this.answer(Number(/\d+/.exec(request.url!)![0]), response);
      if (++this.requests > this.limit) this.held.push(answer);
      else answer();
    }).listen(0, '127.0.0.1');
  }

  items(count: number): Item[] {
    const { port } = this.server.address() as AddressInfo;
    return Array.from({ length: count }, (_, i) => ({ id: `picture ${i}`, image: { url: `http://127.0.0.1:${port}/${i}` } }));
  }

  holdAfter(requests: number): void {
    this.requests = 0;
    this.limit = requests;
  }

  get holds(): number {
    return this.held.length;
  }

  open(): void {
    this.limit = Infinity;
    for (const answer of this.held.splice(0)) answer();
  }

  close(): void {
    this.server.closeAllConnections();
    this.server.close();
  }

  private answer(i: number, response: ServerResponse): void {
    if (i % 50 === 7) response.writeHead(404).end();
    else response.end(i % 50 === 19 ? 'no picture' : this.photos[i % this.photos.length]);
  }
}

function photo(width: number, height: number, seed: number): Promise<Buffer> {
  const data = Buffer.alloc(width * height * 3);
  for (let i = 0; i < data.length; i++) data[i] = (((i % (3 * width)) * (seed + 2)) / 9 + (i / width) * 3 + 40 * seed) & 255;
  return sharp(data, { raw: { width, height, channels: 3 } })
    .jpeg()
    .toBuffer();
}

const shape = { shardSize: 8, batchSize: 4 };
const COUNT = 240;
const SHARDS = COUNT / shape.shardSize;

/** The images of the server as a list. */
async function webList(): Promise<string> {
  const lines = web.items(COUNT).map(({ id, image }) => JSON.stringify({ id, ...(image as { url: string }) }));
  await writeFile(inDir('list.jsonl'), lines.join('\n'));
  return inDir('list.jsonl');
}

const plan = (
  folder: string,
  source: Iterable<Item> | AsyncIterable<Item> = web.items(COUNT),
  options: Partial<QueueOptions> = {},
): Promise<QueueResult> =>
  encodeOnWorkers(uniflow, source, folder.startsWith('s3:') ? folder : inDir(folder), {
    ...shape,
    model: inDir('model'),
    queue: redis.url,
    ...options,
  });

/** Contents of a run, except files that only record its course. */
async function contents(output: Output): Promise<Record<string, string>> {
  const found: Record<string, string> = {};
  for (const name of await output.list(''))
    if (!/^(records|staging)/.test(name))
      found[name] = createHash('sha256')
        .update(await output.read(name))
        .digest('hex');
  return found;
}

/** Checks that the run equals that of a single machine, and that no other files remain. @returns the folder of the local run. */
async function expectSameAsLocal(
  folder: string,
  source: () => Iterable<Item> | AsyncIterable<Item> = () => web.items(COUNT),
): Promise<string> {
  const local = inDir(`local-${createHash('sha1').update(String(source)).digest('hex').slice(0, 8)}`);
  await encodeToShards(uniflow, source(), local, { ...shape, model: inDir('model') });
  const output = await openOutput(folder.startsWith('s3:') ? folder : inDir(folder));
  expect(await contents(output)).toEqual(await contents(await openOutput(local)));
  expect(await output.list('staging/')).toEqual([]);
  return local;
}

/** `uniflow worker` in a separate process. */
class WorkerProcess {
  static readonly all: WorkerProcess[] = [];
  readonly child: ChildProcess;
  readonly ended: Promise<CommandRun>;

  constructor(...args: string[]) {
    const all = ['worker', '--queue', redis.url, '--stall', '1', '--metrics-port', '0', '--json', ...args];
    ({ child: this.child, ended: this.ended } = startCommand(all, { OMP_NUM_THREADS: '1' }));
    WorkerProcess.all.push(this);
  }

  static async start(...args: string[]): Promise<WorkerProcess & { url: string }> {
    const worker = new WorkerProcess(...args);
    let text = '';
    for await (const chunk of worker.child.stdout!) if ((text += String(chunk)).includes('\n')) break;
    return Object.assign(worker, { url: (JSON.parse(text) as { metrics: string }).metrics });
  }

  async kill(signal: NodeJS.Signals): Promise<CommandRun> {
    this.child.kill(signal);
    return this.ended;
  }
}

/** Metrics of a worker by name. */
async function metricsOf(worker: { url: string | undefined }): Promise<Record<string, number>> {
  const text = await (await fetch(`${worker.url}/metrics`)).text();
  return Object.fromEntries([...text.matchAll(/^(\w+(?:\{.*\})?) (\S+)$/gm)].map(([, name, value]) => [name, Number(value)]));
}
const shardsOf = async (worker: { url: string | undefined }, outcome: string): Promise<number> =>
  (await metricsOf(worker))[`uniflow_worker_shards_total{outcome="${outcome}"}`]!;

/** A worker in this process. */
let here: ShardWorker | undefined;
const workHere = async (): Promise<ShardWorker> => (here = await startWorker({ queue: redis.url, stall: 1000, metrics: { port: 0 } }));

beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-queue-'));
  uniflow = UniFlow.random('nano');
  await uniflow.save(inDir('model'));
  web = new Pictures(await Promise.all(Array.from({ length: 12 }, (_, i) => photo(48 + 8 * (i % 3), 64, i))));
  redis = await RedisServer.start(inDir('redis'));
  bucket = new S3rver({
    port: 0,
    address: '127.0.0.1',
    silent: true,
    allowMismatchedSignatures: true, // for requests to the bucket itself, where the server omits the trailing slash
    directory: inDir('s3'),
    configureBuckets: [{ name: 'bucket', configs: [] }],
  });
  const url = `http://127.0.0.1:${(await bucket.run()).port}`;
  Object.assign(process.env, { AWS_ACCESS_KEY_ID: 'S3RVER', AWS_SECRET_ACCESS_KEY: 'S3RVER', AWS_ENDPOINT_URL: url });
}, BUSY);
beforeEach(async () => {
  await redis.command('FLUSHALL');
});
afterEach(async () => {
  web.open();
  await here?.close();
  here = undefined;
  for (const worker of WorkerProcess.all.splice(0)) await worker.kill('SIGKILL');
}, BUSY);
afterAll(async () => {
  web.close();
  await bucket.close();
  await redis.kill();
  await uniflow.dispose();
  await rm(dir, { recursive: true, force: true });
});

describe('two workers', () => {
  test(
    'make what one machine makes, though one of them and Redis are killed',
    async () => {
      const [first] = await Promise.all([WorkerProcess.start(), WorkerProcess.start()]);
      web.holdAfter(60);
      const states: string[] = [];
      const progress: number[] = [];
      const planned = plan('killed', web.items(COUNT), {
        onState: (text) => states.push(text),
        onProgress: ({ workers }) => progress.push(workers),
      });
      await until(() => web.holds >= 24); // shards of both workers are in progress
      await first.kill('SIGKILL');
      await redis.kill();
      await sleep(500);
      await redis.start();
      web.open();
      const { manifest, before } = await planned;
      expect([manifest!.count, manifest!.failures, manifest!.shards.length, before]).toEqual([230, 10, SHARDS, 0]);
      expect(Math.max(...progress)).toBeGreaterThan(0);
      expect(states[0]).toMatch(/connection is lost/);
      await expectSameAsLocal('killed');

      const ids = [...(await readFile(inDir('killed', 'failures.jsonl'), 'utf8')).matchAll(/"id":"(.*?)"/g)].map(([, id]) => id);
      for await (const { id } of await openShards(inDir('killed'))) ids.push(id);
      expect(ids.sort()).toEqual(
        web
          .items(COUNT)
          .map(({ id }) => id)
          .sort(),
      );
    },
    BUSY,
  );

  test(
    'on one shard leave one: a worker that was believed dead comes too late',
    async () => {
      const slow = await WorkerProcess.start('--concurrency', '1');
      web.holdAfter(0);
      const planned = plan('late', web.items(8));
      await until(() => web.holds === 8);
      slow.child.kill('SIGSTOP');
      const other = await workHere();
      await until(() => web.holds === 16); // the same shard
      web.open();
      const { manifest } = await planned;
      expect(manifest!.shards).toHaveLength(1);
      const there = await contents(await openOutput(inDir('late')));
      expect(await shardsOf(other, 'made')).toBe(1);
      slow.child.kill('SIGCONT');
      await until(async () => (await shardsOf(slow, 'there')) === 1);
      expect(await contents(await openOutput(inDir('late')))).toEqual(there);
      expect(await (await openOutput(inDir('late'))).list('staging/')).toEqual([]);
    },
    BUSY,
  );
});

describe('a worker', () => {
  test(
    'that is told to stop finishes its shards; what waits goes on waiting',
    async () => {
      const worker = await WorkerProcess.start();
      web.holdAfter(20);
      const stop = new AbortController();
      const planned = plan('drained', web.items(COUNT), { signal: stop.signal });
      await until(() => web.holds > 8);
      const ended = worker.kill('SIGTERM');
      await sleep(300);
      web.open();
      const { code, stderr } = await ended;
      expect([code, stderr]).toEqual([0, '']);
      expect([await redis.count('active'), await redis.count('failed')]).toEqual([0, 0]);
      const made = (await (await openOutput(inDir('drained'))).list('records/')).length;
      expect(made).toBeGreaterThan(0);
      expect(made + (await redis.count('wait'))).toBe(SHARDS);
      stop.abort();
      expect((await failure(planned)).code).toBe('ABORTED');
    },
    BUSY,
  );

  test(
    'that is told to stop while Redis is gone finishes its shards and ends',
    async () => {
      const [idle, busy] = await Promise.all([WorkerProcess.start(), WorkerProcess.start('--concurrency', '1')]);
      web.holdAfter(0);
      await plan('alone', web.items(8), { detach: true });
      await until(() => web.holds === 8);
      await redis.kill();
      await sleep(300);
      const ended = [idle, busy].map((worker) => worker.kill('SIGTERM'));
      await sleep(300);
      web.open();
      expect((await Promise.all(ended)).map(({ code }) => code)).toEqual([0, 0]);
      expect(await (await openOutput(inDir('alone'))).list('records/')).toHaveLength(1);
      await redis.start();
    },
    BUSY,
  );

  test('that Redis refuses to serve says so now and then, and goes on when it can', async () => {
    await plan('full', web.items(8), { detach: true });
    const states: string[] = [];
    await redis.command('CONFIG', 'SET', 'maxmemory', '1');
    here = await startWorker({ queue: redis.url, onState: (text) => states.push(text) });
    await sleep(2500);
    await redis.command('CONFIG', 'SET', 'maxmemory', '0');
    expect(states[0]).toMatch(/OOM/);
    expect(states.length).toBeLessThan(10);
    await until(async () => (await (await openOutput(inDir('full'))).list('records/')).length === 1);
  });

  test(
    'with another model leaves the work to others',
    async () => {
      const other = UniFlow.random('nano', { seed: 1 });
      await other.save(inDir('other'));
      await other.dispose();
      const stop = new AbortController();
      const planned = plan('model', web.items(8), { signal: stop.signal });
      await until(async () => (await redis.count('wait')) === 1);
      const worker = await startWorker({ queue: redis.url, model: inDir('other') });
      const { code, message } = await failure(worker.ended);
      expect(code).toBe('BAD_INPUT');
      expect(message).toMatch(/model\.sha256/);
      expect([await redis.count('wait'), await redis.count('failed')]).toEqual([1, 0]);
      stop.abort();
      await failure(planned);
    },
    BUSY,
  );

  test(
    'that does not see the output puts the work back',
    async () => {
      await plan('gone', web.items(8), { detach: true });
      await rm(inDir('gone'), { recursive: true });
      const states: string[] = [];
      here = await startWorker({ queue: redis.url, onState: (text) => states.push(text) });
      await until(() => states.length > 0);
      expect(states[0]).toMatch(/^shard 0 is put back: .*gone\/run\.json/);
      await until(async () => (await redis.command('ZCARD', 'bull:uniflow:delayed')) === 1);
      expect(await redis.count('failed')).toBe(0);
      await expect(openOutput(inDir('gone')).then((output) => output.size('run.json'))).resolves.toBeUndefined();
    },
    BUSY,
  );

  test(
    'that sees none of the files of a shard leaves it to others',
    async () => {
      await mkdir(inDir('mount'));
      const items = Array.from({ length: 16 }, (_, i) => ({ id: `${i}`, image: inDir('mount', `${i}.jpg`) }));
      for (const { image } of items) await writeFile(image, await photo(48, 64, 1));
      await plan('mounted', items, { detach: true });
      await rename(inDir('mount'), inDir('elsewhere'));
      const states: string[] = [];
      here = await startWorker({ queue: redis.url, onState: (text) => states.push(text) });
      await until(() => states.length === 2);
      for (const state of states) expect(state).toMatch(/^shard [01] is put back: none of its files is there, as .*mount\/\d+\.jpg$/);
      await here.close();
      expect(await redis.count('failed')).toBe(0);
      await rename(inDir('elsewhere'), inDir('mount'));
      await redis.command('FLUSHALL'); // otherwise the shards would be retried after ten seconds
      await workHere();
      const { manifest } = await plan('mounted', items);
      expect([manifest!.count, manifest!.failures]).toEqual([16, 0]);
    },
    BUSY,
  );

  test('says how it is', async () => {
    const worker = await workHere();
    await plan('metrics', web.items(20));
    const metrics = await metricsOf(worker);
    expect(metrics).toMatchObject({
      'uniflow_worker_shards_total{outcome="made"}': 3,
      'uniflow_worker_shards_total{outcome="failed"}': 0,
      uniflow_worker_images_total: 18,
      uniflow_worker_unreadable_total: 2,
      uniflow_worker_shard_seconds_count: 3,
      uniflow_worker_shards_active: 0,
    });
    expect(metrics['process_resident_memory_bytes']).toBeGreaterThan(1e7);
    expect(metrics['uniflow_worker_stage_utilisation{stage="compute"}']).toBeGreaterThan(0);
    expect((await fetch(`${worker.url}/healthz`)).status).toBe(200);
    await redis.kill();
    await until(async () => (await fetch(`${worker.url}/healthz`)).status === 503);
    await redis.start();
    await until(async () => (await fetch(`${worker.url}/healthz`)).status === 200);
  });
});

describe.each(['folder', 's3'])('a commit in a %s', (kind) => {
  const record = (content: string): ShardRecord => ({
    index: 3,
    files: [{ name: 'shard-000003.npy', bytes: content.length, sha256: '' }],
    ...{ count: 1, items: 1, firstId: content, lastId: content, ids: content, statistics: null, failures: [] },
  });
  const attempt = async (output: Output, content: string): Promise<Attempt> => {
    const one = new Attempt(output);
    await one.write('shard-000003.npy', [Buffer.from(content)]);
    return one;
  };
  const open = (name: string): Promise<Output> => openOutput(kind === 's3' ? `s3://bucket/commits-${name}` : inDir(`commits-${name}`));

  test('is made once, whatever comes later or at the same time', async () => {
    const output = await open('once');
    const contents = ['one', 'another', 'a third', 'a fourth'];
    const attempts = await Promise.all(contents.map((content) => attempt(output, content)));
    const first = await attempts[0]!.commit(record('one'));
    const others = await Promise.all([1, 2, 3].map((i) => attempts[i]!.commit(record(contents[i]!))));
    expect([first, ...others]).toEqual([true, false, false, false]);
    expect(String(await output.read('shard-000003.npy'))).toBe('one');
    expect(await readRecord(output, 3)).toEqual(record('one'));
    expect(await output.list('staging/')).toEqual([]);
  });

  test('that was cut short is completed by who comes next; what was not committed is removed', async () => {
    const output = await open('short');
    const [cut, dead] = [await attempt(output, 'mine'), await attempt(output, 'never committed')];
    const move = jest.spyOn(output, 'move').mockRejectedValue(new Error('killed'));
    await expect(cut.commit(record('mine'))).rejects.toThrow('killed');
    move.mockRestore();
    expect(await output.size('shard-000003.npy')).toBeUndefined();
    expect(await dead.commit(record('never committed'))).toBe(false);
    await attempt(output, 'of a worker that died');
    await tidy(output, [record('mine')]);
    expect(await output.list('')).toEqual(['records/shard-000003.json', 'shard-000003.npy']);
    expect(String(await output.read('shard-000003.npy'))).toBe('mine');
    expect(await isCommitted(output, 3)).toBe(true);
    expect(await isCommitted(output, 4)).toBe(false);
  });

  test('is completed or undone by the next run of one machine, which spares the attempts of workers', async () => {
    const output = await open('recovered');
    const cut = await attempt(output, 'mine');
    const move = jest.spyOn(output, 'move').mockRejectedValue(new Error('killed'));
    await expect(cut.commit(record('mine'))).rejects.toThrow('killed');
    move.mockRestore();
    await new Attempt(output, true).write('of a killed run', [Buffer.from('x')]);
    await attempt(output, 'of a worker');
    const records = new Map([[3, record('mine')]]);
    await recover(output, records, true);
    expect([...records.keys()]).toEqual([3]);
    const staged = expect.stringMatching(/^staging\/[\da-f-]+\.shard-000003\.npy$/);
    expect(await output.list('')).toEqual(['records/shard-000003.json', 'shard-000003.npy', staged]);
    await output.remove('shard-000003.npy');
    await expect(isCommitted(output, 3)).rejects.toThrow(/shard-000003\.npy: expected 4 bytes, but got none\. To encode its shard again/);
    await recover(output, records, true);
    expect([...records.keys()]).toEqual([]);
    expect(await isCommitted(output, 3)).toBe(false);
  });
});

describe('the planner', () => {
  test(
    'that is killed goes on, detached or not, and adds nothing twice',
    async () => {
      const list = await webList();
      const options = ['--shard-size', '8', '--batch', '4', '-m', inDir('model'), '--queue', redis.url];
      const command = (...more: string[]) =>
        startCommand(['encode', list, '-o', inDir('planner'), ...options, ...more], { OMP_NUM_THREADS: '1' });
      const killed = command('--max-waiting', '10');
      await until(async () => (await redis.count('wait')) === 10);
      await sleep(200);
      expect(await redis.count('wait')).toBe(10); // the limit holds
      killed.child.kill('SIGKILL');
      const { code, stdout } = await command('--detach').ended;
      expect([code, stdout]).toEqual([0, expect.stringMatching(/^30 shards of .* planned/)]);
      expect(await redis.count('wait')).toBe(SHARDS);
      const worker = await workHere();
      const sealed = await command('--json').ended;
      expect(sealed.code).toBe(1); // some images are damaged
      expect(JSON.parse(sealed.stdout)).toMatchObject({ images: 230, failures: 10, shards: SHARDS, complete: false });
      expect(await shardsOf(worker, 'made')).toBe(SHARDS);
      expect(await shardsOf(worker, 'there')).toBe(0);
      await expectSameAsLocal('planner');
      expect(await plan('planner')).toMatchObject({ complete: true, before: COUNT });
    },
    BUSY,
  );

  test('plans again what Redis has lost', async () => {
    web.holdAfter(20);
    await workHere();
    const states: string[] = [];
    const planned = plan('lost', web.items(COUNT), { onState: (text) => states.push(text) });
    await until(() => web.holds > 8);
    await until(async () => (await redis.count('wait')) > 20);
    await redis.command('FLUSHALL');
    web.open();
    await planned;
    expect(states).toContainEqual(expect.stringMatching(/planned again/));
    await expectSameAsLocal('lost');
  });

  test('can be stopped while it waits for Redis', async () => {
    const stop = new AbortController();
    const states: string[] = [];
    const planned = plan('waiting', web.items(8), { signal: stop.signal, onState: (text) => states.push(text) });
    await until(async () => (await redis.count('wait')) === 1);
    await redis.kill();
    await until(() => states.length > 0);
    stop.abort();
    expect((await failure(planned)).code).toBe('ABORTED');
    await redis.start();
  });

  test('says which shards failed, and tries them again when it is called again', async () => {
    await workHere();
    await mkdir(inDir('failing'));
    await writeFile(inDir('failing', 'staging'), 'in the way');
    const { code, message } = await failure(plan('failing', web.items(20), { attempts: 2 }));
    expect(code).toBe('INTERNAL');
    expect(message).toMatch(/^3 of 3 shards failed: shard 0: .*staging.*; .*Run it again/);
    await rm(inDir('failing', 'staging'));
    expect((await plan('failing', web.items(20))).manifest!.shards).toHaveLength(3);
  });

  test('takes members of archives; refuses what has no path, and other pictures or options than those of the run', async () => {
    await mkdir(inDir('members'));
    for (const name of ['a', 'b', 'c']) await writeFile(inDir('members', `${name}.jpg`), await photo(50, 40, name.charCodeAt(0)));
    await create({ cwd: inDir('members'), file: inDir('members.tar') }, ['a.jpg', 'b.jpg', 'c.jpg']);
    const image = [await photo(40, 40, 1), await photo(40, 40, 2)];
    await writeFile(
      inDir('rows.parquet'),
      Buffer.from(parquetWriteBuffer({ columnData: [{ name: 'image', data: image, type: 'BYTE_ARRAY' }] })),
    );
    const archives = () => openSource([inDir('members.tar'), inDir('rows.parquet'), inDir('members')]);
    await workHere();
    expect((await plan('archives', archives())).manifest!.count).toBe(8);
    await expectSameAsLocal('archives', archives);

    expect((await plan('archives', archives(), { model: 'the same model by another name' })).complete).toBe(true);
    const pixels: Item = { id: 'in memory', image: await photo(8, 8, 0) };
    expect(await failure(plan('memory', [pixels]))).toMatchObject({ code: 'UNSUPPORTED', subject: 'in memory' });
    expect((await failure(plan('archives', archives(), { store: 'float16' }))).message).toMatch(/another run; they differ in store/);
    const stop = new AbortController();
    await plan('changed', web.items(16), { detach: true });
    await until(async () => (await (await openOutput(inDir('changed'))).list('records/')).length === 2);
    const reversed = plan('changed', web.items(16).reverse(), { signal: stop.signal });
    expect((await failure(reversed)).message).toMatch(/the images of shard 0: expected those that it was made of/);
  });

  test(
    'refuses files that were replaced under their names, before and after the run is complete',
    async () => {
      await mkdir(inDir('replaced'));
      const put = async (name: string, seed: number) => writeFile(inDir('replaced', name), await photo(48, 64, seed));
      for (const [seed, name] of ['a.jpg', 'b.jpg'].entries()) await put(name, seed);
      const run = (folder: string, options: Partial<QueueOptions> = {}) =>
        plan(folder, openSource(inDir('replaced')), { shardSize: 1, ...options });
      await run('partly', { detach: true });
      await run('partly-verified', { detach: true, verify: true });
      await workHere();
      for (const folder of ['partly', 'partly-verified'])
        await until(async () => (await (await openOutput(inDir(folder))).list('records/')).length === 2);
      await run('whole');
      await put('a.jpg', 7);
      const message = /the files of shard 0, 'a\.jpg' to 'a\.jpg': expected those that it was made of, but got a file of another/;
      for (const folder of ['partly', 'whole']) expect((await failure(run(folder))).message).toMatch(message);
      expect((await failure(run('partly-verified', { verify: true }))).message).toMatch(/another content/);
      await put('a.jpg', 0);
      expect((await run('partly-verified', { verify: true })).manifest!.count).toBe(2);
    },
    BUSY,
  );

  test(
    'continues a run of one machine, and one machine a run of the planner',
    async () => {
      await mkdir(inDir('moved'));
      web.holdAfter(60);
      const stop = new AbortController();
      const local = failure(
        encodeToShards(uniflow, web.items(COUNT), inDir('moved'), { ...shape, model: inDir('model'), signal: stop.signal }),
      );
      await until(async () => (await (await openOutput(inDir('moved'))).list('records/')).length > 2);
      stop.abort();
      expect((await local).code).toBe('ABORTED');
      web.open();
      const worker = await workHere();
      const { before } = await plan('moved');
      expect(before).toBeGreaterThan(0);
      expect(await shardsOf(worker, 'made')).toBe(SHARDS - before / 8);
      await expectSameAsLocal('moved');

      await plan('back', web.items(16), { detach: true });
      await until(async () => (await (await openOutput(inDir('back'))).list('records/')).length === 2);
      const back = await encodeToShards(uniflow, web.items(24), inDir('back'), { ...shape, model: inDir('model') });
      expect([back.before, back.manifest.shards.length]).toEqual([16, 3]);
    },
    BUSY,
  );

  test('is loaded when it is used: the library alone brings neither BullMQ nor the SDK of S3', async () => {
    const script = `await import('./lib/index.ts'); console.log(JSON.stringify(Object.keys(require.cache)))`;
    const child = spawn(process.execPath, ['--import', 'tsx', '-e', `(async () => { ${script} })()`], {
      env: { ...process.env, NODE_OPTIONS: '' },
    });
    let [stdout, stderr] = ['', ''];
    child.stdout.on('data', (data) => (stdout += String(data)));
    child.stderr.on('data', (data) => (stderr += String(data)));
    await once(child, 'close');
    expect(stderr).toBe('');
    expect((JSON.parse(stdout) as string[]).filter((path) => /node_modules\/(bullmq|ioredis|@aws-sdk)/.test(path))).toEqual([]);
  });

  test('says at once that there is no Redis, and shows no password', async () => {
    const begin = performance.now();
    const queue = `redis://user:secret@127.0.0.1:${await freePort()}/2`;
    const { code, message } = await failure(plan('unreachable', [], { queue }));
    expect(code).toBe('NETWORK');
    expect(message).toMatch(/^redis:\/\/127\.0\.0\.1:\d+\/2 cannot be reached: .*ECONNREFUSED/);
    expect((await failure(startWorker({ queue }))).code).toBe('NETWORK');
    expect(performance.now() - begin).toBeLessThan(10_000);
    expect(await failure(startWorker({ queue: 'localhost:6379' }))).toMatchObject({ code: 'BAD_INPUT', subject: 'queue' });
    for (const database of ['/x', '/1/2', '/-1'])
      expect(await failure(startWorker({ queue: redis.url + database }))).toMatchObject({ code: 'BAD_INPUT', subject: 'queue' });
    expect((await failure(startWorker({ queue: `${redis.url}/99` }))).message).toMatch(/\/99 cannot be reached: .*out of range/);
  });

  test('does not wait for a server that takes connections and says nothing', async () => {
    const silent = createSocket().listen(0, '127.0.0.1');
    await once(silent, 'listening');
    const queue = `redis://127.0.0.1:${(silent.address() as AddressInfo).port}`;
    expect(await failure(startWorker({ queue }))).toMatchObject({ code: 'NETWORK', message: expect.stringMatching(/no answer in 5 s/) });
    silent.close();
  }, 10_000);

  test.each([
    [['-', '-o', 'latents', '--queue', 'redis://x'], 2, /standard input cannot be read by workers/],
    [['photos', '-o', 'latents', '--detach'], 2, /--detach is for runs with --queue/],
    [['photos', '-o', 'latents.npy', '--queue', 'redis://x'], 2, /--queue is for shards/],
  ])(
    'refuses %j',
    async (args, code, message) => {
      const run = await startCommand(['encode', ...args]).ended;
      expect(run.code).toBe(code);
      expect(run.stderr).toMatch(message);
    },
    BUSY,
  );
});

describe('S3', () => {
  test(
    'a run in a bucket is the run in a folder, and is read from there',
    async () => {
      // S3rver deletes a folder that becomes empty, including files created meanwhile; this file keeps it from becoming empty
      await mkdir(inDir('s3', 'bucket', 'runs', '1', 'staging'), { recursive: true });
      await writeFile(inDir('s3', 'bucket', 'runs', '1', 'staging', 'no object'), '');
      const worker = await WorkerProcess.start();
      const { manifest } = await plan('s3://bucket/runs/1');
      expect(manifest!.count).toBe(230);
      expect(await shardsOf(worker, 'made')).toBe(SHARDS);
      const local = await openShards(await expectSameAsLocal('s3://bucket/runs/1'));
      const shards = await openShards(await openOutput('s3://bucket/runs/1'));
      await shards.verify();
      expect(await shards.get('picture 100')).toEqual(await local.get('picture 100'));
    },
    BUSY,
  );

  test(
    'a run of one machine needs no queue; killed and started again, it is the run in a folder',
    async () => {
      await mkdir(inDir('s3', 'bucket', 'runs', '2', 'staging'), { recursive: true }); // see above
      await writeFile(inDir('s3', 'bucket', 'runs', '2', 'staging', 'no object'), '');
      const list = await webList();
      const command = (...more: string[]) => {
        const args = ['encode', list, '-o', 's3://bucket/runs/2', '--shard-size', '8', '--batch', '4', '-m', inDir('model'), ...more];
        return startCommand(args, { OMP_NUM_THREADS: '1' });
      };
      web.holdAfter(100);
      const killed = command();
      const output = await openOutput('s3://bucket/runs/2');
      await until(async () => web.holds > 0 && (await output.list('records/')).length > 2);
      killed.child.kill('SIGKILL');
      await killed.ended;
      web.open();
      const { code, stdout } = await command('--json').ended;
      expect(code).toBe(1); // some images are damaged
      const { before, ...rest } = JSON.parse(stdout) as { before: number };
      expect(before).toBeGreaterThan(0);
      expect(rest).toMatchObject({ images: 230, failures: 10, shards: SHARDS, complete: false });
      await expectSameAsLocal('s3://bucket/runs/2');
    },
    BUSY,
  );

  /** Runs `work` with `server` in place of the store. */
  async function behind<T>(server: NetServer, work: () => Promise<T>): Promise<T> {
    const real = process.env['AWS_ENDPOINT_URL'];
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    process.env['AWS_ENDPOINT_URL'] = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    try {
      return await work();
    } finally {
      process.env['AWS_ENDPOINT_URL'] = real;
      server.close();
    }
  }

  test('a store that takes connections and says nothing is an error after a while, not a hang', async () => {
    const error = await behind(createSocket(), () => failure(S3Output.open('s3://bucket/silent', 100)));
    expect(error).toMatchObject({ code: 'NETWORK', message: expect.stringMatching(/TimeoutError/) });
  }, 10_000);

  test('a store that refuses If-None-Match is asked without it', async () => {
    const real = new URL(process.env['AWS_ENDPOINT_URL']!);
    const asked: (string | undefined)[] = [];
    const proxy = createServer((request, response) => {
      const { method, url, headers } = request;
      const condition = headers['if-none-match'];
      if (method === 'PUT') asked.push(condition);
      if (condition) return void request.resume().on('end', () => response.writeHead(501).end());
      const passOn = (answer: IncomingMessage): void => void answer.pipe(response.writeHead(answer.statusCode!, answer.headers));
      request.pipe(httpRequest({ host: real.hostname, port: real.port, method, path: url, headers }, passOn));
    });
    await behind(proxy, async () => {
      const output = await S3Output.open('s3://bucket/older');
      expect(await output.create('one', [Buffer.from('fir'), Buffer.from('st')])).toBe(true);
      expect(await output.create('one', [Buffer.from('second')])).toBe(false);
      expect(String(await output.read('one'))).toBe('first');
    });
    proxy.closeAllConnections();
    expect(asked).toEqual(['*', undefined]);
  });

  test('objects: parts, ranges, names; nothing is replaced that is to be created', async () => {
    const output = await openOutput('s3://bucket/objects');
    const large = randomBytes(40 * 2 ** 20);
    await output.write('large', [large.subarray(0, 9), large.subarray(9)]);
    expect((await output.read('large')).equals(large)).toBe(true);
    expect((await output.read('large', { begin: 20_000_000, end: 20_000_100 })).equals(large.subarray(20_000_000, 20_000_100))).toBe(true);
    expect(await output.create('a/one', [Buffer.from('first')])).toBe(true);
    expect(await output.create('a/one', [Buffer.from('second')])).toBe(false);
    await output.move('a/one', 'b/two + a space');
    expect(String(await output.read('b/two + a space'))).toBe('first');
    expect([await output.size('a/one'), await output.size('large')]).toEqual([undefined, large.length]);
    expect(await output.list('')).toEqual(['b/two + a space', 'large']);
    await output.remove('large');
    expect(await failure(output.read('large'))).toMatchObject({ code: 'NOT_FOUND', subject: 's3://bucket/objects/large' });
    expect((await failure(openOutput('s3://missing/x'))).message).toMatch(/s3:\/\/missing/);
  });
});
