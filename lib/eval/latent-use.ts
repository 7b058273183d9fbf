/**
 * The share of a tokenizer's latents that carries information. With λ the eigenvalues of the latents' covariance over all patches, in descending order, and
 * V_k its first k eigenvectors:
 *
 * - effective rank = exp(−Σ p_i ln p_i), p_i = λ_i / Σ λ: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality",
 *   of the covariance matrix, whose singular values are its eigenvalues. Ranges from 1, if all latents are on a line, to Z.
 * - channels in use = k* / Z, where k* is the least k with PSNR(k) ≥ PSNR(Z) − 0.1 dB. PSNR(k) is the mean over images decoded from
 *   m + V_k V_kᵀ (z − m): a tokenizer of k* channels would do as well. It counts principal directions instead of channels, because any
 *   rotation of the channels gives the same tokenizer.
 */
import ndarray, { type NdArray } from 'ndarray';
import { evenlySpaced } from '../sources/evenly-spaced.js';
import type { DecodeOptions } from '../decoder/options.js';
import type { CodesConfig } from '../codes.js';
import { imageQuality, latentsToCodes, linear } from '../ops.js';
import { onDevice, Tensor, tidy } from '../tensor.js';
import type { UniFlow } from '../uniflow.js';
import { CodeMeter, type CodeUse } from './code-use.js';
import { imagesOf } from './features.js';
import { Moments, principalComponents, type PrincipalComponents } from './pca.js';
import { projection } from './projection.js';

export interface LatentUse {
  /** In [1, Z]; 0 if all latents are equal. */
  effectiveRank: number;
  /** In [0, 1]. */
  channelsInUse: number;
  /** If the model has codes. */
  codes?: CodeUse;
}

/** PSNR tolerance of the latents in use, in dB. */
const TOLERANCE = 0.1;
/** Number of images that are decoded, a few times each, to find the latents in use. */
const SAMPLE = 8;

/** exp of the entropy of the variances' shares. */
export function effectiveRank(variances: Float64Array): number {
  const total = variances.reduce((sum, v) => sum + v, 0);
  if (total <= 0) return 0;
  return Math.exp(variances.reduce((sum, v) => (v > 0 ? sum - (v / total) * Math.log(v / total) : sum), 0));
}

/** Collects images with their latents, then measures. */
export class LatentMeter {
  private readonly moments = new Moments();
  private readonly sampled: Set<number>;
  private readonly sample: { pixels: Uint8Array; z: Float32Array }[] = [];
  private shapes: { pixels: number[]; z: number[] } | undefined;
  private seen = 0;
  private readonly codes: CodeMeter | undefined;

  /** @param count number of images to come. */
  constructor(
    private readonly uniflow: Pick<UniFlow, 'device' | 'decode'> & { config?: CodesConfig & { patch: number } },
    count: number,
  ) {
    this.codes = uniflow.config?.codes && new CodeMeter(uniflow.config);
    this.sampled = new Set(evenlySpaced(count, SAMPLE));
  }

  /** Adds uint8 [B,H,W,3] and their latents, float32 [B,N,Z]. Sums are computed per image, so the numbers do not depend on the batch. */
  async add(pixels: NdArray<Uint8Array>, z: NdArray): Promise<void> {
    const [count, ...image] = pixels.shape as [number, ...number[]];
    const [, patches, channels] = z.shape as [number, number, number];
    this.shapes ??= { pixels: image, z: [patches, channels] };
    const part = <A extends Uint8Array | Float32Array>(array: A, b: number): A =>
      array.subarray((b * array.length) / count, ((b + 1) * array.length) / count) as A;
    for (let b = 0; b < count; b++, this.seen++) {
      const own = part(z.data as unknown as Float32Array, b);
      using rows = onDevice(this.uniflow.device, () => Tensor.from({ data: own, shape: [patches, channels] }));
      await this.moments.add(rows);
      await this.codes?.add(await this.codesOf(rows));
      if (this.sampled.has(this.seen)) this.sample.push({ pixels: part(pixels.data, b).slice(), z: own.slice() });
    }
  }

  /** Latents [N,Z] → codes [N,G]. */
  private async codesOf(latents: Tensor): Promise<Int32Array> {
    using codes = onDevice(this.uniflow.device, () => tidy(() => latentsToCodes(latents, this.uniflow.config?.codes ?? [])));
    return (await codes.read()).data as Int32Array;
  }

  async measure(options: DecodeOptions): Promise<LatentUse> {
    const components = principalComponents(this.moments.statistics());
    const { variances } = components;
    return {
      effectiveRank: effectiveRank(variances),
      channelsInUse: (await this.leastWithin(components, options)) / variances.length,
      ...(this.codes ? { codes: this.codes.measure() } : {}),
    };
  }

  /** Finds k* by bisection. */
  private async leastWithin(components: PrincipalComponents, options: DecodeOptions): Promise<number> {
    const z = stacked(this.sample.map((s) => s.z), this.shapes!.z); // prettier-ignore
    const pixels = stacked(this.sample.map((s) => s.pixels), this.shapes!.pixels) as NdArray<Uint8Array>; // prettier-ignore
    const psnr = async (latents: NdArray): Promise<number> => this.meanPsnr(pixels, latents, options);
    const enough = (await psnr(z)) - TOLERANCE;
    let [low, high] = [0, components.variances.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((await psnr(await this.kept(z, components, middle))) >= enough) high = middle;
      else low = middle + 1;
    }
    return high;
  }

  /** Projects latents onto their first `count` principal directions. */
  private async kept(z: NdArray, components: PrincipalComponents, count: number): Promise<NdArray> {
    using latents = onDevice(this.uniflow.device, () => tidy(() => linear(Tensor.from(z), projection(components, count))));
    return await latents.read();
  }

  private async meanPsnr(pixels: NdArray<Uint8Array>, z: NdArray, options: DecodeOptions): Promise<number> {
    const images = (await this.uniflow.decode(z, options)) as NdArray<Uint8Array>;
    using quality = onDevice(this.uniflow.device, () => tidy(() => imageQuality(imagesOf(pixels), imagesOf(images))));
    const read = await quality.read();
    const count = pixels.shape[0] as number;
    return Array.from({ length: count }, (_, i) => read.get(i, 0)).reduce((sum, value) => sum + value, 0) / count;
  }
}

/** Stacks arrays of one shape. */
function stacked<A extends Uint8Array | Float32Array>(arrays: readonly A[], shape: readonly number[]): NdArray {
  const size = (arrays[0] as A).length;
  const data = new ((arrays[0] as A).constructor as new (n: number) => A)(arrays.length * size);
  arrays.forEach((array, i) => data.set(array, i * size));
  return ndarray(data, [arrays.length, ...shape]);
}
