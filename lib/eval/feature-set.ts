/** Feature sets on disk: an .npy [N,D] and a .json with its pins. Sets with different pins are not compared. */
import type { NdArray } from 'ndarray';
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { z } from 'zod';
import { UniFlowError } from '../errors.js';
import { replaceFiles } from '../io/files.js';
import { npyHeader, readNpy } from '../io/npy.js';
import { fileHash, featurePins, type FeaturePins } from './pins.js';

export interface FeatureSet {
  /** [N,D] */
  features: NdArray<Float32Array>;
  /** Undefined: made elsewhere, from unknown images. */
  pins: FeaturePins | undefined;
  /** The file it was read from. */
  file?: { path: string; sha256: string };
}

const sidecar = z.object({ file: z.object({ sha256: z.string(), shape: z.tuple([z.number(), z.number()]) }), pins: featurePins });

/** Writes `path`, an .npy, and its .json: both or neither. */
export async function saveFeatureSet(path: string, { features, pins }: FeatureSet): Promise<void> {
  const beside = sidecarOf(path);
  if (!pins) throw UniFlowError.expected('BAD_INPUT', 'pins', 'what the features are of', 'none');
  const { data, shape } = features;
  const [header, values] = [npyHeader('<f4', shape), new Uint8Array(data.buffer, data.byteOffset, data.byteLength)];
  const sha256 = createHash('sha256').update(header).update(values).digest('hex');
  try {
    await replaceFiles([
      { path, write: async (file) => void (await file.writeFile(header), await file.writeFile(values)) },
      { path: beside, write: (file) => file.writeFile(`${JSON.stringify({ file: { sha256, shape }, pins }, null, 2)}\n`) },
    ]);
  } catch (cause) {
    throw new UniFlowError('BAD_INPUT', `${path} cannot be written: ${(cause as Error).message}`, { subject: path, cause });
  }
}

/**
 * Reads a feature set.
 * @param allowUnpinned also accepts an .npy without a .json, whose origin is then unknown.
 * @throws UniFlowError `BAD_INPUT` if there is no .json, or it belongs to another .npy.
 */
export async function loadFeatureSet(path: string, { allowUnpinned = false } = {}): Promise<FeatureSet> {
  const beside = sidecarOf(path);
  const features = await readNpy(path);
  if (features.shape.length !== 2 || features.dtype !== 'float32')
    throw UniFlowError.expected('BAD_INPUT', path, 'float32 features [N, D]', `${features.dtype} [${features.shape.join(', ')}]`);
  const file = { path, sha256: await fileHash(path) };
  const text = await readFile(beside, 'utf8').catch(() => undefined);
  const set = { features: features as NdArray<Float32Array>, file };
  if (text === undefined) {
    if (allowUnpinned) return { ...set, pins: undefined };
    const why = `${beside} beside it, which says what it is made of; features from elsewhere are taken when unpinned ones are allowed`;
    throw UniFlowError.expected('BAD_INPUT', path, why, 'none');
  }
  const stored = parse(beside, text);
  if (stored.file.sha256 !== file.sha256)
    throw UniFlowError.expected('BAD_INPUT', path, `the file that ${beside} was written for (sha256 ${stored.file.sha256})`, file.sha256);
  return { ...set, pins: stored.pins };
}

function parse(path: string, text: string): z.infer<typeof sidecar> {
  try {
    return sidecar.parse(JSON.parse(text));
  } catch (cause) {
    throw new UniFlowError('BAD_INPUT', `${path}: not what is written beside a feature set: ${(cause as Error).message}`, {
      subject: path,
      cause,
    });
  }
}

function sidecarOf(path: string): string {
  if (!path.endsWith('.npy')) throw UniFlowError.expected('BAD_INPUT', 'features', 'a name ending in .npy', `'${path}'`);
  return path.replace(/\.npy$/, '.json');
}

/**
 * Refuses a reference that was not made in the same way as `wanted`: by the same extractor, from images of the same crop and size. The images themselves may
 * differ, because the user may want to compare with another split.
 * @throws UniFlowError `BAD_INPUT` naming every difference.
 */
export function checkComparable(reference: FeaturePins, wanted: FeaturePins): void {
  const [there, here] = [comparedPins(reference), comparedPins(wanted)];
  const differences = Object.keys(here).filter((key) => there[key] !== here[key]);
  if (differences.length === 0) return;
  const list = (pins: Record<string, string>): string => differences.map((key) => `${key} ${pins[key]}`).join(', ');
  throw UniFlowError.expected('BAD_INPUT', 'reference', `features with ${list(here)}`, list(there));
}

function comparedPins({ extractor, crop, size }: FeaturePins): Record<string, string> {
  return {
    extractor: `${extractor.kind} ${extractor.sha256}`,
    pool: extractor.pool,
    'input size': extractor.size.join('x'),
    dtype: extractor.dtype,
    crop,
    size: size.join('x'),
  };
}
