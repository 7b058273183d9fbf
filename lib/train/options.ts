/** What a training run is told besides its settings, and what it returns. */
import type { DeviceOptions } from '../device.js';
import type { Skipped } from '../sources/item.js';
import type { LogEntryOf } from './log.js';

export interface TrainOptions {
  /** Where it is trained. Default 'auto'. A run that goes on elsewhere does not come to the same bits. */
  device?: DeviceOptions['device'];
  /** Stops the run after the step under way, with a checkpoint. */
  signal?: AbortSignal | undefined;
  /** After every step, with the number of steps done so far. */
  onStep?: ((step: LogEntryOf<'step'>) => void) | undefined;
  onValidation?: ((validation: LogEntryOf<'validation'>) => void) | undefined;
  /** Once, before the first step, where there are validation images. */
  onBaseline?: ((baseline: LogEntryOf<'baseline'>) => void) | undefined;
  /** While the baseline is fitted: images done. */
  onBaselineProgress?: ((done: number, total: number) => void) | undefined;
  /** For each image that is passed over, once. */
  onDamaged?: ((damaged: LogEntryOf<'damaged'>) => void) | undefined;
  onWarning?: ((warning: LogEntryOf<'warning'>) => void) | undefined;
  /** Told once of the files that the data set's source passed over, where there are some. */
  onSkipped?: ((skipped: readonly Skipped[]) => void) | undefined;
}

export interface TrainResult {
  /** Folder of the tokenizer. */
  model: string;
  report: string;
  steps: number;
  /** The last validation. */
  validation: LogEntryOf<'validation'> | undefined;
  /** What a PCA of the tokenizer's size reaches on the same images. */
  baseline: LogEntryOf<'baseline'> | undefined;
  /** Images that were passed over. */
  damaged: number;
  /** Whether all steps were done; otherwise a signal came. */
  done: boolean;
}
