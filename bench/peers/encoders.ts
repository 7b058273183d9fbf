/** Whole encoders: DINOv2 at 224 x 224 with random weights, from pixels in ONNX Runtime and from JPEG files in transformers.js. */
import ndarray from 'ndarray';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { VisionEncoder } from '../../lib/encoder/vision-encoder.js';
import { safetensorsHeader } from '../../lib/io/files.js';
import { IMAGENET } from '../../lib/io/preprocess.js';
import { time } from '../harness.js';
import { onBench, type Inputs } from '../inputs.js';
import { readPhotos } from '../photos.js';
import type { Comparison, Measured } from './compare.js';
import { dinoV2Graph, forms, type Weights } from './dinov2.js';
import { onnxModel, type FloatArray } from './onnx.js';
import { relativeL2, sessionOptions, timeGraphs, type OnnxRuntime } from './onnxruntime.js';

const SIDE = 224;
const SIZES = { small: { hidden_size: 384, num_attention_heads: 6 }, base: { hidden_size: 768, num_attention_heads: 12 } };
type Size = keyof typeof SIZES;
const configOf = (size: Size): Record<string, unknown> => ({
  ...{ model_type: 'dinov2', num_hidden_layers: 12, patch_size: 14, image_size: SIDE },
  ...SIZES[size],
});

interface Model {
  encoder: VisionEncoder;
  weights: Weights;
  /** Folder of its checkpoint. */
  folder: string;
}

/** A checkpoint with random weights, loaded into this library. */
async function model(make: Inputs, size: Size): Promise<Model> {
  const folder = await mkdtemp(join(tmpdir(), 'uniflow-bench-'));
  make.onRelease(() => rm(folder, { recursive: true }));
  const fresh = VisionEncoder.random(configOf(size), onBench());
  await fresh.save(folder);
  const weights = new Map<string, FloatArray>();
  for (const { name, shape } of fresh.parameters.flatMap(({ parts }) => parts)) weights.set(name, await randomWeight(make, name, shape));
  await fresh.dispose();
  const header = safetensorsHeader(
    [...weights].map(([name, { shape }]) => [name, { dtype: 'F32', shape }]),
    {},
  );
  await writeFile(join(folder, 'model.safetensors'), [header, ...[...weights.values()].map(({ data }) => data)]);
  const encoder = await VisionEncoder.load(folder, onBench());
  make.onRelease(() => encoder.dispose());
  return { encoder, weights, folder };
}

/** Biases and scales are random too, because missing ones would go unnoticed at the initial values of 0 and 1. */
async function randomWeight(make: Inputs, name: string, shape: readonly number[]): Promise<FloatArray> {
  const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
  const mean = /norm\d?\.weight$|\.lambda1$/.test(name) ? 1 : 0;
  await make.tensor(shape, 'float32').read(data);
  return { data: data.map((value) => mean + 0.02 * value), shape };
}

/** Both sides read and write the same amount of data in JavaScript's memory. */
function encodePixels(size: Size, batch: number): Comparison<OnnxRuntime> {
  const shape = [batch, 3, SIDE, SIDE];
  return {
    ...{ peer: 'ONNX Runtime', name: `DINOv2 ${size}`, shape: shape.join('x') },
    measure: async (runtime, make, effort) => {
      const { encoder, weights } = await model(make, size);
      const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
      await make.tensor(shape, 'float32').read(data);
      const work = (): Promise<Float32Array> => features(encoder, data, shape);
      const oursMs = (await time(work, effort)).latency.p50;
      const graphs = eachForm((form) => dinoV2Graph(encoder.config, weights, batch, form));
      return { oursMs, ...(await timeGraphs(runtime, graphs, { pixel_values: { data, shape } }, effort, await work())) };
    },
  };
}

async function features(encoder: VisionEncoder, pixels: Float32Array, shape: number[]): Promise<Float32Array> {
  const { lastHiddenState } = await encoder.encode({ pixels: ndarray(pixels, shape) }, { batchSize: shape[0] as number });
  return lastHiddenState.data as Float32Array;
}

/** Creates the graphs one at a time, because each holds all weights. */
function* eachForm<T>(make: (form: (typeof forms)[number]) => T): Generator<T> {
  for (const form of forms) yield make(form);
}

/** The parts of transformers.js used here. */
interface Transformers {
  env: { localModelPath: string; allowRemoteModels: boolean };
  RawImage: { read(path: string): Promise<unknown> };
  AutoImageProcessor: { from_pretrained(name: string): Promise<(images: unknown[]) => Promise<{ pixel_values: TheirTensor }>> };
  AutoModel: { from_pretrained(name: string, options: object): Promise<TheirModel> };
}
interface TheirTensor {
  data: Float32Array;
  dims: number[];
}
interface TheirModel {
  (inputs: { pixel_values: TheirTensor }): Promise<{ last_hidden_state: TheirTensor }>;
  dispose(): Promise<unknown>;
}

/**
 * From files to features. transformers.js resizes without antialiasing, so its pixels differ from ours: features are compared on its
 * pixels, and times are measured from the files.
 */
function encodeFiles(size: Size, count: number): Comparison<Transformers> {
  return {
    ...{ peer: 'transformers.js', name: `DINOv2 ${size}`, shape: `${count} JPEG files` },
    measure: async (theirs, make, effort) => {
      const paths = await readPhotos(count);
      const ours = await model(make, size);
      const result: Measured = {
        oursMs: (await time(() => ours.encoder.encode(paths), effort)).latency.p50,
        theirsMs: Infinity,
        difference: 0,
      };
      const id = await publish(theirs, ours, count);
      const processor = await theirs.AutoImageProcessor.from_pretrained(id);
      const preprocess = async (): ReturnType<typeof processor> =>
        processor(await Promise.all(paths.map((path) => theirs.RawImage.read(path))));
      const { pixel_values } = await preprocess();
      const expected = await features(ours.encoder, pixel_values.data, pixel_values.dims);
      for (const form of forms) {
        const options = { device: 'cpu', dtype: 'fp32', model_file_name: form, session_options: sessionOptions() };
        const encoder = await theirs.AutoModel.from_pretrained(id, options);
        const { last_hidden_state } = await encoder({ pixel_values });
        result.difference = Math.max(result.difference, relativeL2(expected, last_hidden_state.data));
        const { latency } = await time(async () => encoder(await preprocess()), effort);
        result.theirsMs = Math.min(result.theirsMs, latency.p50);
        await encoder.dispose();
      }
      return result;
    },
  };
}

/** Turns the checkpoint into one for transformers.js, with a graph of each form. @returns its name. */
async function publish({ env }: Transformers, { encoder, weights, folder }: Model, batch: number): Promise<string> {
  await mkdir(join(folder, 'onnx'));
  for (const form of forms)
    await writeFile(join(folder, 'onnx', `${form}.onnx`), onnxModel(dinoV2Graph(encoder.config, weights, batch, form)));
  const size = { height: SIDE, width: SIDE };
  const processor = {
    image_processor_type: 'BitImageProcessor',
    size,
    image_mean: IMAGENET.mean,
    image_std: IMAGENET.std,
  };
  await writeFile(join(folder, 'preprocessor_config.json'), JSON.stringify(processor));
  env.localModelPath = dirname(folder);
  env.allowRemoteModels = false;
  return basename(folder);
}

export const encoders = [encodePixels('small', 1), encodePixels('small', 16), encodePixels('base', 1), encodePixels('base', 8)];
export const images = [encodeFiles('small', 6), encodeFiles('base', 6)];
