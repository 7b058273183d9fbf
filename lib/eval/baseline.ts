/**
 * The baseline of a tokenizer: a PCA of patches with one coefficient per latent channel, the best linear codec of that size. A tokenizer below it has learnt
 * less than one matrix product can do.
 */
import type { NdArray } from 'ndarray';
import { subset, type Dataset } from '../sources/dataset.js';
import { evenlySpaced } from '../sources/evenly-spaced.js';
import { batches, type Damaged } from '../train/loader.js';
import { defaultBatchSize } from '../gather.js';
import { native, type QualityConvention } from '../native.js';
import { imageQuality, linear, toUint8, unfold, type Linear } from '../ops.js';
import { gridOf, onDevice, tensorOf, tidy } from '../tensor.js';
import type { UniFlow } from '../uniflow.js';
import { imagesOf } from './features.js';
import { patchStatistics, principalComponents, type PrincipalComponents } from './pca.js';
import { projection } from './projection.js';

/** Upper bound of the number of images for fitting, evenly spaced. More patches hardly move the components. */
export const FIT_IMAGES = 512;

/** Pixels from 0 to 1, with all channels weighted equally, so least squares optimises PSNR. */
const normalisation = { mean: Float32Array.of(0, 0, 0), std: Float32Array.of(1, 1, 1) };

/** Quality of the baseline: means over the images, in dB and in [-1, 1]. */
export interface Baseline {
  psnr: number;
  ssim: number;
  /** Coefficients per patch. */
  channels: number;
}

export interface FitOptions {
  /** Height and width of the images' centre crops. */
  size: number | readonly [height: number, width: number];
  signal?: AbortSignal | undefined;
  onProgress?: ((done: number, total: number) => void) | undefined;
  /** As in the loader: if given, images that cannot be read are skipped. */
  onDamaged?: ((damaged: Damaged) => void) | undefined;
}

/** The baseline of `uniflow`, fitted to `data`; undefined if latents have as many values as pixels, because a PCA then loses nothing. */
export async function fitBaseline(uniflow: UniFlow, data: Dataset, options: FitOptions): Promise<PatchCodec | undefined> {
  const { patch, latentChannels } = uniflow.config;
  if (latentChannels >= 3 * patch ** 2) return undefined;
  const { device } = uniflow;
  let images = 0;
  const onProgress = (done: number, total: number): void => {
    images = done;
    options.onProgress?.(done, total);
  };
  const statistics = await patchStatistics(crops(data, patch, { ...options, onProgress }), { patch, normalisation, device });
  return new PatchCodec(uniflow, principalComponents(statistics, latentChannels), images);
}

async function* crops(
  data: Dataset,
  patch: number,
  { size, signal, onProgress, onDamaged }: FitOptions & Required<Pick<FitOptions, 'onProgress'>>,
): AsyncGenerator<NdArray<Uint8Array>> {
  const [height, width] = typeof size === 'number' ? [size, size] : size;
  const indices = evenlySpaced(data.length, FIT_IMAGES);
  const { rows, cols } = gridOf([height, width], patch);
  const batchSize = defaultBatchSize(rows * cols, 'cpu');
  let done = 0;
  for await (const { pixels, ids } of batches(subset(data, indices), {
    ...{ batchSize, size, crop: 'center', epochs: 1, signal },
    onDamaged: onDamaged && ((damaged) => onDamaged({ ...damaged, index: indices[damaged.index] as number })),
  })) {
    yield pixels;
    done += ids.length;
    onProgress?.(done, indices.length);
  }
}

/** Encodes images as the leading principal components of their patches. */
export class PatchCodec {
  private readonly layer: Linear;
  readonly channels: number;

  constructor(
    private readonly uniflow: Pick<UniFlow, 'config' | 'device'>,
    components: PrincipalComponents,
    /** Number of images it was fitted to. */
    readonly images: number,
  ) {
    this.channels = components.variances.length;
    this.layer = onDevice(uniflow.device, () => projection(components, this.channels));
  }

  /** PSNR and SSIM of each image of uint8 [B,H,W,3], or of those in [begin, end), after coding, rounding and clamping: float32 [B,2]. */
  async quality(
    pixels: NdArray<Uint8Array>,
    { convention, begin, end }: { convention?: QualityConvention | undefined; begin?: number; end?: number } = {},
  ): Promise<NdArray<Float32Array>> {
    const { config, device } = this.uniflow;
    const [, height, width] = pixels.shape as [number, number, number];
    const { patch } = config;
    const grid = gridOf([height, width], patch);
    const quality = onDevice(device, () =>
      tidy(() => {
        const images = toUint8(imagesOf(pixels, begin, end), grid, patch, normalisation);
        const patches = linear(unfold(images, patch, normalisation, 'float32'), this.layer);
        const coded = native.fold(patches.handle, grid.rows, grid.cols, patch, normalisation, 'uint8');
        return imageQuality(images, tensorOf(coded), convention);
      }),
    );
    try {
      return (await quality.read()) as NdArray<Float32Array>;
    } finally {
      quality.dispose();
    }
  }

  /** Means over images, computed a few at a time. */
  async measure(pixels: NdArray<Uint8Array>): Promise<Pick<Baseline, 'psnr' | 'ssim'>> {
    const [count, height, width] = pixels.shape as [number, number, number];
    const batchSize = defaultBatchSize((height * width) / this.uniflow.config.patch ** 2, this.uniflow.device);
    const sums = [0, 0];
    for (let begin = 0; begin < count; begin += batchSize) {
      const quality = await this.quality(pixels, { begin, end: Math.min(count, begin + batchSize) });
      for (let i = 0; i < (quality.shape[0] as number); i++) sums.forEach((sum, c) => (sums[c] = sum + quality.get(i, c)));
    }
    const [psnr, ssim] = sums.map((sum) => sum / count) as [number, number];
    return { psnr, ssim };
  }

  dispose(): void {
    this.layer.weight.dispose();
    this.layer.bias?.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}
