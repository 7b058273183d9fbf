/** Options and result of a training run, besides its settings. */
import type { DeviceOptions } from '../device.js';
import type { Skipped } from '../sources/item.js';
import type { LogEntryOf } from './log.js';

export interface TrainOptions {
  /** Device to train on. Default 'auto'. A run resumed on another device does not give the same bits. */
  device?: DeviceOptions['device'];
  /** Stops the run after the current step, with a checkpoint. */
  signal?: AbortSignal | undefined;
  /** Called after every step, with the number of steps done so far. */
  onStep?: ((step: LogEntryOf<'step'>) => void) | undefined;
  onValidation?: ((validation: LogEntryOf<'validation'>) => void) | undefined;
  /** Called once, before the first step, if there are validation images. */
  onBaseline?: ((baseline: LogEntryOf<'baseline'>) => void) | undefined;
  /** Called with the number of images done while the baseline is fitted. */
  onBaselineProgress?: ((done: number, total: number) => void) | undefined;
  /** Called once for each skipped image. */
  onDamaged?: ((damaged: LogEntryOf<'damaged'>) => void) | undefined;
  onWarning?: ((warning: LogEntryOf<'warning'>) => void) | undefined;
  /** Called once with the files that the data set's source skipped, if any. */
  onSkipped?: ((skipped: readonly Skipped[]) => void) | undefined;
}

export interface TrainResult {
  /** Folder of the tokenizer. */
  model: string;
  report: string;
  steps: number;
  /** The last validation. */
  validation: LogEntryOf<'validation'> | undefined;
  /** Quality of a PCA of the tokenizer's size on the same images. */
  baseline: LogEntryOf<'baseline'> | undefined;
  /** Number of images skipped. */
  damaged: number;
  /** Whether all steps were done; false if a signal stopped the run. */
  done: boolean;
}
