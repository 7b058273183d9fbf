/**
 * Measures a tokenizer in one pass over the images (and one over the training images, if given): PSNR, SSIM and the Fréchet distance of the reconstructions,
 * the PCA baseline, the use of the latents, linear probe and nearest neighbours on frozen tokens and latents, and each layer's cosine to the teacher. Pixels
 * are kept for one batch, and a few vectors for each image.
 *
 * The numbers do not depend on the batch size: sums over images or tokens are computed separately for each image, then added in the order of the images in
 * float64. (Matrix products may differ in the last bit with the number of rows.)
 */
import type { NdArray } from 'ndarray';
import { checkInteger, checkOptions, describe } from '../check.js';
import { flat, meanOfTokens } from '../encoder/pooling.js';
import { batches } from '../train/loader.js';
import { subset, type Dataset } from '../sources/dataset.js';
import { evenlySpaced } from '../sources/evenly-spaced.js';
import type { Schedule } from '../decoder/schedule.js';
import { UniFlowError } from '../errors.js';
import { checkBatchSize } from '../gather.js';
import { checkSize } from '../images/input.js';
import type { QualityConvention } from '../native.js';
import { imageQuality, sliceTokens } from '../ops.js';
import { cancellable, type Grid, gridOf, onDevice, type Tensor, tidy } from '../tensor.js';
import { packageVersion } from '../package.js';
import type { UniFlow } from '../uniflow.js';
import { FIT_IMAGES, fitBaseline, type PatchCodec } from './baseline.js';
import type { ComparedSet, DataOrigin, EvaluateOptions, Evaluation, EvaluationPins } from './evaluation.js';
import { checkComparable, type FeatureSet } from './feature-set.js';
import { FeatureTable, imagesOf, covered } from './features.js';
import { fid } from './fid.js';
import { KNN_DEFAULTS, knnAccuracy } from './knn.js';
import { LatentMeter } from './latent-use.js';
import { checkTeacher, layerDistances } from './layers.js';
import { parametersPin, type DataPin, type SamplingPin } from './pins.js';
import { linearProbe, PROBE_DEFAULTS } from './probe.js';

/**
 * Measures `uniflow` on `data`.
 * @throws UniFlowError `BAD_INPUT` if teacher, training images or reference do not match, before anything is computed; the error of an unreadable image, with
 * its name; `ABORTED`.
 */
export async function evaluate(uniflow: UniFlow, options: EvaluateOptions): Promise<Evaluation> {
  checkOptions(options);
  if (typeof options.data?.read !== 'function') throw UniFlowError.expected('BAD_INPUT', 'data', 'a Dataset', describe(options.data));
  return new Run(uniflow, options).evaluate();
}

class Run {
  private readonly size: [number, number];
  private readonly grid: Grid;
  private readonly batchSize: number;
  private readonly sampling: SamplingPin & { schedule: Schedule };
  private readonly convention: QualityConvention;

  constructor(
    private readonly uniflow: UniFlow,
    private readonly options: EvaluateOptions,
  ) {
    const { imageSize, patch, steps } = uniflow.config;
    const { teacher, features, reference, latentPool = 'mean' } = options;
    this.size = [...checkSize(options.size ?? imageSize, patch)];
    this.grid = gridOf(this.size, patch);
    this.batchSize = checkBatchSize(options.batchSize, this.grid.rows * this.grid.cols, uniflow.device);
    this.sampling = {
      ...{ steps: options.steps ?? steps, schedule: options.schedule ?? 'linear' },
      ...{ guidance: options.guidance ?? 1, seed: options.seed ?? 0 },
    };
    checkInteger('seed', this.sampling.seed, 0, Number.MAX_SAFE_INTEGER);
    this.convention = options.convention ?? 'standard';
    if (this.convention !== 'standard' && this.convention !== 'paper')
      throw UniFlowError.expected('BAD_INPUT', 'convention', "'standard' or 'paper'", describe(options.convention));
    if (latentPool !== 'mean' && latentPool !== 'concat')
      throw UniFlowError.expected('BAD_INPUT', 'latentPool', "'mean' or 'concat'", describe(latentPool));
    if (teacher) checkTeacher(uniflow.encoder, teacher.encoder);
    if (reference && !features)
      throw UniFlowError.expected('BAD_INPUT', 'features', 'what to compare with the reference: an extractor, or a feature set', 'none');
    if (features && !('extract' in features) && !reference)
      throw UniFlowError.expected('BAD_INPUT', 'reference', 'a feature set to compare with, as the features are a set', 'none');
  }

  async evaluate(): Promise<Evaluation> {
    const { data, train } = this.options;
    if (train) await checkClasses(train, data);
    const pins = await this.pins();
    const sides = this.sides(pins);
    const { codec, fitted } = await this.baseline();
    const meter = new LatentMeter(this.uniflow, data.length);
    const { table, labels } = await this.measure(data, { codec, meter }).finally(() => codec?.dispose());
    const distances = table.get('distances');
    return {
      ...{ images: data.length, ...qualityOf(table, 'quality') },
      ...(await meter.measure({ ...this.sampling, grid: this.grid, signal: this.options.signal })),
      ...(codec ? { baseline: { ...qualityOf(table, 'baseline'), channels: codec.channels, fitted } } : {}),
      ...(await this.frechet(sides, table)),
      ...(train && labels ? { understanding: await this.understanding(train, table, labels) } : {}),
      ...(distances ? { layers: columnMeans(distances).map((distance) => 1 - distance) } : {}),
      pins,
    };
  }

  // ----- pins ---------------------------------------------------------------------------------------------------

  private async pins(): Promise<EvaluationPins> {
    const { data, train, teacher, latentPool = 'mean', origin = {} } = this.options;
    const { seed } = this.sampling;
    return {
      ...{ version: packageVersion, model: origin.model ?? (await parametersPin(this.uniflow.parameters)), dtype: this.uniflow.precision },
      ...(teacher ? { teacher: origin.teacher ?? (await parametersPin(teacher.parameters)) } : {}),
      data: await this.dataPin('data', data, origin.data),
      ...(train ? { train: await this.dataPin('train', train, origin.train) } : {}),
      ...{ crop: 'center', size: this.size, sampling: this.sampling, convention: this.convention },
      ...(train ? { latentPool, probe: { optimizer: 'AdamW', ...PROBE_DEFAULTS, seed }, knn: KNN_DEFAULTS } : {}),
    };
  }

  private async dataPin(name: string, dataset: Dataset, { path, split }: DataOrigin = IN_MEMORY): Promise<DataPin> {
    const { signal } = this.options;
    const sha256 = await dataset.hash({ signal, onProgress: (done, total) => this.progress(`hash ${name}`, done, total) });
    return { path, split, images: dataset.length, sha256 };
  }

  private async baseline(): Promise<{ codec: PatchCodec | undefined; fitted: DataPin }> {
    const { data, train, baseline, origin = {}, signal } = this.options;
    const [source, { path, split }] = baseline
      ? [baseline, origin.baseline ?? IN_MEMORY]
      : train
        ? [train, origin.train ?? IN_MEMORY]
        : [data, origin.data ?? IN_MEMORY];
    const indices = evenlySpaced(source.length, FIT_IMAGES);
    const part = indices.length < source.length ? `${indices.length} evenly spaced of ${split}` : split;
    const taken = subset(source, indices);
    const fitted = await this.dataPin('baseline', taken, { path, split: part });
    const onProgress = (done: number, total: number): void => this.progress('baseline', done, total);
    return { codec: await fitBaseline(this.uniflow, taken, { size: this.size, signal, onProgress }), fitted };
  }

  /** The two sides of the Fréchet distance, with their features if they already exist. */
  private sides({ model, dtype, data }: EvaluationPins): { reference: Side; reconstructions: Side } | undefined {
    const { features, reference } = this.options;
    if (!features) return undefined;
    const pins =
      'extract' in features ? { extractor: features.pin, data, crop: 'center', size: this.size, version: packageVersion } : undefined;
    const reconstructions: Side = pins
      ? { pins: { ...pins, reconstruction: { model, dtype, sampling: this.sampling } } }
      : (features as FeatureSet);
    if (reference?.pins && reconstructions.pins) checkComparable(reference.pins, reconstructions.pins);
    return { reference: reference ?? { pins }, reconstructions };
  }

  // ----- passes -------------------------------------------------------------------------------------------------

  /** Computes the values kept for each image of `dataset`. With `measured`, the images are also decoded and measured; training images are not. */
  private async measure(dataset: Dataset, measured?: Measured): Promise<{ table: FeatureTable; labels: Int32Array | undefined }> {
    const { signal, train } = this.options;
    const { batchSize, size } = this;
    const table = new FeatureTable(dataset.length);
    const labels = train && new Int32Array(dataset.length);
    let done = 0;
    for await (const batch of batches(dataset, { batchSize, size, crop: 'center', epochs: 1, signal })) {
      const { z, ...kept } = await this.encodeBatch(batch.pixels, measured !== undefined);
      if (z && measured) Object.assign(kept, await this.decodeBatch(await covered(this.uniflow, batch.pixels, this.grid), z, measured));
      for (const [name, array] of Object.entries(kept)) table.add(name, array);
      labels?.set(batch.labels as Int32Array, done);
      this.progress(measured ? 'evaluate' : 'train features', (done += batch.ids.length), dataset.length);
    }
    return { table, labels };
  }

  private encodeBatch(pixels: NdArray<Uint8Array>, decoding: boolean): Promise<Record<string, NdArray>> {
    return cancellable(this.options.signal, (queue) =>
      readAll(queue(() => onDevice(this.uniflow.device, () => tidy(() => this.encode(imagesOf(pixels), decoding))))),
    );
  }

  /** Latents z [B,N,Z] and cosine distances if decoding, features if there is a probe. */
  private encode(pixels: Tensor, decoding: boolean): Record<string, Tensor> {
    const { uniflow } = this;
    const { teacher, train, latentPool } = this.options;
    const { encoder } = uniflow;
    const student = uniflow.forward(pixels, { states: decoding && teacher !== undefined });
    const z = student.latents;
    const ours = teacher?.encoder.forward(pixels, { states: decoding });
    const mean = (last: Tensor): Tensor => meanOfTokens(sliceTokens(last, encoder.prefix, last.dim(1)));
    return {
      ...(train ? { tokens: mean(student.last), latents: latentPool === 'concat' ? flat(z) : meanOfTokens(z) } : {}),
      ...(train && ours ? { teacher: mean(ours.last) } : {}),
      ...(decoding && ours ? { distances: layerDistances(student.states.slice(1), ours.states.slice(1), encoder.prefix) } : {}),
      ...(decoding ? { z } : {}),
    };
  }

  private async decodeBatch(originals: NdArray<Uint8Array>, z: NdArray, { codec, meter }: Measured): Promise<Record<string, NdArray>> {
    const { signal, features, reference } = this.options;
    const { convention } = this;
    const images = (await this.uniflow.decode(z, { ...this.sampling, grid: this.grid, signal })) as NdArray<Uint8Array>;
    const { quality } = await readAll(
      onDevice(this.uniflow.device, () => tidy(() => ({ quality: imageQuality(imagesOf(originals), imagesOf(images), convention) }))),
    );
    await meter.add(originals, z);
    const compared = { quality: quality as NdArray, ...(codec ? { baseline: await codec.quality(originals, { convention }) } : {}) };
    const extractor = features && 'extract' in features ? features : undefined;
    if (!extractor) return compared;
    const reconstructions = await extractor.extract(images, signal);
    const [width, expected] = [reconstructions.shape[1], reference?.features.shape[1] ?? reconstructions.shape[1]];
    if (width !== expected) throw UniFlowError.expected('BAD_INPUT', 'reference', `features of ${width} dimensions`, String(expected));
    return {
      ...{ ...compared, reconstructions },
      ...(reference ? {} : { originals: await extractor.extract(originals, signal) }),
    };
  }

  // ----- numbers ------------------------------------------------------------------------------------------------

  private async frechet(sides: ReturnType<Run['sides']>, table: FeatureTable): Promise<Pick<Evaluation, 'fid' | 'featureSets'>> {
    if (!sides) return {};
    const [reference, reconstructions] = [
      filled(sides.reference, table.get('originals')),
      filled(sides.reconstructions, table.get('reconstructions')),
    ];
    const value = await fid(reference.features, reconstructions.features);
    const name = reconstructions.pins?.extractor.kind === 'inception' ? 'rFID' : 'FID';
    const side = ({ features, ...rest }: FeatureSet): ComparedSet => ({ images: features.shape[0] as number, ...rest });
    const dimensions = reference.features.shape[1] as number;
    return {
      fid: { name, value, dimensions, reference: side(reference), reconstructions: side(reconstructions) },
      featureSets: { reference, reconstructions },
    };
  }

  private async understanding(train: Dataset, test: FeatureTable, labels: Int32Array): Promise<NonNullable<Evaluation['understanding']>> {
    const { signal } = this.options;
    const learned = await this.measure(train);
    const found: NonNullable<Evaluation['understanding']> = {};
    for (const name of learned.table.names) {
      const known = { features: learned.table.get(name) as NdArray, labels: learned.labels as Int32Array };
      const asked = { features: test.get(name) as NdArray, labels };
      const onProgress = (done: number, total: number): void => this.progress(`probe ${name}`, done, total);
      const { accuracy } = await linearProbe(known, asked, { seed: this.sampling.seed, onProgress, signal });
      found[name] = { dimensions: known.features.shape[1] as number, probe: accuracy, knn: await knnAccuracy(known, asked, { signal }) };
    }
    return found;
  }

  private progress(stage: string, done: number, total: number): void {
    this.options.onProgress?.({ stage, done, total });
  }
}

/** Tools that measure decoded images. */
interface Measured {
  codec: PatchCodec | undefined;
  meter: LatentMeter;
}

const IN_MEMORY: DataOrigin = { path: 'in memory', split: 'all' };

/** A feature set whose features may not be computed yet. */
type Side = Omit<FeatureSet, 'features'> & { features?: FeatureSet['features'] };

function filled(side: Side, features: FeatureSet['features'] | undefined): FeatureSet {
  return { ...side, features: side.features ?? (features as FeatureSet['features']) };
}

/** Checks that both are labelled, with the same classes. */
async function checkClasses(train: Dataset, data: Dataset): Promise<void> {
  for (const [name, dataset] of Object.entries({ train, data }))
    if ((await dataset.read(0)).label === undefined)
      throw UniFlowError.expected('BAD_INPUT', name, 'labelled images, for linear probe and nearest neighbours', 'images without labels');
  const [there, here] = [train.classes ?? [], data.classes ?? []];
  if (there.join('\n') === here.join('\n')) return;
  const differing = [...there.filter((c) => !here.includes(c)), ...here.filter((c) => !there.includes(c))];
  throw UniFlowError.expected('BAD_INPUT', 'train', 'the classes of the data', `others: ${differing.slice(0, 5).join(', ')}`);
}

async function readAll(tensors: Record<string, Tensor>): Promise<Record<string, NdArray>> {
  const entries = Object.entries(tensors);
  try {
    return Object.fromEntries(await Promise.all(entries.map(async ([name, tensor]) => [name, await tensor.read()] as const)));
  } finally {
    for (const [, tensor] of entries) tensor.dispose();
  }
}

function qualityOf(table: FeatureTable, name: 'quality' | 'baseline'): { psnr: number; ssim: number } {
  const [psnr = NaN, ssim = NaN] = columnMeans(table.get(name) as NdArray);
  return { psnr, ssim };
}

/** Means of the few columns of [N,C], summed in float64 in the order of the rows. */
function columnMeans(array: NdArray): number[] {
  const [rows, columns] = array.shape as [number, number];
  return Array.from({ length: columns }, (_, c) => {
    let sum = 0;
    for (let r = 0; r < rows; r++) sum += array.get(r, c);
    return sum / rows;
  });
}
