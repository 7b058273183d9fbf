/** What an evaluation is asked for, and what it answers. */
import type { Dataset } from '../sources/dataset.js';
import type { Schedule } from '../decoder/schedule.js';
import type { VisionEncoder } from '../encoder/vision-encoder.js';
import type { FloatType, QualityConvention } from '../native.js';
import type { UniFlow } from '../uniflow.js';
import type { Baseline } from './baseline.js';
import type { FeatureSet } from './feature-set.js';
import type { FeatureExtractor } from './features.js';
import type { DataPin, FeaturePins, SamplingPin, WeightsPin } from './pins.js';

export interface EvaluateOptions {
  data: Dataset;
  /** Labelled pictures that the probe learns from and that are neighbours; `data` needs labels then, too. */
  train?: Dataset | undefined;
  /** Images that the baseline is fitted to, of which at most {@link FIT_IMAGES} are taken. Default: those of `train`, else those of `data`. */
  baseline?: Dataset | undefined;
  /** How SSIM is computed; 'paper' to compare with values published for UniFlow. Default 'standard'. */
  convention?: QualityConvention | undefined;
  /** What the encoder was fine-tuned from: for each layer's cosine to it, and its own probe and neighbours. */
  teacher?: VisionEncoder | UniFlow | undefined;
  /** For the Fréchet distance: what makes features of originals and reconstructions; or features of the reconstructions made elsewhere. */
  features?: FeatureExtractor | FeatureSet | undefined;
  /** Features to compare with, instead of those of the originals. */
  reference?: FeatureSet | undefined;
  /** A latent's feature vector: mean over its patches (default), or all of them behind each other. */
  latentPool?: 'mean' | 'concat' | undefined;
  /** Height and width of the centre crop. Default: the model's. */
  size?: number | readonly [height: number, width: number] | undefined;
  /** Euler steps. Default: the model's. */
  steps?: number | undefined;
  /** Default 'linear'. */
  schedule?: Schedule | undefined;
  /** Default 1. */
  guidance?: number | undefined;
  /** Of the pictures' noise and of the probe. Default 0. */
  seed?: number | undefined;
  batchSize?: number | undefined;
  /** Where things come from, as far as the caller knows. Default: in memory, weights pinned by a hash of the parameters. */
  origin?: { model?: WeightsPin; teacher?: WeightsPin; data?: DataOrigin; train?: DataOrigin; baseline?: DataOrigin };
  onProgress?: ((progress: { stage: string; done: number; total: number }) => void) | undefined;
  signal?: AbortSignal | undefined;
}

export type DataOrigin = Pick<DataPin, 'path' | 'split'>;

/** One side of a Fréchet distance. */
export interface ComparedSet {
  images: number;
  /** Undefined: an unpinned file. */
  pins: FeaturePins | undefined;
  file?: { path: string; sha256: string };
}

export interface Evaluation {
  images: number;
  /** Means over the pictures, in dB and in [-1, 1]. */
  psnr: number;
  ssim: number;
  /** How much of the latents carries something: see lib/eval/latent-use.ts. */
  effectiveRank: number;
  channelsInUse: number;
  /** What a PCA reaches on the same images; none where latents have as many values as pixels. */
  baseline?: Baseline & { fitted: DataPin };
  /** 'rFID' where an Inception file made the features. */
  fid?: { name: 'rFID' | 'FID'; value: number; dimensions: number; reference: ComparedSet; reconstructions: ComparedSet };
  /** Accuracies in [0, 1], of the tokens, the latents and the teacher's tokens. */
  understanding?: Record<string, { dimensions: number; probe: number; knn: number }>;
  /** Mean cosine to the teacher's patch tokens after layers 1 to L. */
  layers?: number[];
  pins: EvaluationPins;
  /** What the Fréchet distance was made from. Not for printing. */
  featureSets?: { reference: FeatureSet; reconstructions: FeatureSet };
}

export interface EvaluationPins {
  version: string;
  model: WeightsPin;
  dtype: FloatType;
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
