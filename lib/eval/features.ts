/** Feature vectors of images: by any encoder, one vector per image. */
import ndarray, { type NdArray } from 'ndarray';
import { flat, meanOfTokens } from '../encoder/pooling.js';
import type { VisionEncoder } from '../encoder/vision-encoder.js';
import { UniFlowError } from '../errors.js';
import { checkBatchSize } from '../gather.js';
import { native, type ResampleFilter } from '../native.js';
import { sliceTokens, toUint8 } from '../ops.js';
import { gridOf, onDevice, Tensor, tidy, type Grid } from '../tensor.js';
import type { UniFlow } from '../uniflow.js';
import { parametersPin, type ExtractorPin, type WeightsPin } from './pins.js';

/** Computes features of images. */
export interface FeatureExtractor {
  readonly pin: ExtractorPin;
  /** uint8 [B,H,W,3] → float32 [B,D]. */
  extract(pixels: NdArray<Uint8Array>, signal?: AbortSignal): Promise<NdArray<Float32Array>>;
  dispose(): Promise<void>;
}

export interface EncoderFeatureOptions {
  /** Mean of the patch tokens, or the class token. Default 'mean'. */
  pool?: 'mean' | 'class';
  /** Pin of the encoder. Default: a hash of its parameters. */
  weights?: WeightsPin;
}

/**
 * Features from an encoder's last hidden state, after its final norm. Images are stretched to the encoder's training size with its filter, and normalised
 * with its statistics.
 */
export async function encoderFeatures(
  model: VisionEncoder | UniFlow,
  { pool = 'mean', weights }: EncoderFeatureOptions = {},
): Promise<FeatureExtractor> {
  const { encoder } = model;
  if (pool === 'class' && encoder.prefix === 0)
    throw UniFlowError.expected('UNSUPPORTED', 'pool', "'mean', as the encoder has no class token", "'class'");
  const { size, filter } = model.preprocessing;
  const { rows, cols } = gridOf(size, encoder.config.patch);
  const { name, sha256 } = weights ?? (await parametersPin(model.parameters));
  return {
    pin: { kind: 'encoder', name, sha256, pool, size: [...size], dtype: model.precision },
    extract: async (pixels, signal) => {
      const resized = await stretched(pixels, size, filter);
      const [features] = await encoder.running({
        device: model.device,
        count: resized.shape[0] as number,
        batchSize: checkBatchSize(undefined, rows * cols, model.device),
        signal,
        load: (begin, end) => [onDevice(model.device, () => imagesOf(resized, begin, end))],
        forward: ([batch]) => {
          const { last } = encoder.forward(batch as Tensor);
          return [pool === 'class' ? flat(sliceTokens(last, 0, 1)) : meanOfTokens(sliceTokens(last, encoder.prefix, last.dim(1)))];
        },
      });
      return features as NdArray<Float32Array>;
    },
    dispose: () => model.dispose(),
  };
}

/** Uploads images [begin, end) of [B,H,W,3]. */
export function imagesOf({ data, shape }: NdArray<Uint8Array>, begin = 0, end = shape[0] as number): Tensor {
  const [, height, width] = shape as [number, number, number];
  const bytes = height * width * 3;
  return Tensor.from({ data: data.subarray(begin * bytes, end * bytes), shape: [end - begin, height, width, 3] });
}

/** The part of images [B,H,W,3] that is covered by whole patches, which is the part that is decoded. */
export async function covered(uniflow: UniFlow, pixels: NdArray<Uint8Array>, grid: Grid): Promise<NdArray<Uint8Array>> {
  const { config, device, normalisation } = uniflow;
  if (pixels.shape[1] === grid.rows * config.patch && pixels.shape[2] === grid.cols * config.patch) return pixels;
  const cut = onDevice(device, () => tidy(() => toUint8(imagesOf(pixels), grid, config.patch, normalisation)));
  return (cut.read() as Promise<NdArray<Uint8Array>>).finally(() => cut.dispose());
}

/** Stretches uint8 [B,H,W,3] to another height and width. */
export async function stretched(
  pixels: NdArray<Uint8Array>,
  [height, width]: readonly [number, number],
  filter: ResampleFilter,
): Promise<NdArray<Uint8Array>> {
  const [images, rows, columns] = pixels.shape as [number, number, number];
  if (rows === height && columns === width) return pixels;
  const [before, after] = [rows * columns * 3, height * width * 3];
  const out = new Uint8Array(images * after);
  await Promise.all(
    Array.from({ length: images }, (_, i) =>
      native.resample(pixels.data.subarray(i * before, (i + 1) * before), columns, rows, out.subarray(i * after, (i + 1) * after), {
        ...{ width, height, filter },
        ...{ mode: 'stretch', edge: 0 },
      }),
    ),
  );
  return ndarray(out, [images, height, width, 3]);
}

/** Collects rows of arrays [N,D] by name. */
export class FeatureTable {
  private readonly arrays = new Map<string, { data: Float32Array; width: number; end: number }>();

  constructor(private readonly count: number) {}

  add(name: string, rows: NdArray): void {
    const width = rows.shape[1] as number;
    const array = this.arrays.get(name) ?? { data: new Float32Array(this.count * width), width, end: 0 };
    this.arrays.set(name, array);
    array.data.set(rows.data as unknown as Float32Array, array.end);
    array.end += rows.size;
  }

  get(name: string): NdArray<Float32Array> | undefined {
    const array = this.arrays.get(name);
    return array && ndarray(array.data, [this.count, array.width]);
  }

  get names(): string[] {
    return [...this.arrays.keys()];
  }
}
