/** Whole training runs on photographs: their results, resuming after a stop, a kill or a full disk, and refused settings. */
import { afterAll, beforeAll, describe, expect, jest, test } from '@jest/globals';
import type { NdArray } from 'ndarray';
import { execFileSync } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { appendFileSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import sharp from 'sharp';
import { presets } from '../lib/config.js';
import { memoryStats, resume, setThreads, train, UniFlow, UniFlowError, VisionEncoder, type TrainConfig } from '../lib/index.js';
import { distillation } from '../lib/losses/index.js';
import { parseTrainConfig } from '../lib/train/config.js';
import { readLog, type LogEntry, type LogEntryOf } from '../lib/train/log.js';
import { regimes, type Regime } from '../lib/train/regimes.js';
import { learningRate } from '../lib/train/schedule.js';
import { golden, photos, readTensors, startCommand, type CommandRun } from './support.js';

jest.setTimeout(180_000); // for busy machines

let dir: string;
const inDir = (...parts: string[]): string => join(dir, ...parts);

/** The photographs, at a size that decodes quickly. */
let data: string;

beforeAll(async () => {
  setThreads(1); // equal to that of the processes, because the sums of a product depend on it
  dir = await mkdtemp(join(tmpdir(), 'uniflow-train-'));
  data = inDir('photos');
  await mkdir(data);
  for (const name of (await readdir(photos)).filter((file) => file.endsWith('.jpg')))
    await sharp(join(photos, name)).resize(160).toFile(join(data, name));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

const micro = {
  ...presets.nano,
  ...{ hidden_size: 32, vit_hidden_size: 32, intermediate_size: 128, image_size: 28, latent_ch: 8, num_decoder_layers: 1 },
};

/** Settings for a few steps of the smallest model. */
const small = (changes: Partial<TrainConfig> = {}): TrainConfig => ({
  ...{ init: micro, start: 'random', regime: 'finetune', data, steps: 4, batch: 6, lr: 2e-3, warmup: 2, ema: 0.9, seed: 7 },
  ...changes,
});

const command = (...args: string[]): ReturnType<typeof startCommand> => startCommand(['train', ...args, '--threads', '1']);
const run = (...args: string[]): Promise<CommandRun> => command(...args).ended;

async function settingsFile(settings: Partial<TrainConfig>): Promise<string> {
  const path = inDir(`${randomUUID()}.json`);
  await writeFile(path, JSON.stringify(settings));
  return path;
}

const logOf = (folder: string): Promise<LogEntry[]> => readLog(join(folder, 'log.jsonl'));
const only = <E extends LogEntry['event']>(entries: LogEntry[], event: E): LogEntryOf<E>[] =>
  entries.filter((entry): entry is LogEntryOf<E> => entry.event === event);
const stepsOf = async (folder: string): Promise<LogEntryOf<'step'>[]> => only(await logOf(folder), 'step');
const numbersTo = (n: number): number[] => Array.from({ length: n }, (_, i) => i + 1);
const mean = (values: number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

const weightsOf = (folder: string): string => join(folder, 'model', 'model.safetensors');
const stateOf = (folder: string): string => join(folder, 'state.safetensors');
/** Expects both runs to have bit-identical results. */
function expectTwins(folder: string, other: string): void {
  for (const file of [stateOf, weightsOf]) expect(readFileSync(file(folder)).equals(readFileSync(file(other)))).toBe(true);
}

async function refusal(promise: Promise<unknown>): Promise<UniFlowError> {
  const error: unknown = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(UniFlowError);
  return error as UniFlowError;
}

/** Stops a run after `steps`, like a signal. */
function until(steps: number): { signal: AbortSignal; onStep: (entry: LogEntryOf<'step'>) => void } {
  const controller = new AbortController();
  return { signal: controller.signal, onStep: ({ step }) => step === steps && controller.abort() };
}

/** Resolves once the log of a run has this many steps. */
async function reaches(folder: string, steps: number): Promise<void> {
  for (;;) {
    const text = await readFile(join(folder, 'log.jsonl'), 'utf8').catch(() => '');
    if (text.split('"event":"step"').length > steps || text.includes('"event":"end"')) return;
    await sleep(5);
  }
}

describe('a minute on photographs', () => {
  const settings = (): TrainConfig => ({
    ...{ init: 'nano', regime: 'finetune', data, validation: data, steps: 240, batch: 6, lr: 5e-3, warmup: 10, ema: 0.95 },
    ...{ validateEvery: 120, checkpointEvery: 60 },
  });
  let straight: string;

  beforeAll(async () => {
    straight = inDir('straight');
    await train(straight, settings());
  });

  test('lowers the flow loss below 0.65 of its start, and improves the images', async () => {
    const flow = (await stepsOf(straight)).map((entry) => entry.flow);
    expect(mean(flow.slice(-20)) / mean(flow.slice(0, 5))).toBeLessThan(0.65);
    await using before = UniFlow.random('nano', { dtype: 'bfloat16' });
    await using after = await UniFlow.load(join(straight, 'model'));
    const files = (await readdir(data)).map((name) => join(data, name));
    const [random, trained] = [await before.reconstruct(files), await after.reconstruct(files)];
    expect(trained.psnr).toBeGreaterThan(random.psnr + 1);
  });

  test('writes the folder and the log', async () => {
    expect((await readdir(straight)).sort()).toEqual(['log.jsonl', 'model', 'report.html', 'state.safetensors', 'train.json']);
    expect((await readdir(join(straight, 'model'))).sort()).toEqual(['config.json', 'model.safetensors']);
    const written = JSON.parse(await readFile(join(straight, 'train.json'), 'utf8')) as unknown;
    expect(written).toEqual(parseTrainConfig(settings()));
    const log = await logOf(straight);
    expect(log[0]).toMatchObject({ event: 'start', config: written, data: { path: data, images: 6 } });
    expect(only(log, 'warning')[0]).toMatchObject({
      step: 0,
      message: expect.stringMatching(/^the flow head is too narrow: 527 of the 588/),
    });
    const steps = only(log, 'step');
    expect(steps.map(({ step }) => step)).toEqual(numbersTo(240));
    expect(steps.map(({ epoch }) => epoch)).toEqual(numbersTo(240).map((n) => n - 1)); // six images make one batch
    steps.forEach(({ lr, step }) => expect(lr).toBe(5e-3 * learningRate(step - 1, { steps: 240, warmup: 10 })));
    expect(only(log, 'validation').map(({ step }) => step)).toEqual([120, 240]);
    expect(only(log, 'checkpoint').map(({ step }) => step)).toEqual([0, 60, 120, 180, 240]);
    expect(log.at(-1)).toMatchObject({ event: 'end', step: 240, reason: 'done' });
  });

  test('gives the same bits when Ctrl-C stops a twin on the way', async () => {
    const twin = inDir('twin');
    const { child, ended } = command('--config', await settingsFile(settings()), '--out', twin);
    await reaches(twin, 30);
    child.kill('SIGINT');
    const stopped = await ended;
    expect(stopped.code).toBe(130);
    expect(stopped.stdout).toMatch(/^stopped after \d+ steps: .*twin\/model \(PSNR .* dB, SSIM .*\); see .*report\.html\n$/);
    expect(stopped.stderr).toMatch(
      /^uniflow: the flow head is too narrow: .*\n(baseline: \d\/6 images.*\n)*baseline: PCA of 16 coefficients a patch, fitted to 6 images of .*: PSNR .* dB, SSIM .*\ntrain: \d+\/1440 images\n(.*\n)*step \d+: validation PSNR .*, effective rank .*, \d+ % of the channels in use\n(train: .*\n)*uniflow: interrupted\n$/,
    );
    const log = await logOf(twin);
    const at = only(log, 'step').length;
    expect(at).toBeLessThan(240);
    expect(log.slice(-2)).toMatchObject([
      { event: 'checkpoint', step: at },
      { event: 'end', step: at, reason: 'interrupted' },
    ]);

    const resumed = await run('--resume', twin, '--json');
    expect(resumed).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(resumed.stdout)).toMatchObject({
      ...{ model: join(twin, 'model'), report: join(twin, 'report.html'), steps: 240, done: true },
      validation: { event: 'validation', step: 240 },
    });
    expectTwins(twin, straight);
    expect((await stepsOf(twin)).map(({ step }) => step)).toEqual(numbersTo(240));
  });
});

describe('the baseline', () => {
  const settings = (): TrainConfig => small({ validation: data, validateEvery: 1, steps: 6 });
  const linesOf = async (folder: string, event: LogEntry['event']): Promise<LogEntry[]> =>
    (await logOf(folder)).filter((entry) => entry.event === event);
  let folder: string;
  beforeAll(async () => {
    folder = inDir('below');
    await train(folder, settings());
  });

  test('is logged before the first step, and compared with the validations', async () => {
    const log = await logOf(folder);
    expect(log.map(({ event }) => event).slice(0, 4)).toEqual(['start', 'baseline', 'checkpoint', 'step']);
    expect(log[1]).toMatchObject({ channels: 8, fitted: { path: data, images: 6 } });
    const [baseline] = only(log, 'baseline');
    expect(baseline!.psnr).toBeGreaterThan(only(log, 'validation').at(-1)!.psnr + 1); // six steps are too few to learn anything
    for (const { effectiveRank, channelsInUse } of only(log, 'validation')) {
      expect(effectiveRank).toBeGreaterThanOrEqual(1);
      expect(effectiveRank).toBeLessThanOrEqual(8);
      expect([0, 1, 2, 3, 4, 5, 6, 7, 8].map((k) => k / 8)).toContain(channelsInUse);
    }
  });

  test('gives one warning with advice when a run is below it after half of its steps', async () => {
    const [warning, ...more] = only(await logOf(folder), 'warning');
    expect(more).toEqual([]);
    expect(warning).toMatchObject({
      step: 3,
      message: expect.stringMatching(/^PSNR .* after 3 of 6 steps is below the baseline, .*docs\/training\.md/),
    });
  });

  test('is kept with the warning when a run is resumed, without a second warning', async () => {
    const twin = inDir('below-twin');
    await train(twin, settings(), until(4));
    const baselines: unknown[] = [];
    const result = await resume(twin, { onBaseline: (entry) => baselines.push(entry), onWarning: () => expect('a warning').toBe('none') });
    expect(result).toMatchObject({ done: true, baseline: { event: 'baseline' }, damaged: 0 });
    expect(baselines).toEqual(await linesOf(folder, 'baseline'));
    expect(await linesOf(twin, 'baseline')).toEqual(await linesOf(folder, 'baseline'));
    expect(await linesOf(twin, 'warning')).toEqual(await linesOf(folder, 'warning'));
    expectTwins(twin, folder);
  });
});

describe('a damaged image', () => {
  /** The photographs, with a damaged file among them. */
  async function damagedPhotos(name: string): Promise<string> {
    const folder = inDir(name);
    await cp(data, folder, { recursive: true });
    await writeFile(join(folder, 'dz-broken.jpg'), 'no image');
    return folder;
  }
  const settings = (folder: string): TrainConfig => small({ data: folder, steps: 6 });
  let broken: string;
  let straight: string;
  beforeAll(async () => {
    broken = await damagedPhotos('broken-photos');
    straight = inDir('over-damage');
    await train(straight, settings(broken));
  });
  const resumed = async (name: string, change: (photos: string) => Promise<unknown>): Promise<string> => {
    const [photos, folder] = [await damagedPhotos(`${name}-photos`), inDir(name)];
    await train(folder, settings(photos), until(3));
    await change(photos);
    await resume(folder);
    return folder;
  };

  test('is skipped, counted and named, once', async () => {
    const folder = inDir('over-damage-shown');
    const { code, stderr, stdout } = await run(
      '--config',
      await settingsFile({ ...settings(broken), validation: broken }),
      '--out',
      folder,
    );
    expect(code).toBe(0);
    expect(stderr.match(/uniflow: dz-broken\.jpg: .*; the image is skipped\n/g)).toHaveLength(2); // one from each of the two sets
    expect(stdout).toMatch(/; 2 damaged images skipped; see /);
    const entries = only(await logOf(folder), 'damaged');
    expect(entries.map(({ of, id }) => [of, id]).sort()).toEqual([
      ['data', 'dz-broken.jpg'],
      ['validation', 'dz-broken.jpg'],
    ]);
    expect(await readFile(join(folder, 'report.html'), 'utf8')).toContain('2 images skipped: dz-broken.jpg, dz-broken.jpg');
  });

  test('may stay or be deleted while the run is stopped, with the same bits', async () => {
    expectTwins(await resumed('still-damaged', () => Promise.resolve()), straight);
    expectTwins(await resumed('damage-deleted', (photos) => rm(join(photos, 'dz-broken.jpg'))), straight);
  });

  test('is the only file that may be deleted', async () => {
    const whole = readFileSync(join(data, 'dogs.jpg'));
    await expect(resumed('photo-deleted', (photos) => rm(join(photos, 'dogs.jpg')))).rejects.toThrow(
      /a training on \{"images":7\}, but got \{"images":6\}/,
    );
    const another = async (photos: string): Promise<void> => {
      await rm(join(photos, 'dz-broken.jpg'));
      await writeFile(join(photos, 'zz-another-1.jpg'), whole);
      await writeFile(join(photos, 'zz-another-2.jpg'), whole);
    };
    await expect(resumed('photos-added', another)).rejects.toThrow(/a training on \{"images":7\}, but got \{"images":8\}/);
  });

  test('ends the run with a resumable checkpoint when all images are damaged', async () => {
    const [photos, folder] = [inDir('all-damaged'), inDir('all-damaged-run')];
    await cp(data, photos, { recursive: true });
    const ruin = async (step: number): Promise<void> => {
      if (step === 2) for (const name of await readdir(photos)) writeFileSync(join(photos, name), 'no image');
    };
    const error = await refusal(train(folder, small({ data: photos, steps: 40 }), { onStep: ({ step }) => void ruin(step) }));
    expect(error.message).toMatch(/none of 6 samples in a row can be read/);
    const log = await logOf(folder);
    const done = only(log, 'step').at(-1)!.step;
    expect(log.slice(-2)).toMatchObject([
      { event: 'checkpoint', step: done },
      { event: 'end', step: done, reason: 'failed' },
    ]);
  });
});

test('writes a checkpoint when a run fails, and resumes from it with the same bits', async () => {
  const [straight, folder] = [inDir('no-failure'), inDir('failure')];
  await train(straight, small());
  const fail = ({ step }: { step: number }): void => {
    if (step === 3) throw new Error('on purpose');
  };
  await expect(train(folder, small(), { onStep: fail })).rejects.toThrow('on purpose');
  expect(only(await logOf(folder), 'checkpoint').map(({ step }) => step)).toEqual([0, 3]);
  await resume(folder);
  expectTwins(folder, straight);
});

describe('SIGKILL', () => {
  const settings = (): TrainConfig => small({ steps: 40, checkpointEvery: 1 });
  let straight: string;

  beforeAll(async () => {
    straight = inDir('never-killed');
    await train(straight, settings());
  });

  test('at any moment, even while writing checkpoints, gives the same bits, no step twice, and no leftovers', async () => {
    const folder = inDir('killed');
    const config = await settingsFile(settings());
    const kills: { steps: number; temporaries: number }[] = [];
    for (let begun = false; kills.length < 4; begun = true) {
      const { child, ended } = begun ? command('--resume', folder) : command('--config', config, '--out', folder);
      await reaches(folder, (kills.at(-1)?.steps ?? 0) + 1 + Math.floor(4 * Math.random()));
      await sleep(40 * Math.random());
      child.kill('SIGKILL');
      await ended;
      const temporaries = (await readdir(folder, { recursive: true })).filter((name) => name.endsWith('.tmp')).length;
      expect(temporaries).toBeLessThanOrEqual(2); // left by this kill
      kills.push({ steps: (await stepsOf(folder)).length, temporaries });
    }
    expect(await run('--resume', folder)).toMatchObject({ code: 0 });
    expectTwins(folder, straight);
    expect((await stepsOf(folder)).map(({ step }) => step)).toEqual(numbersTo(40));
    expect((await readdir(folder, { recursive: true })).sort()).toEqual((await readdir(straight, { recursive: true })).sort());
  });

  test('before the first checkpoint makes the run start again', async () => {
    const folder = inDir('killed-at-once');
    await mkdir(folder);
    await cp(join(straight, 'train.json'), join(folder, 'train.json'));
    await writeFile(join(folder, 'log.jsonl'), '{"event":"start","time":"20');
    await resume(folder);
    expectTwins(folder, straight);
    expect((await logOf(folder)).map(({ event }) => event).slice(0, 3)).toEqual(['start', 'checkpoint', 'step']);
  });

  test('between model and state of the last step', async () => {
    const folder = inDir('killed-late');
    await train(folder, settings(), until(39));
    await cp(weightsOf(straight), weightsOf(folder));
    expect(await resume(folder)).toMatchObject({ steps: 40, done: true });
    expectTwins(folder, straight);
  });

  test('after a failed write of the last model is repaired on resume', async () => {
    const folder = inDir('killed-last');
    const inTheWay = ({ step }: { step: number }): void => {
      if (step < 40) return;
      rmSync(weightsOf(folder));
      mkdirSync(weightsOf(folder));
    };
    expect((await refusal(train(folder, settings(), { onStep: inTheWay }))).message).toMatch(/model cannot be written: .* is a folder/);
    await rm(weightsOf(folder), { recursive: true });
    expect(await resume(folder)).toMatchObject({ steps: 40, done: true });
    expectTwins(folder, straight);
  });

  test('removes incomplete files of earlier kills, and keeps those of others', async () => {
    const folder = inDir('littered');
    await train(folder, settings(), until(2));
    for (const name of ['state.safetensors', 'model/model.safetensors', 'log.jsonl'])
      await writeFile(join(folder, `${name}.${randomUUID()}.tmp`), 'half');
    await writeFile(join(folder, 'notes.tmp'), 'mine');
    await resume(folder);
    expect((await readdir(folder)).filter((name) => name.endsWith('.tmp'))).toEqual(['notes.tmp']);
    expect(await readdir(join(folder, 'model'))).toHaveLength(2);
  });

  test('redoes a truncated log line and lines after the checkpoint', async () => {
    const folder = inDir('torn');
    await train(folder, { ...settings(), checkpointEvery: 5 }, until(7)); // a signal writes a checkpoint; simulates a later kill
    const [line] = (await readFile(join(folder, 'log.jsonl'), 'utf8')).split('\n').filter((text) => text.includes('"step":7'));
    appendFileSync(join(folder, 'log.jsonl'), `${line!.replace('"step":7', '"step":8')}\n{"event":"step","st`);
    await resume(folder);
    expect((await stepsOf(folder)).map(({ step }) => step)).toEqual(numbersTo(40));
  });
});

describe('a full disk', () => {
  const mounted: string[] = [];
  afterAll(() => mounted.forEach((path) => execFileSync('umount', ['--lazy', path]))); // files that were read stay mapped until V8 collects them
  const mountable = ((): boolean => {
    try {
      const at = execFileSync('mktemp', ['-d']).toString().trim();
      execFileSync('mount', ['-t', 'tmpfs', 'tmpfs', at], { stdio: 'ignore' });
      execFileSync('umount', [at]);
      execFileSync('rmdir', [at]);
      return true;
    } catch {
      return false;
    }
  })();

  async function disk(name: string, bytes: number): Promise<string> {
    const path = inDir(name);
    await mkdir(path);
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${bytes}`, 'tmpfs', path]);
    mounted.push(path);
    return path;
  }

  /** Fills the file system, leaving `left` bytes. */
  function fill(folder: string, left: number): void {
    const free = Number(execFileSync('df', ['--output=avail', '-B1', folder]).toString().split('\n')[1]);
    writeFileSync(join(folder, 'filler'), new Uint8Array(Math.max(0, free - left)));
  }

  (mountable ? test : test.skip).each([
    ['no room for the model', () => 0, /model cannot be written: .*no space left/i],
    ['room for the model, none for the state', (model: number) => 1.5 * model, /state\.safetensors cannot be written: .*no space left/i],
  ])(`%s: nothing is lost${mountable ? '' : ' (SKIPPED: this user may not mount a tmpfs)'}`, async (name, room, message) => {
    const settings = small({ steps: 8, checkpointEvery: 3, dtype: 'float32' });
    const straight = inDir(`straight ${name}`);
    await train(straight, settings);
    const [state, model] = [stateOf, weightsOf].map((file) => statSync(file(straight)).size) as [number, number];

    const folder = await disk(name, 4 * (state + model) + 2 ** 20);
    const full = train(folder, settings, { onStep: ({ step }) => step === 6 && fill(folder, room(model)) });
    const error = await refusal(full);
    expect(error.message).toMatch(message);
    const log = await logOf(folder);
    expect(only(log, 'checkpoint').at(-1)!.step).toBe(3);
    expect(only(log, 'end').map(({ reason }) => reason)).toEqual(expect.not.arrayContaining(['done']));
    expect((await readdir(folder, { recursive: true })).filter((file) => file.endsWith('.tmp'))).toEqual([]);
    await using kept = await UniFlow.load(join(folder, 'model'));
    expect(kept.config.latentChannels).toBe(8);

    await rm(join(folder, 'filler'));
    await resume(folder);
    expectTwins(folder, straight);
    expect((await stepsOf(folder)).map(({ step }) => step)).toEqual(numbersTo(8));
  });

  (mountable ? test : test.skip)('a log entry that has no room is not written at all, and the error names the log', async () => {
    const settings = small({ steps: 200, dtype: 'float32' });
    const folder = await disk('log', 16 * 2 ** 20);
    const error = await refusal(train(folder, settings, { onStep: ({ step }) => step === 1 && fill(folder, 0) }));
    expect(error.message).toMatch(/log\.jsonl cannot be written: .*no space left/i);
    expect(readFileSync(join(folder, 'log.jsonl'), 'utf8')).toMatch(/\}\n$/);
    await rm(join(folder, 'filler'));
    await resume(folder, until(3));
    expect((await stepsOf(folder)).map(({ step }) => step)).toEqual([1, 2, 3]);
  });
});

describe('from an encoder', () => {
  const families = ['clip', 'dinov2', 'dinov2-registers', 'dinov2-swiglu', 'dinov3', 'internvl', 'siglip'];
  const from = (family: string, changes: Partial<TrainConfig> = {}): TrainConfig => ({
    ...{ encoder: golden(family), data, latentChannels: 8, globalBlocks: 1, flowBlocks: 1 },
    ...{ steps: 3, batch: 3, warmup: 0, lr: 1e-3, ema: 0, dtype: 'float32' },
    ...changes,
  });

  test.each(families)('%s: a distilled tokenizer that loads', async (family) => {
    const folder = inDir(family);
    const { model } = await train(folder, from(family, { validation: data }));
    const [first, , third] = await stepsOf(folder);
    expect(Math.max(...first!.alpha)).toBeLessThan(1e-6); // the student still equals the teacher
    expect(first!.alpha).toHaveLength(2);
    expect(mean(first!.weight)).toBeCloseTo(1 / 2, 5);
    expect(Math.min(...third!.alpha)).toBeGreaterThan(1e-6);
    await using uniflow = await UniFlow.load(model);
    const { psnr } = await uniflow.reconstruct([join(data, 'dogs.jpg')]);
    expect(Number.isFinite(psnr)).toBe(true);
  });

  describe('regimes', () => {
    const folders = {} as Record<Regime, string>;
    beforeAll(async () => {
      for (const regime of Object.keys(regimes) as Regime[]) {
        folders[regime] = inDir(`regime-${regime}`);
        await train(folders[regime], from('dinov2', { regime, start: 'random', steps: 30, encoderLr: 1e-3, lambdaDistillation: 3 }));
      }
    });

    /** 1 − cos between the layers of the trained encoder and its source, on the photographs. */
    async function distances(regime: Regime): Promise<number[]> {
      await using student = await UniFlow.load(join(folders[regime], 'model'));
      await using teacher = await VisionEncoder.load(golden('dinov2'));
      const files = (await readdir(data)).map((name) => join(data, name));
      const pixels = { pixels: (await student.reconstruct(files)).originals as NdArray };
      const states = await Promise.all([student, teacher].map((model) => model.encode(pixels, { hiddenStates: true })));
      const [s, t] = states.map(({ hiddenStates }) => hiddenStates!.slice(1)) as [NdArray[], NdArray[]];
      return (await distillation(s, t, { skip: 1 })).alpha;
    }

    test('keeps the layers closer to the teacher with distillation than with fine-tuning', async () => {
      const free = await distances('finetune');
      for (const regime of ['adaptive', 'uniform'] as const) {
        const held = await distances(regime);
        held.forEach((alpha, layer) => expect(alpha).toBeLessThan(0.5 * free[layer]!));
      }
      const last = await distances('last');
      expect(last.at(-1)!).toBeLessThan(0.5 * free.at(-1)!);
      expect(Math.max(...(await distances('frozen')))).toBeLessThan(1e-6);
    });

    test('weights deep layers more with adaptive; uniform and last do as named', async () => {
      for (const { weight } of await stepsOf(folders.adaptive)) expect(weight[1]!).toBeGreaterThan(weight[0]!);
      for (const { weight } of await stepsOf(folders.uniform)) expect(weight).toEqual([0.5, 0.5]);
      for (const { weight } of await stepsOf(folders.last)) expect(weight).toEqual([0, 1]);
      for (const regime of ['finetune', 'frozen'] as const)
        for (const { alpha, loss, flow } of await stepsOf(folders[regime])) expect({ alpha, loss }).toEqual({ alpha: [], loss: flow });
    });

    test('leaves the encoder bit-identical with frozen, and only then', async () => {
      const source = await readTensors(join(golden('dinov2'), 'model.safetensors'));
      const changed = async (regime: Regime): Promise<string[]> => {
        const trained = await readTensors(weightsOf(folders[regime]));
        return Object.keys(source).filter((name) => {
          const own = trained[`vision_model.${name}`];
          return own !== undefined && !Buffer.from(own.data.buffer).equals(Buffer.from(source[name]!.data.buffer));
        });
      };
      expect(await changed('frozen')).toEqual([]);
      for (const regime of ['adaptive', 'uniform', 'last', 'finetune'] as const) expect((await changed(regime)).length).toBeGreaterThan(20);
    });

    test('logs the number of trained parameters', async () => {
      const counts = async (regime: Regime): Promise<{ parameters: number; trained: number }> =>
        only(await logOf(folders[regime]), 'start')[0]!.model;
      const { parameters, trained } = await counts('frozen');
      const own = Object.entries(await readTensors(weightsOf(folders.frozen)));
      const size = (tensors: typeof own): number => tensors.reduce((sum, [, { data }]) => sum + data.length, 0);
      expect({ parameters, trained }).toEqual({
        parameters: size(own),
        trained: size(own.filter(([name]) => !name.startsWith('vision_model.'))),
      });
      expect(await counts('adaptive')).toEqual({ parameters, trained: parameters });
    });
  });

  test('uses the encoder as the teacher when continuing a UniFlow model', async () => {
    const folder = inDir('from-uniflow');
    await train(folder, { model: golden('uniflow-tiny'), data, steps: 2, batch: 3, warmup: 0, dtype: 'float32' });
    const [first, second] = await stepsOf(folder);
    expect(Math.max(...first!.alpha)).toBeLessThan(1e-6);
    expect(second!.distillation).toBeGreaterThan(0);
  });
});

describe('model/', () => {
  /** Counts the parameters that are equal in a checkpoint and in a state under the same name. */
  async function sameIn(folder: string, kind: 'average' | 'master'): Promise<{ same: number; of: number }> {
    const [model, state] = [await readTensors(weightsOf(folder)), await readTensors(stateOf(folder))];
    const names = Object.keys(model).filter((name) => state[`${name}.${kind}`] !== undefined);
    const same = names.filter((name) => Buffer.from(model[name]!.data.buffer).equals(Buffer.from(state[`${name}.${kind}`]!.data.buffer)));
    return { same: same.length, of: names.length };
  }

  test('holds the moving average, not the last weights', async () => {
    const folder = inDir('averaged');
    await train(folder, small({ dtype: 'float32' }));
    const average = await sameIn(folder, 'average');
    expect(average.same).toBe(average.of);
    expect(average.of).toBeGreaterThan(20);
    expect((await sameIn(folder, 'master')).same).toBeLessThan(average.of / 2);
  });

  test('holds the last weights when no average is kept', async () => {
    const folder = inDir('not-averaged');
    await train(folder, small({ dtype: 'float32', ema: 0 }));
    const last = await sameIn(folder, 'master');
    expect(last.same).toBe(last.of);
    expect((await sameIn(folder, 'average')).of).toBe(0);
  });
});

test('exits with 1, logs the end and keeps the last checkpoint when a run diverges', async () => {
  const folder = inDir('diverged');
  const settings = small({ lr: 1e30, warmup: 0, clipNorm: 0, checkpointEvery: 2, steps: 50, maxSkipped: 3 });
  const { code, stderr, stdout } = await run('--config', await settingsFile(settings), '--out', folder);
  expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
  expect(stderr).toMatch(/step \d+: the gradient is not finite; the step is skipped\n/);
  expect(stderr).toMatch(/\nuniflow: 3 steps in a row had a gradient that is not finite: lower the learning rate\n$/);
  const log = await logOf(folder);
  expect(log.at(-1)).toMatchObject({ event: 'end', reason: 'failed', message: expect.stringContaining('lower the learning rate') });
  expect(only(log, 'step').filter(({ skipped }) => skipped)).toHaveLength(2); // the third ends the run
  const bytes = readFileSync(stateOf(folder));
  await using uniflow = await UniFlow.load(join(folder, 'model'));
  expect(uniflow.dtype).toBe('float32');
  expect((await refusal(resume(folder))).message).toContain('3 steps in a row');
  expect(readFileSync(stateOf(folder)).length).toBe(bytes.length);
});

test('frees the memory of a run', async () => {
  await train(inDir('memory'), small({ validation: data }));
  const before = memoryStats();
  await train(inDir('memory-2'), small({ validation: data }));
  const after = memoryStats();
  expect({ active: after.host.active, handles: after.handles }).toEqual({ active: before.host.active, handles: before.handles });
});

test.each([
  ['before its first step', { batch: 64 }, {}],
  [
    'at a step',
    {},
    {
      onStep: () => {
        throw new UniFlowError('INTERNAL', 'on purpose');
      },
    },
  ],
])('so does one that fails %s', async (when, changes, options) => {
  await train(inDir(`warm ${when}`), small());
  const before = memoryStats();
  await refusal(train(inDir(`failed ${when}`), small(changes), options));
  const after = memoryStats();
  expect({ active: after.host.active, handles: after.handles }).toEqual({ active: before.host.active, handles: before.handles });
});

describe('rejected runs', () => {
  test('lists every unknown, missing or invalid setting at once, by name', () => {
    const wrong = { init: 'nano', regime: 'finetune', batch: 0, lrr: 1, ema: 2, time: { mean: 0 }, regimee: 'x', dtype: 'float64' };
    let message = '';
    try {
      parseTrainConfig(wrong);
    } catch (error) {
      message = (error as Error).message;
      expect(error).toMatchObject({ code: 'BAD_INPUT' });
    }
    for (const name of ['data', 'steps', 'batch', 'ema', 'time', 'dtype', 'lrr', 'regimee']) expect(message).toContain(name);
  });

  test.each<[string, Partial<TrainConfig>, RegExp]>([
    ['no start', { init: undefined }, /one of 'encoder', 'model' and 'init' to start from, but got none/],
    ['two starts', { encoder: 'x' }, /to start from, but got several/],
    [
      'a new model that is distilled',
      { regime: 'adaptive' },
      /regime: expected 'finetune' or 'frozen', as a new model has no teacher, but got/,
    ],
    ['a batch that does not divide', { batch: 6, accumulate: 4 }, /batch: expected a multiple of 4 \(accumulate\), but got 6/],
    ['data that is not there', { data: '/nowhere' }, /\/nowhere: expected a file or folder, but got nothing of that name/],
    ['validation data that is not there', { validation: '/nowhere' }, /\/nowhere: expected a file or folder/],
    ['an encoder that is not there', { init: undefined, encoder: '/nowhere', regime: 'adaptive' }, /\/nowhere/],
    ['a size below one patch', { size: 13 }, /size: expected whole numbers from the patch size 14.*but got 13/],
    ['a batch larger than the data', { batch: 64 }, /dataset: expected at least 64 samples \(a batch\), but got 6/],
    ['crops of nothing', { scale: [0, 1] }, /scale: expected a range within \(0, 1\]/],
  ])('%s, before the folder is touched', async (_, changes, message) => {
    const folder = inDir('refused');
    const error = await refusal(train(folder, small(changes)));
    expect(error.message).toMatch(message);
    expect(await readdir(dir)).not.toContain('refused');
  });

  test('rejects a folder that contains a run, leaves it unchanged, and says what to do', async () => {
    const folder = inDir('taken');
    await train(folder, small());
    const times = (): number[] => readdirSync(folder).map((name) => statSync(join(folder, name)).mtimeMs);
    const before = times();
    const error = await refusal(train(folder, small({ seed: 8 })));
    expect(error.message).toMatch(/taken\/log\.jsonl: is there already: resume that run, or choose another folder/);
    expect(times()).toEqual(before);
  });

  test('rejects resuming where there is no run', async () => {
    const error = await refusal(resume(data));
    expect(error).toMatchObject({ code: 'NOT_FOUND' });
    expect(error.message).toMatch(/train\.json: expected the settings of a training run, but got no such file/);
  });

  describe('resuming rejects', () => {
    let folder: string;
    beforeAll(async () => {
      folder = inDir('stopped');
      await train(folder, small(), until(2));
    });
    const copy = async (changes: Partial<TrainConfig> = {}): Promise<string> => {
      const to = inDir(randomUUID());
      await cp(folder, to, { recursive: true });
      await writeFile(join(to, 'train.json'), JSON.stringify(small(changes)));
      return to;
    };

    test('more or fewer images', async () => {
      const more = inDir('more-photos');
      await cp(data, more, { recursive: true });
      await cp(join(data, 'dogs.jpg'), join(more, 'dogs-2.jpg'));
      const error = await refusal(resume(await copy({ data: more })));
      expect(error.message).toMatch(/state\.safetensors: expected a training on \{"images":6\}, but got \{"images":7\}/);
    });

    test('the state of another model, or without its moving average', async () => {
      const other = /state\.safetensors is of another model or of other settings: /;
      expect((await refusal(resume(await copy({ init: 'nano' })))).message).toMatch(other);
      expect((await refusal(resume(await copy({ ema: 0 })))).message).toMatch(other);
    });

    test('a lost state, instead of overwriting the log', async () => {
      const to = await copy();
      await rm(stateOf(to));
      const log = readFileSync(join(to, 'log.jsonl'), 'utf8');
      expect((await refusal(resume(to))).message).toMatch(/state\.safetensors: expected a readable file, but got No such file/);
      expect(readFileSync(join(to, 'log.jsonl'), 'utf8')).toBe(log);
    });

    test('a damaged state', async () => {
      const to = await copy();
      writeFileSync(stateOf(to), readFileSync(stateOf(to)).subarray(0, 4000));
      expect(await refusal(resume(to))).toMatchObject({ code: 'BAD_CHECKPOINT' });
      await cp(weightsOf(to), stateOf(to));
      expect((await refusal(resume(to))).message).toMatch(/expected the state of a training \(uniflow-training-1\), but got pt/);
    });
  });
});

describe('uniflow train', () => {
  test.each<[string, string[], string]>([
    ['no folder', ['--init', 'nano'], 'the option --out is missing'],
    ['no start', ['--data', 'x', '--steps', '1', '--out', 'x'], "one of 'encoder', 'model' and 'init' to start from"],
    ['no data', ['--init', 'nano', '--regime', 'finetune', '--steps', '1', '--out', 'x'], 'data: '],
    [
      'a regime that needs a teacher',
      ['--init', 'nano', '--data', 'x', '--steps', '1', '--out', 'x'],
      "regime: expected 'finetune' or 'frozen'",
    ],
    ['settings with --resume', ['--resume', 'x', '--lr', '1'], '--resume goes on with the settings of the run; it takes no others'],
    ['an unknown option', ['--learning-rate', '1'], "unknown option '--learning-rate'"],
    ['a number that is none', ['--steps', 'many'], 'It must be a whole number from 1.'],
  ])('%s is bad usage', async (_, args, message) => {
    const { code, stderr, stdout } = await run(...args);
    expect({ code, stdout }).toEqual({ code: 2, stdout: '' });
    expect(stderr).toContain(message);
  });

  test('names missing options', async () => {
    for (const args of [
      ['--resume', data],
      ['--config', inDir('none.json'), '--out', inDir('x')],
    ]) {
      const { code, stderr } = await run(...args);
      expect(code).toBe(1);
      expect(stderr).toMatch(/^uniflow: .*(train|none)\.json: expected the settings of a training run, but got no such file\n$/);
    }
  });

  test('lets options override the file of --config, and reports the run', async () => {
    const folder = inDir('by-command');
    const config = await settingsFile(small({ steps: 99, lr: 1 }));
    const { code, stdout } = await run('--config', config, '--steps', '3', '--lr', '1e-3', '--validation', data, '--out', folder);
    expect(code).toBe(0);
    expect(stdout).toMatch(/^3 steps done: .*by-command\/model \(PSNR .* dB, SSIM .*\); see .*by-command\/report\.html\n$/);
    expect(JSON.parse(await readFile(join(folder, 'train.json'), 'utf8'))).toMatchObject({ steps: 3, lr: 1e-3, warmup: 2, seed: 7 });
  });
});
