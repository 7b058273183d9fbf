/** Options and results of an evaluation. */
import type { Dataset } from '../sources/dataset.js';
import type { Schedule } from '../decoder/schedule.js';
import type { VisionEncoder } from '../encoder/vision-encoder.js';
import type { ModelType } from '../device.js';
import type { QualityConvention } from '../native.js';
import type { UniFlow } from '../uniflow.js';
import type { Baseline } from './baseline.js';
import type { CodeUse } from './code-use.js';
import type { FeatureSet } from './feature-set.js';
import type { FeatureExtractor } from './features.js';
import type { DataPin, FeaturePins, SamplingPin, WeightsPin } from './pins.js';

export interface EvaluateOptions {
  data: Dataset;
  /** Labelled images that train the probe and serve as neighbours; `data` then needs labels as well. */
  train?: Dataset | undefined;
  /** Images for fitting the baseline, at most {@link FIT_IMAGES} of them. Default: those of `train`, else those of `data`. */
  baseline?: Dataset | undefined;
  /** Variant of SSIM; use 'paper' to compare with values published for UniFlow. Default 'standard'. */
  convention?: QualityConvention | undefined;
  /** The model that the encoder was fine-tuned from: adds each layer's cosine to it, and its own probe and neighbours. */
  teacher?: VisionEncoder | UniFlow | undefined;
  /** For the Fréchet distance: computes features of originals and reconstructions; or existing features of the reconstructions. */
  features?: FeatureExtractor | FeatureSet | undefined;
  /** Features to compare with instead of those of the originals. */
  reference?: FeatureSet | undefined;
  /** Feature vector of a latent: the mean over its patches (default), or all of them concatenated. */
  latentPool?: 'mean' | 'concat' | undefined;
  /** Height and width of the centre crop. Default: the model's. */
  size?: number | readonly [height: number, width: number] | undefined;
  /** Euler steps. Default: the model's. */
  steps?: number | undefined;
  /** Default 'linear'. */
  schedule?: Schedule | undefined;
  /** Default 1. */
  guidance?: number | undefined;
  /** Seed of the decoder's noise and of the probe. Default 0. */
  seed?: number | undefined;
  batchSize?: number | undefined;
  /** Origins of the models and data, if known. Default: in memory, with weights pinned by a hash of the parameters. */
  origin?: { model?: WeightsPin; teacher?: WeightsPin; data?: DataOrigin; train?: DataOrigin; baseline?: DataOrigin };
  onProgress?: ((progress: { stage: string; done: number; total: number }) => void) | undefined;
  signal?: AbortSignal | undefined;
}

export type DataOrigin = Pick<DataPin, 'path' | 'split'>;

/** One side of a Fréchet distance. */
export interface ComparedSet {
  images: number;
  /** Undefined for an unpinned file. */
  pins: FeaturePins | undefined;
  file?: { path: string; sha256: string };
}

export interface Evaluation {
  images: number;
  /** Means over the images, in dB and in [-1, 1]. */
  psnr: number;
  ssim: number;
  /** Use of the latents: see lib/eval/latent-use.ts. */
  effectiveRank: number;
  channelsInUse: number;
  /** Use of the codes, if the model has them: see lib/eval/code-use.ts. */
  codes?: CodeUse;
  /** Quality of a PCA on the same images; missing if latents have as many values as pixels. */
  baseline?: Baseline & { fitted: DataPin };
  /** 'rFID' if the features come from an Inception file. */
  fid?: { name: 'rFID' | 'FID'; value: number; dimensions: number; reference: ComparedSet; reconstructions: ComparedSet };
  /** Accuracies in [0, 1] on the tokens, the latents and the teacher's tokens. */
  understanding?: Record<string, { dimensions: number; probe: number; knn: number }>;
  /** Mean cosine to the teacher's patch tokens after layers 1 to L. */
  layers?: number[];
  pins: EvaluationPins;
  /** The features behind the Fréchet distance. Not for printing. */
  featureSets?: { reference: FeatureSet; reconstructions: FeatureSet };
}

export interface EvaluationPins {
  version: string;
  model: WeightsPin;
  dtype: ModelType;
  teacher?: WeightsPin;
  data: DataPin;
  train?: DataPin;
  crop: 'center';
  size: [height: number, width: number];
  sampling: SamplingPin;
  convention: QualityConvention;
  latentPool?: 'mean' | 'concat';
  probe?: Record<string, number | string>;
  knn?: Record<string, number>;
}
