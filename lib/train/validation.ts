/** The validation of a run, and the baseline it has to beat. */
import ndarray, { type NdArray } from 'ndarray';
import { openDataset, type Dataset } from '../sources/dataset.js';
import { batches, type Damaged } from './loader.js';
import { UniFlowError } from '../errors.js';
import { fitBaseline, type FitOptions } from '../eval/baseline.js';
import { LatentMeter } from '../eval/latent-use.js';
import type { UniFlow } from '../uniflow.js';
import type { FullTrainConfig } from './config.js';
import type { LogEntry, LogEntryOf, RunLog } from './log.js';
import type { TrainOptions } from './options.js';

/** A run that is below its baseline after this fraction of its steps gets a warning. */
export const BASELINE_DUE = 0.5;

interface Session {
  /** The log of a resumed run. */
  past: readonly LogEntry[];
  log: RunLog;
  options: Pick<TrainOptions, 'onBaseline' | 'onBaselineProgress' | 'onValidation' | 'onWarning'>;
  onDamaged: (damaged: Damaged) => void;
}

export class Validation {
  baseline: LogEntryOf<'baseline'> | undefined;
  /** The last validation in this session. */
  last: LogEntryOf<'validation'> | undefined;
  private warned = false;
  private session: Session | undefined;

  private constructor(
    private readonly uniflow: UniFlow,
    private readonly settings: FullTrainConfig,
    /** The images, [n,H,W,3]. */
    readonly pixels: NdArray<Uint8Array>,
  ) {}

  /** Opens the first `validationImages` readable images as centre crops; undefined if the run has none. */
  static async open(uniflow: UniFlow, settings: FullTrainConfig, onDamaged: (damaged: Damaged) => void): Promise<Validation | undefined> {
    const { validation, validationImages, size = uniflow.config.imageSize } = settings;
    if (validation === undefined) return undefined;
    const data = await openDataset(validation);
    try {
      const batchSize = Math.min(validationImages, data.length);
      const found: NdArray<Uint8Array>[] = [];
      let count = 0;
      for await (const { pixels, ids } of batches(data, { batchSize, size, crop: 'center', epochs: 1, prefetch: 0, onDamaged })) {
        found.push(pixels);
        if ((count += ids.length) >= batchSize) break;
      }
      if (!found[0]) throw UniFlowError.expected('BAD_INPUT', validation, 'images', 'damaged ones only');
      return new Validation(uniflow, settings, joined(found, Math.min(count, batchSize)));
    } finally {
      await data.close();
    }
  }

  /**
   * Takes the baseline from the log of a resumed run, or fits it to the training images.
   * @param data the training images.
   */
  async begin(data: Dataset, session: Session): Promise<void> {
    const { past, log, options, onDamaged } = session;
    this.session = session;
    this.baseline = past.find((entry) => entry.event === 'baseline');
    this.warned = past.some((entry) => entry.event === 'warning');
    if (!this.baseline) {
      this.baseline = await this.fit(data, { onDamaged, onProgress: options.onBaselineProgress });
      if (this.baseline) log.write(this.baseline);
    }
    if (this.baseline) options.onBaseline?.(this.baseline);
  }

  private async fit(data: Dataset, options: Pick<FitOptions, 'onProgress' | 'onDamaged'>): Promise<LogEntryOf<'baseline'> | undefined> {
    const [, height, width] = this.pixels.shape as [number, number, number];
    using codec = await fitBaseline(this.uniflow, data, { size: [height, width], ...options });
    if (!codec) return undefined;
    const { psnr, ssim } = await codec.measure(this.pixels);
    return { event: 'baseline', psnr, ssim, channels: codec.channels, fitted: { path: this.settings.data, images: codec.images } };
  }

  /** Measures the current model, reports it, and warns once if the run is below its baseline. */
  async run(step: number): Promise<void> {
    const { log, options } = this.session as Session;
    const { psnr, ssim, latents, grid } = await this.uniflow.reconstruct({ pixels: this.pixels });
    const meter = new LatentMeter(this.uniflow, latents.shape[0] as number);
    await meter.add(this.pixels, latents);
    this.last = { event: 'validation', step, psnr, ssim, ...(await meter.measure({ grid })) };
    log.write(this.last);
    options.onValidation?.(this.last);
    const message = !this.warned && this.baseline ? belowBaseline(this.last, this.baseline, this.settings.steps) : undefined;
    if (message === undefined) return;
    this.warned = true;
    const warning = { event: 'warning', step, message } as const;
    log.write(warning);
    options.onWarning?.(warning);
  }
}

/** Warning for a run that should be above its baseline by now; undefined if it is, or still has time. */
export function belowBaseline(
  { step, psnr, effectiveRank }: LogEntryOf<'validation'>,
  baseline: LogEntryOf<'baseline'>,
  steps: number,
): string | undefined {
  if (step < BASELINE_DUE * steps || psnr >= baseline.psnr) return undefined;
  const rank = effectiveRank === undefined ? '' : `, effective rank ${effectiveRank.toFixed(1)}`;
  return (
    `PSNR ${psnr.toFixed(2)} dB after ${step} of ${steps} steps is below the baseline, ${baseline.psnr.toFixed(2)} dB by a PCA of ` +
    `${baseline.channels} coefficients (the latents: ${baseline.channels} channels${rank}). Change where it starts, its learning rate or its ` +
    `times ("Below the baseline" in docs/training.md), or train for longer.`
  );
}

function joined(parts: readonly NdArray<Uint8Array>[], count: number): NdArray<Uint8Array> {
  const [, ...shape] = (parts[0] as NdArray).shape;
  const bytes = shape.reduce((a, b) => a * b, 1);
  const data = new Uint8Array(parts.reduce((sum, part) => sum + part.size, 0));
  parts.reduce((end, part) => (data.set(part.data, end), end + part.size), 0);
  return ndarray(data.subarray(0, count * bytes), [count, ...shape]);
}
