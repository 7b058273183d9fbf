/**
 * A training run: from data to a tokenizer, in a folder of its own.
 *
 *   train.json              the settings, defaults included
 *   log.jsonl               the events, one per line
 *   state.safetensors       the state for resuming: bit-identical to a run that was not stopped
 *   model/                  the tokenizer (moving average of the weights), loadable at any time
 *   report.html             curves, layers, images
 */
import type { NdArray } from 'ndarray';
import { rm } from 'node:fs/promises';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { batches, type Batch } from './loader.js';
import { openDataset, type Dataset } from '../sources/dataset.js';
import { presets } from '../config.js';
import { cpuInfo, type DeviceOptions } from '../device.js';
import { VisionEncoder } from '../encoder/vision-encoder.js';
import { makeFolder, removeTemporaries, replaceFile } from '../io/files.js';
import { checkSize } from '../images/input.js';
import { UniFlow } from '../uniflow.js';
import { linearStart, shortfalls, type Kept } from '../start/index.js';
import { parseTrainConfig, readSettings, type FullTrainConfig, type TrainConfig } from './config.js';
import { DamagedImages, withGaps } from './images.js';
import { entriesThrough, readLog, RunLog, type LogEntry, type LogEntryOf } from './log.js';
import type { TrainOptions, TrainResult } from './options.js';
import { latentSourceOf, regimes } from './regimes.js';
import { reportRows, writeReport } from './report.js';
import { learningRate } from './schedule.js';
import { loadState, saveState } from './state.js';
import { Trainer, type StepResult } from './trainer.js';
import { Validation } from './validation.js';

/**
 * Trains in `folder`, which must not contain a run yet. Nothing is written before data and model have been checked.
 * @throws UniFlowError `BAD_INPUT` for invalid settings; `INTERNAL` if the gradient stays non-finite; the state of the last checkpoint is kept.
 */
export async function train(folder: string, config: TrainConfig, options: TrainOptions = {}): Promise<TrainResult> {
  return new Run(folder, parseTrainConfig(config), options).run(false);
}

/** Resumes a run, however it was stopped. The weights become those of an uninterrupted run. */
export async function resume(folder: string, options: TrainOptions = {}): Promise<TrainResult> {
  return new Run(folder, await settingsOf(folder), options).run(true);
}

/** The settings of the run in `folder`. @throws UniFlowError `NOT_FOUND` if there is none. */
export async function settingsOf(folder: string): Promise<FullTrainConfig> {
  return parseTrainConfig(await readSettings(join(folder, 'train.json')));
}

class Run {
  private readonly path: Record<'settings' | 'log' | 'state' | 'model' | 'report', string>;
  /** Whether a step is under way. */
  private stepping = false;

  constructor(
    private readonly folder: string,
    private readonly settings: FullTrainConfig,
    private readonly options: TrainOptions,
  ) {
    const at = (name: string): string => join(folder, name);
    this.path = {
      settings: at('train.json'),
      log: at('log.jsonl'),
      state: at('state.safetensors'),
      model: at('model'),
      report: at('report.html'),
    };
  }

  async run(resumed: boolean): Promise<TrainResult> {
    const data = await openDataset(this.settings.data);
    if (data.skipped && data.skipped.length > 0) this.options.onSkipped?.(data.skipped);
    try {
      const { uniflow, teacher } = await startOf(this.settings, this.options.device);
      try {
        return await this.train(data, uniflow, teacher, resumed);
      } finally {
        await uniflow.dispose();
        await teacher?.dispose();
      }
    } finally {
      await data.close();
    }
  }

  private async train(
    data: Dataset,
    uniflow: UniFlow,
    teacher: VisionEncoder | UniFlow | undefined,
    resumed: boolean,
  ): Promise<TrainResult> {
    const { settings, options } = this;
    const past = resumed ? await this.past() : [];
    const damaged = new DamagedImages(past);
    const begun = past.length > 0;
    const validation = await Validation.open(uniflow, settings, damaged.in('validation'));
    const images = await withGaps(data, past);
    const kept = begun ? undefined : await this.start(images, uniflow, damaged);
    using trainer = trainerOf(settings, uniflow, teacher);
    // Changed data would not be visited in the order in which the run began.
    const pins = { images: images.length };
    const begin = begun ? (await loadState(this.path.state, trainer, pins)).iteration : 0;
    const loader = this.loader(images, uniflow, begin, damaged);
    const log = resumed ? await this.reopen(begun ? begin : undefined) : await this.open();
    let step = begin;
    let saved = begun ? begin : -1;
    // Write the model first: if the state is that of the last step, resuming has nothing left to do.
    const checkpoint = async (): Promise<void> => {
      await trainer.evaluating(() => uniflow.save(this.path.model));
      await saveState(this.path.state, trainer, pins);
      log.write({ event: 'checkpoint', step, path: this.path.state });
      saved = step;
    };
    try {
      log.write(begun ? { event: 'resume', time: now(), step: begin } : this.startEntry(uniflow, images, kept));
      damaged.reportTo((entry) => {
        log.write(entry);
        options.onDamaged?.(entry);
      });
      for (const message of kept ? shortfalls(kept) : []) {
        const warning = { event: 'warning', step: 0, message } as const;
        log.write(warning);
        options.onWarning?.(warning);
      }
      await validation?.begin(images, { past: entriesThrough(past, begin), log, options, onDamaged: damaged.in('data') });
      if (!begun) await checkpoint(); // from here on, a killed run can be resumed
      for await (const entry of this.steps(trainer, loader, begin)) {
        step = entry.step;
        log.write(entry);
        options.onStep?.(entry);
        const last = step === settings.steps || options.signal?.aborted === true;
        if (validation && (last || step % settings.validateEvery === 0)) await trainer.evaluating(() => validation.run(step));
        if (last || step % settings.checkpointEvery === 0) await checkpoint();
        if (last) break;
      }
      const done = step >= settings.steps;
      log.write({ event: 'end', time: now(), step, reason: done ? 'done' : 'interrupted' });
      await trainer.finish();
      await this.report(uniflow, validation?.pixels);
      const { model, report } = this.path;
      return { model, report, steps: step, validation: validation?.last, baseline: validation?.baseline, damaged: damaged.count, done };
    } catch (error) {
      // A failed step leaves an invalid state, so the previous checkpoint is kept.
      if (!this.stepping && saved < step) await checkpoint().catch(() => undefined);
      writeIfPossible(log, { event: 'end', time: now(), step, reason: 'failed', message: (error as Error).message });
      throw error;
    } finally {
      await log.close();
    }
  }

  /** Turns a new model into the linear codec of the data, with the run's crops. */
  private async start(data: Dataset, uniflow: UniFlow, damaged: DamagedImages): Promise<Kept | undefined> {
    const { start = 'linear', model, encoder, size, seed, scale, flip } = this.settings;
    if (model !== undefined || start === 'random') return undefined;
    const { signal } = this.options;
    return linearStart(uniflow, data, {
      ...{ encoder: encoder === undefined ? 'random' : 'pretrained', crop: 'random', size, seed, scale, flip, signal },
      onDamaged: damaged.in('data'),
    });
  }

  /** Creates the run's folder. */
  private async open(): Promise<RunLog> {
    await makeFolder(this.folder);
    const log = await RunLog.open(this.path.log);
    await replaceFile(this.path.settings, (file) => file.writeFile(JSON.stringify(this.settings, null, 2) + '\n'));
    return log;
  }

  /** Reopens the log, up to `step` or empty, and removes files left incomplete by a kill. */
  private async reopen(step: number | undefined): Promise<RunLog> {
    await removeTemporaries(this.folder);
    await removeTemporaries(this.path.model).catch(() => undefined); // it may not exist yet
    if (step !== undefined) return RunLog.open(this.path.log, { keepThrough: step });
    await rm(this.path.log, { force: true });
    return RunLog.open(this.path.log);
  }

  /** The log of a resumed run; empty if it was killed before its first checkpoint, because it then starts again. */
  private async past(): Promise<LogEntry[]> {
    const log = await readLog(this.path.log);
    return log.some(({ event }) => event === 'checkpoint') ? log : [];
  }

  private loader(data: Dataset, uniflow: UniFlow, from: number, damaged: DamagedImages): AsyncGenerator<Batch> {
    const { settings } = this;
    return batches(data, {
      batchSize: settings.batch,
      size: checkSize(settings.size ?? uniflow.config.imageSize, uniflow.config.patch),
      seed: settings.seed,
      shuffle: true,
      crop: 'random',
      scale: settings.scale,
      flip: settings.flip,
      from,
      onDamaged: damaged.in('data'),
    });
  }

  /** Yields one log entry per step, from step `begin` on. */
  private async *steps(trainer: Trainer, loader: AsyncGenerator<Batch>, begin: number): AsyncGenerator<LogEntryOf<'step'>> {
    const { settings } = this;
    let last = performance.now();
    let step = begin;
    if (step >= settings.steps) return;
    for await (const batch of loader) {
      const lrScale = learningRate(step, { steps: settings.steps, warmup: settings.warmup, floor: settings.lrFloor });
      this.stepping = true;
      const result: StepResult = await trainer.step({ pixels: batch.pixels }, { lrScale });
      this.stepping = false;
      const seconds = (performance.now() - last) / 1000;
      last = performance.now();
      step++;
      yield { event: 'step', step, epoch: batch.epoch, ...result, lr: settings.lr * lrScale, imagesPerSecond: settings.batch / seconds };
      if (step >= settings.steps) return;
    }
  }

  private startEntry(uniflow: UniFlow, data: Dataset, kept: Kept | undefined): LogEntry {
    const { settings } = this;
    const count = (parameters: UniFlow['parameters']): number =>
      parameters.reduce((sum, { tensor }) => sum + tensor.shape.reduce((a, b) => a * b, 1), 0);
    const parameters = count(uniflow.parameters);
    const frozen = 'freezeEncoder' in regimes[settings.regime] ? count(uniflow.encoderParameters) : 0;
    const { threads, kernels } = cpuInfo();
    return {
      event: 'start',
      time: now(),
      config: settings,
      model: { parameters, trained: parameters - frozen },
      data: { path: settings.data, images: data.length },
      ...(kept ? { start: kept } : {}),
      machine: { cpu: cpus()[0]?.model ?? 'unknown', threads, kernels, node: process.version },
    };
  }

  private async report(uniflow: UniFlow, held: NdArray<Uint8Array> | undefined): Promise<void> {
    const rows = held ? await reportRows(uniflow, held) : [];
    await writeReport(this.path.report, { title: 'UniFlow training', log: await readLog(this.path.log), rows });
  }
}

/** The model at step 0, and its teacher: a second copy, because the first one changes. */
async function startOf(
  settings: FullTrainConfig,
  device: DeviceOptions['device'],
): Promise<{ uniflow: UniFlow; teacher: VisionEncoder | UniFlow | undefined }> {
  const { encoder, model, init, dtype, seed, latentChannels, latentLayers, codes, globalBlocks, flowBlocks } = settings;
  const distilled = !('lambdaDistillation' in regimes[settings.regime]);
  if (encoder !== undefined) {
    const own = await VisionEncoder.load(encoder, { device, dtype });
    const source = { ...latentSourceOf(settings.regime, own.config.layers), ...(latentLayers === undefined ? {} : { latentLayers }) };
    const uniflow = UniFlow.fromEncoder(own, { latentChannels, ...source, codes, globalBlocks, flowBlocks, seed });
    await own.dispose(); // the tokenizer now holds the weights
    return { uniflow, teacher: distilled ? await VisionEncoder.load(encoder, { device, dtype }) : undefined };
  }
  if (model !== undefined)
    return {
      uniflow: await UniFlow.load(model, { device, dtype }),
      teacher: distilled ? await UniFlow.load(model, { device, dtype }) : undefined,
    };
  const config = typeof init === 'string' ? presets[init] : (init as Record<string, unknown>);
  return { uniflow: UniFlow.random({ ...config, ...(codes ? { codes } : {}) }, { device, dtype, seed }), teacher: undefined };
}

function trainerOf(settings: FullTrainConfig, uniflow: UniFlow, teacher: VisionEncoder | UniFlow | undefined): Trainer {
  const { lr, encoderLr = lr, betas, weightDecay, clipNorm, ema } = settings;
  const { lambdaFlow, lambdaDistillation, beta, time, accumulate, recompute, seed, maxSkipped } = settings;
  return new Trainer(uniflow, {
    ...(teacher ? { teacher } : {}),
    optimizer: { lr, encoderLr, betas, weightDecay, clipNorm, ema },
    ...{ lambdaFlow, lambdaDistillation, beta, time, accumulate, recompute, seed, maxSkipped },
    ...regimes[settings.regime],
  });
}

/** Logs the end of a run if the disk allows it; the reason for the end matters more. */
function writeIfPossible(log: RunLog, entry: LogEntry): void {
  try {
    log.write(entry);
  } catch {
    return;
  }
}

const now = (): string => new Date().toISOString();
