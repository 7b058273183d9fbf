/** `uniflow train`: trains a tokenizer from an encoder and images, in a run folder. */
import { UniFlowError } from '../errors.js';
import { setThreads, type DeviceOptions } from '../device.js';
import { parseTrainConfig, readSettings, type FullTrainConfig, type TrainConfig } from '../train/config.js';
import type { TrainOptions, TrainResult } from '../train/options.js';
import { resume, settingsOf, train } from '../train/train.js';
import type { LogEntryOf } from '../train/log.js';
import { baselineText, validationText } from '../train/log-text.js';
import type { ReportOptions } from './options.js';
import { plural, printJson } from './output.js';
import { Progress, Stages } from './progress.js';
import { Skips } from '../sources/skips.js';
import { reportSkips } from './shared.js';

/** Options of the command itself. All others are settings, which override the config file. */
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
    return report(await shown(settings, json === true, (o) => resume(stopped, { ...o, device, signal })), json);
  }
  if (out === undefined) throw new UniFlowError('BAD_INPUT', 'the option --out is missing: the folder of the run', { subject: 'out' });
  const settings = parseTrainConfig({ ...(config === undefined ? {} : await readSettings(config)), ...given });
  report(await shown(settings, json === true, (o) => train(out, settings, { ...o, device, signal })), json);
}

/** Runs `work` with a progress bar that shows the losses. */
async function shown(
  { steps, batch, validation }: FullTrainConfig,
  quiet: boolean,
  work: (options: TrainOptions) => Promise<TrainResult>,
): Promise<TrainResult> {
  const baseline = new Stages(quiet);
  let progress: Progress | undefined;
  const say = (text: string): void => void (!quiet && (progress ?? baseline).line(text));
  const recent = new Recent();
  if (validation === undefined) say('no --validation: nothing measures the run, or compares it with its PCA baseline');
  try {
    return await work({
      onBaselineProgress: (done, total) => baseline.update({ stage: 'baseline', done, total }),
      onBaseline: (entry) => {
        baseline.stop();
        say(`baseline: ${baselineText(entry)}`);
      },
      onDamaged: ({ id, reason }) => say(`uniflow: ${id}: ${reason}; the image is skipped`),
      onWarning: ({ message }) => say(`uniflow: ${message}`),
      onStep: (entry) => {
        progress ??= new Progress('train', { unit: 'images' }, quiet).start(steps * batch, (entry.step - 1) * batch);
        if (entry.skipped) say(`step ${entry.step}: the gradient is not finite; the step is skipped`);
        progress.update(entry.step * batch, recent.with(entry));
      },
      onSkipped: (skipped) => reportSkips(Skips.of(skipped), progress, quiet),
      onValidation: (entry) => say(`step ${entry.step}: validation ${validationText(entry)}`),
    });
  } finally {
    baseline.stop();
    progress?.stop();
  }
}

/** Moving average of the losses over about twenty steps. */
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
  const { model, report: page, steps, validation, baseline, damaged, done } = result;
  const beside = baseline ? `; baseline ${baseline.psnr.toFixed(2)} dB` : '';
  const quality = validation ? ` (PSNR ${validation.psnr.toFixed(2)} dB, SSIM ${validation.ssim.toFixed(4)}${beside})` : '';
  const skipped = damaged > 0 ? `; ${plural(damaged, 'damaged image')} skipped` : '';
  process.stdout.write(`${done ? `${steps} steps done` : `stopped after ${steps} steps`}: ${model}${quality}${skipped}; see ${page}\n`);
}
