/** Training: `train()` makes a run in a folder, `Trainer` takes single steps. See docs/training.md. */
export { batches, type Batch, type LoaderOptions } from './loader.js';
export type { TrainConfig } from './config.js';
export { AdamW, type AdamWOptions, type ParameterGroup } from './optimizer.js';
export type { TrainOptions, TrainResult } from './options.js';
export { regimes, type Regime } from './regimes.js';
export type { TimeSampling } from './schedule.js';
export { resume, train } from './train.js';
export { Trainer, type OptimizerOptions, type StepResult, type TrainerOptions, type TrainingBatch } from './trainer.js';
export { openDataset, subset, type Dataset, type Sample } from '../sources/dataset.js';
