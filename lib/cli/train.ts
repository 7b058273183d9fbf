/** `uniflow train`: an encoder and pictures to a tokenizer, in a folder of its own. */
import { UniFlowError } from '../errors.js';
import { setThreads, type DeviceOptions } from '../device.js';
import { parseTrainConfig, readSettings, type TrainConfig } from '../train/config.js';
import { resume, settingsOf, train, type TrainOptions, type TrainResult } from '../train/train.js';
import type { LogEntryOf } from '../train/log.js';
import type { ReportOptions } from './options.js';
import { printJson } from './output.js';
import { Progress } from './progress.js';

/** What the command line says of the run itself; everything else is a setting, and wins over the config file's. */
export interface TrainCommandOptions extends ReportOptions, Partial<TrainConfig> {
  out?: string;
  resume?: string;
  config?: string;
  device?: DeviceOptions['device'];
  threads?: number;
}

export async function trainCommand(options: TrainCommandOptions, signal: AbortSignal): Promise<void> {
  const { out, resume: stopped, config, device, threads, json, ...given } = options;
  if (threads !== undefined) setThreads(threads);
  if (stopped !== undefined) {
    if (out !== undefined || config !== undefined || Object.keys(given).length > 0)
      throw new UniFlowError('BAD_INPUT', '--resume goes on with the settings of the run; it takes no others', { subject: 'resume' });
    const settings = await settingsOf(stopped);
    return report(await shown(settings.steps, settings.batch, json === true, (o) => resume(stopped, { ...o, device, signal })), json);
  }
  if (out === undefined) throw new UniFlowError('BAD_INPUT', 'the option --out is missing: the folder of the run', { subject: 'out' });
  const settings = parseTrainConfig({ ...(config === undefined ? {} : await readSettings(config)), ...given });
  report(await shown(settings.steps, settings.batch, json === true, (o) => train(out, settings, { ...o, device, signal })), json);
}

/** Runs `work` under a progress bar with the losses beside it. */
async function shown(
  steps: number,
  batch: number,
  quiet: boolean,
  work: (options: TrainOptions) => Promise<TrainResult>,
): Promise<TrainResult> {
  const progress = new Progress('train', { unit: 'images' }, quiet);
  let started = false;
  const recent = new Recent();
  try {
    return await work({
      onStep: (entry) => {
        if (!started) progress.start(steps * batch, (entry.step - 1) * batch);
        started = true;
        if (entry.skipped && !quiet) progress.line(`step ${entry.step}: the gradient is not finite; the step is skipped`);
        progress.update(entry.step * batch, recent.with(entry));
      },
      onWarning: (message) => {
        if (!quiet) progress.line(`warning: ${message}`);
      },
      onValidation: ({ step, psnr, ssim }) => {
        if (!quiet) progress.line(`step ${step}: validation PSNR ${psnr.toFixed(2)} dB, SSIM ${ssim.toFixed(4)}`);
      },
    });
  } finally {
    progress.stop();
  }
}

/** Losses as a moving average over about twenty steps. */
class Recent {
  private flow: number | undefined;
  private distillation: number | undefined;

  with(entry: LogEntryOf<'step'>): string {
    this.flow = mixed(this.flow, entry.flow);
    this.distillation = mixed(this.distillation, entry.distillation);
    const distillation = entry.alpha.length > 0 ? `, distillation ${this.distillation.toPrecision(3)}` : '';
    return `flow ${this.flow.toPrecision(3)}${distillation}`;
  }
}

function mixed(before: number | undefined, value: number): number {
  return before === undefined || !Number.isFinite(value) ? value : 0.95 * before + 0.05 * value;
}

function report(result: TrainResult, json: boolean | undefined): void {
  if (json) return printJson(result);
  const { model, report: page, steps, validation, done } = result;
  const quality = validation ? ` (PSNR ${validation.psnr.toFixed(2)} dB, SSIM ${validation.ssim.toFixed(4)})` : '';
  process.stdout.write(`${done ? `${steps} steps done` : `stopped after ${steps} steps`}: ${model}${quality}; see ${page}\n`);
}
