/** `uniflow eval`: measures the quality of a tokenizer, and records the data of each measurement. */
import { openDataset, subset, type Dataset } from '../sources/dataset.js';
import { evenlySpaced } from '../sources/evenly-spaced.js';
import type { VisionEncoder } from '../encoder/vision-encoder.js';
import { UniFlowError } from '../errors.js';
import { shareOfCodes, type CodeUse } from '../eval/code-use.js';
import { evaluate } from '../eval/evaluate.js';
import type { EvaluateOptions, Evaluation } from '../eval/evaluation.js';
import { loadFeatureSet, saveFeatureSet } from '../eval/feature-set.js';
import { encoderFeatures } from '../eval/features.js';
import { inceptionFeatures } from '../eval/inception.js';
import { weightsOf, type DataPin, type WeightsPin } from '../eval/pins.js';
import { replaceFile } from '../io/files.js';
import { resolveModel } from '../io/hub.js';
import type { QualityConvention } from '../native.js';
import { embeddedModel } from '../package.js';
import type { UniFlow } from '../uniflow.js';
import type { ModelOptions, ImageOptions, SamplingOptions } from './options.js';
import { plural, printJson } from './output.js';
import { Stages } from './progress.js';
import { Skips } from '../sources/skips.js';
import { loadAny, loadModel, reportSkips } from './shared.js';

export interface EvalCommandOptions extends ModelOptions, ImageOptions, SamplingOptions {
  limit?: number;
  train?: string;
  baseline?: string;
  convention?: QualityConvention;
  teacher?: string;
  latentPool?: 'mean' | 'concat';
  features?: string;
  inception?: string;
  pool?: 'mean' | 'class';
  reference?: string;
  allowUnpinned?: true;
  saveFeatures?: string;
  out?: string;
}

export async function evaluateCommand(path: string, options: EvalCommandOptions, signal: AbortSignal): Promise<void> {
  const { saveFeatures, out, json, teacher: teacherName, latentPool, convention, size, steps, schedule, guidance, seed, batch } = options;
  const data = await open(path, options.limit, signal);
  const train = options.train === undefined ? undefined : await open(options.train, options.limit, signal);
  const baseline = options.baseline === undefined ? undefined : await open(options.baseline, undefined, signal);
  for (const { dataset } of [data, ...(train ? [train] : []), ...(baseline ? [baseline] : [])])
    reportSkips(Skips.of(dataset.skipped ?? []), undefined, json === true);
  const features = await featuresOf(options, signal);
  if (saveFeatures !== undefined && !(features && 'extract' in features))
    throw UniFlowError.expected('BAD_INPUT', 'features', 'an encoder or an Inception file to make the features to save', 'none');
  const reference = options.reference === undefined ? undefined : await loadFeatureSet(options.reference, options);
  const uniflow = await loadModel(options, signal);
  const teacher = teacherName === undefined ? undefined : await pinned(teacherName, options, signal);
  const stages = new Stages(json === true);
  try {
    const { featureSets, ...result } = await evaluate(uniflow, {
      ...{
        data: data.dataset,
        train: train?.dataset,
        baseline: baseline?.dataset,
        convention,
        teacher: teacher?.model,
        features,
        reference,
        latentPool,
      },
      ...{ size, steps, schedule, guidance, seed, batchSize: batch, signal },
      onProgress: (progress) => stages.update(progress),
      origin: {
        model: await modelPin(options, signal),
        teacher: teacher?.weights,
        data: data.origin,
        train: train?.origin,
        baseline: baseline?.origin,
      },
    });
    stages.stop();
    if (json) printJson(result);
    else process.stdout.write(table(result));
    if (saveFeatures !== undefined && featureSets) await saveFeatureSet(saveFeatures, featureSets.reference);
    if (out !== undefined) await replaceFile(out, (file) => file.writeFile(`${JSON.stringify(result, null, 2)}\n`));
  } finally {
    stages.stop();
    await Promise.all([data, train, baseline].map(async (opened) => opened?.dataset.close()));
  }
}

interface Opened {
  dataset: Dataset;
  origin: { path: string; split: string };
}

/** Opens a data set, limited to `limit` evenly spaced images. */
async function open(path: string, limit: number | undefined, signal: AbortSignal): Promise<Opened> {
  const dataset = await openDataset(path, { signal });
  const { length } = dataset;
  if (limit === undefined || limit >= length) return { dataset, origin: { path, split: 'all' } };
  return { dataset: subset(dataset, evenlySpaced(length, limit)), origin: { path, split: `${limit} of ${length}, evenly spaced` } };
}

async function featuresOf(options: EvalCommandOptions, signal: AbortSignal): Promise<EvaluateOptions['features']> {
  const { features, inception, pool } = options;
  if (inception !== undefined) return inceptionFeatures(inception);
  if (features === undefined) return undefined;
  if (features.endsWith('.npy')) return loadFeatureSet(features, options);
  const { model, weights } = await pinned(features, options, signal);
  return encoderFeatures(model, { pool, weights });
}

/** A vision encoder, or a UniFlow model for its encoder. */
async function pinned(
  name: string,
  { json, device, dtype }: ModelOptions,
  signal: AbortSignal,
): Promise<{ model: VisionEncoder | UniFlow; weights: WeightsPin }> {
  const { model, folder } = await loadAny(name, { json, device, dtype }, signal);
  return { model, weights: await weightsOf(name, folder) };
}

async function modelPin({ model, revision }: ModelOptions, signal: AbortSignal): Promise<WeightsPin> {
  if (model === undefined) return weightsOf('uniflow default', embeddedModel);
  return weightsOf(model, await resolveModel(model, { revision, signal }));
}

const percent = (share: number): string => `${(100 * share).toFixed(2)} %`;
const short = ({ name, sha256 }: WeightsPin): string => `${name} (sha256 ${sha256.slice(0, 12)}...)`;

const CONVENTIONS: Record<QualityConvention, string> = {
  standard: '',
  paper: ' (as the paper: data range 2, uniform 7x7 windows; not comparable with other papers)',
};

function table({
  images,
  psnr,
  ssim,
  effectiveRank,
  channelsInUse,
  codes,
  baseline,
  fid,
  understanding,
  layers,
  pins,
}: Evaluation): string {
  const { data, train, model, dtype, size, sampling, convention } = pins;
  const rows: [string, string][] = [
    ['model', `${short(model)}, ${dtype}, ${plural(sampling.steps, 'step')}, seed ${sampling.seed}`],
    [
      'data',
      `${plural(images, 'image')} of ${data.path} (${data.split}; sha256 ${data.sha256.slice(0, 12)}...), centre crop ${size.join('x')}`,
    ],
    ['PSNR', `${psnr.toFixed(2)} dB`],
    ['SSIM', `${ssim.toFixed(4)}${CONVENTIONS[convention]}`],
    ['channels', `effective rank ${effectiveRank.toFixed(1)}, ${percent(channelsInUse)} in use`],
  ];
  if (codes) rows.push(['codes', codesText(codes)]);
  if (baseline) rows.push(['baseline', baselineText(baseline, data)]);
  if (fid) rows.push([fid.name, distance(fid, data.sha256)]);
  for (const [name, { probe, knn, dimensions }] of Object.entries(understanding ?? {}))
    rows.push([name, `linear probe ${percent(probe)}, k-NN ${percent(knn)} (${dimensions} features, ${train?.images} training images)`]);
  if (layers) rows.push(['layer cosine', layers.map((cosine, i) => `${i + 1}: ${cosine.toFixed(4)}`).join('  ')]);
  return rows.map(([name, value]) => `${name.padEnd(14)}${value}\n`).join('');
}

function codesText({ count, used, bitsPerPixel, entropyPerPixel }: CodeUse): string {
  const groups = used.length > 1 ? `, ${percent(Math.min(...used))} to ${percent(Math.max(...used))} a group` : '';
  const bits = `${bitsPerPixel.toFixed(3)} bits per pixel, ${entropyPerPixel.toFixed(3)} by their entropy`;
  return `${percent(shareOfCodes({ used }))} of ${count.toLocaleString('en')} used${groups}; ${bits}`;
}

function baselineText({ psnr, ssim, channels, fitted }: NonNullable<Evaluation['baseline']>, data: DataPin): string {
  const of = fitted.path === data.path ? 'of the evaluated images' : `images of ${fitted.path}`;
  return `PSNR ${psnr.toFixed(2)} dB, SSIM ${ssim.toFixed(4)} (PCA of ${channels} coefficients a patch, fitted to ${fitted.images} ${of})`;
}

function distance({ value, dimensions, reference, reconstructions }: NonNullable<Evaluation['fid']>, data: string): string {
  const by = reconstructions.pins ? short(reconstructions.pins.extractor) : 'an unknown extractor';
  const sets = `${reconstructions.images} against ${plural(reference.images, 'image')}`;
  const unpinned = [reference, reconstructions].some(({ pins }) => !pins) ? '; UNPINNED features: nothing says that they match' : '';
  const there = reference.pins?.data;
  const other = there && there.sha256 !== data ? `; the reference is of other images: ${there.path} (${there.split})` : '';
  return `${value.toPrecision(5)} (${by}, ${dimensions} features, ${sets}${other}${unpinned})`;
}
