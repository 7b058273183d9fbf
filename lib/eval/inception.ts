/**
 * Features of an Inception-v3 that the user provides as an ONNX file, for FID as reported in the literature (rFID between images and their reconstructions).
 * The library cannot verify which network the file contains, so the result names it by its hash.
 *
 * Expects the interface of pytorch-fid's exported InceptionV3: input float32 [B,3,299,299] in [0, 1], first output the pooled features [B,2048,1,1] or
 * [B,2048]. Images are resized to 299 x 299 bilinearly (with antialiasing when shrinking), to 8 bits.
 */
import ndarray, { type NdArray } from 'ndarray';
import { createRequire } from 'node:module';
import { basename, dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { UniFlowError } from '../errors.js';
import { unfold } from '../ops.js';
import { tidy } from '../tensor.js';
import { imagesOf, stretched, type FeatureExtractor } from './features.js';
import { fileHash, type ExtractorPin } from './pins.js';

/** The part of onnxruntime-node used here. */
interface OnnxRuntime {
  Tensor: new (type: 'float32', data: Float32Array, shape: readonly number[]) => unknown;
  InferenceSession: { create(path: string): Promise<Session> };
}
interface Session {
  inputNames: readonly string[];
  outputNames: readonly string[];
  run(feeds: Record<string, unknown>): Promise<Record<string, { data: Float32Array; dims: readonly number[] }>>;
  release(): Promise<void>;
}

const SIZE = 299;
/** Scales pixels to [0, 1] without further normalisation. */
const UNIT = { mean: new Float32Array(3), std: new Float32Array(3).fill(1) };

/** @throws UniFlowError `UNSUPPORTED` without onnxruntime-node, `BAD_INPUT` if the file is not such a network. */
export async function inceptionFeatures(path: string): Promise<FeatureExtractor> {
  const runtime = loadRuntime();
  const pin: ExtractorPin = {
    ...{ kind: 'inception', name: basename(path), sha256: await fileHash(path) },
    ...{ pool: 'output', size: [SIZE, SIZE], dtype: 'float32' },
  };
  const session = await attempt(path, () => runtime.InferenceSession.create(path));
  return {
    pin,
    extract: async (pixels) => {
      const input = await planes(await stretched(pixels, [SIZE, SIZE], 'bilinear'));
      const feeds = { [session.inputNames[0] as string]: new runtime.Tensor('float32', input.data, input.shape) };
      const output = (await attempt(path, () => session.run(feeds)))[session.outputNames[0] as string];
      const [images = 0, width = 0] = output?.dims ?? [];
      if (!output || images !== input.shape[0] || output.data.length !== images * width)
        throw UniFlowError.expected('BAD_INPUT', path, 'pooled features [B, D] as first output', `[${output?.dims.join(', ')}]`);
      return ndarray(output.data, [images, width]);
    },
    dispose: () => session.release(),
  };
}

/** uint8 [B,H,W,3] → float32 [B,3,H,W] in [0, 1], as a single patch the size of the image. */
async function planes(pixels: NdArray<Uint8Array>): Promise<NdArray<Float32Array>> {
  const patches = tidy(() => unfold(imagesOf(pixels), SIZE, UNIT, 'float32')); // [B,1,3*H*W]
  try {
    return ndarray((await patches.read()).data as Float32Array, [pixels.shape[0] as number, 3, SIZE, SIZE]);
  } finally {
    patches.dispose();
  }
}

/** Looks next to this library, then in the working directory. */
function loadRuntime(): OnnxRuntime {
  try {
    const require = createRequire(import.meta.url);
    const found = require.resolve('onnxruntime-node', { paths: [dirname(fileURLToPath(import.meta.url)), process.cwd()] });
    return require(found) as OnnxRuntime;
  } catch (cause) {
    const message = 'an Inception-v3 file is run by onnxruntime-node, which is not installed: npm install onnxruntime-node';
    throw new UniFlowError('UNSUPPORTED', message, { subject: 'onnxruntime-node', cause });
  }
}

async function attempt<T>(path: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (cause) {
    throw new UniFlowError('BAD_INPUT', `${path}: ONNX Runtime cannot run it: ${(cause as Error).message}`, { subject: path, cause });
  }
}
