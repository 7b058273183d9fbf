/** The header of a run, the manifest of its shards, and the seal that marks a run as complete. */
import { createHash } from 'node:crypto';
import { UniFlowError } from '../errors.js';
import { valueBytes } from '../io/checkpoint.js';
import { safetensorsHeader } from '../io/files.js';
import { packageVersion } from '../package.js';
import type { UniFlow } from '../uniflow.js';
import type { Fit } from '../images/fit.js';
import type { ArrayName } from './formats/format.js';
import { FORMATS, type FormatName } from './formats/index.js';
import { mergeMoments, type Moments } from './moments.js';
import type { Skips } from '../sources/skips.js';
import type { Output } from './output.js';
import type { Failure, ShardEncoder, ShardRecord } from './shard.js';
import type { StoreType } from './store.js';

export const MANIFEST = 'manifest.json';
export const FAILURES = 'failures.jsonl';
export const SKIPPED = 'skipped.jsonl';
export const STATISTICS = 'latent_stats.safetensors';

/** Fields shared by all shards of a run. Runs with equal headers and images have equal shards. */
export interface Header {
  schema: 1;
  /** Version of this package. */
  version: string;
  /** `name` is the name used when the run started: one model can have several. */
  model: { name: string; sha256: string; dtype: string };
  /** Vector length of each stored array. */
  arrays: Partial<Record<ArrayName, number>>;
  store: StoreType;
  format: FormatName;
  fit: Fit;
  size: readonly [height: number, width: number];
  patch: number;
  batchSize: number;
  shardSize: number;
}

/** Manifest of a complete run. */
export interface Manifest {
  header: Header;
  /** Number of images in all shards. */
  count: number;
  failures: number;
  /** sha256 (hex) of the concatenated sha256 of all files, in order. Identifies the data. */
  sha256: string;
  /** Statistics of the latents, per channel, over all vectors; null if no latents are stored. */
  statistics: { count: number; mean: number[]; variance: number[] } | null;
  shards: ShardRecord[];
}

/**
 * The header of a new run. Hashes the weights, which takes a while for a large model.
 * @throws {UniFlowError} `UNSUPPORTED` if the library that writes the format is not installed.
 */
export async function headerOf(encoder: ShardEncoder, shardSize: number): Promise<Header> {
  const { uniflow, pipeline, arrays, store, format, model: name } = encoder;
  await FORMATS[format].checkInstalled?.();
  const { fit, size, patch } = pipeline.target;
  return {
    ...{ schema: 1, version: packageVersion },
    model: { name, sha256: await hashModel(uniflow), dtype: uniflow.precision },
    arrays: Object.fromEntries(arrays.map((array) => [array, encoder.widthOf(array)])),
    ...{ store, format, fit, size, patch, batchSize: pipeline.batchSize, shardSize },
  };
}

/** sha256 (hex) of a model's configuration and of all parameters with their names, in the dtype used for computing. */
export async function hashModel(uniflow: UniFlow): Promise<string> {
  const hash = createHash('sha256').update(JSON.stringify(uniflow.config));
  for (const { tensor, parts, matrix } of uniflow.parameters) {
    hash.update(JSON.stringify(parts.map((part) => part.name)));
    hash.update(await valueBytes(tensor.handle, matrix ? uniflow.dtype : 'float32'));
  }
  return hash.digest('hex');
}

/**
 * Refuses to resume a different run.
 * @throws {UniFlowError} `BAD_INPUT` naming the differences.
 */
export function checkSameRun(where: string, there: Header, now: Header): void {
  const [a, b] = [flat(there), flat(now)];
  const names = [...new Set([...a.keys(), ...b.keys()])].filter((name) => name !== 'model.name' && a.get(name) !== b.get(name));
  if (names.length === 0) return;
  const differences = names.map((name) => `${name} (${a.get(name) ?? 'none'} there, ${b.get(name) ?? 'none'} now)`).join(', ');
  throw new UniFlowError(
    'BAD_INPUT',
    `${where} has another run; they differ in ${differences}. Choose another folder, or the same options`,
    {
      subject: where,
    },
  );
}

/** Nested fields, keyed by their path. */
function flat(value: object, prefix = ''): Map<string, string> {
  return new Map(
    Object.entries(value).flatMap(([name, field]: [string, unknown]): [string, string][] =>
      typeof field === 'object' && field !== null && !Array.isArray(field)
        ? [...flat(field, `${prefix}${name}.`)]
        : [[prefix + name, JSON.stringify(field)]],
    ),
  );
}

/** Reads the manifest; undefined if there is none. @throws {UniFlowError} `BAD_INPUT` if it is not a valid manifest. */
export async function readManifest(output: Output): Promise<Manifest | undefined> {
  if ((await output.size(MANIFEST)) === undefined) return undefined;
  const text = (await output.read(MANIFEST)).toString();
  try {
    const manifest = JSON.parse(text) as Manifest;
    if (manifest.header.schema === 1) return manifest;
  } catch (cause) {
    throw UniFlowError.expected('BAD_INPUT', `${output.name}: ${MANIFEST}`, 'JSON', (cause as Error).message, cause);
  }
  throw UniFlowError.expected('BAD_INPUT', `${output.name}: ${MANIFEST}`, 'a manifest of schema 1', 'another');
}

/** Completes a run whose shards all exist. Writes the manifest last, so that a folder with a manifest is complete. */
export async function seal(output: Output, header: Header, records: readonly ShardRecord[]): Promise<Manifest> {
  const shards = [...records].sort((a, b) => a.index - b.index);
  shards.forEach(({ index }, i) => {
    if (index !== i)
      throw UniFlowError.expected('BAD_INPUT', output.name, `the shards 0 to ${shards.length - 1}`, `${index} after ${i - 1}`);
  });
  const hash = createHash('sha256');
  for (const { sha256 } of shards.flatMap(({ files }) => files)) hash.update(sha256, 'hex');
  const failures = shards.flatMap((shard) => shard.failures);
  const manifest: Manifest = {
    header,
    count: shards.reduce((sum, { count }) => sum + count, 0),
    failures: failures.length,
    sha256: hash.digest('hex'),
    statistics: statisticsOf(shards),
    shards,
  };
  await writeFailures(output, failures);
  if (manifest.statistics) await output.write(STATISTICS, statisticsFile(manifest, manifest.statistics));
  await output.write(MANIFEST, [Buffer.from(`${JSON.stringify(manifest, null, 1)}\n`)]);
  return manifest;
}

/** Writes exactly these failures to failures.jsonl; removes the file if there are none. */
export async function writeFailures(output: Output, failures: readonly Failure[]): Promise<void> {
  if (failures.length === 0) return output.remove(FAILURES);
  await output.write(
    FAILURES,
    failures.map((failure) => Buffer.from(`${JSON.stringify(failure)}\n`)),
  );
}

/** Writes the files that the source skipped to skipped.jsonl; removes the file if there are none. */
export async function writeSkips(output: Output, skips: Skips): Promise<void> {
  if (skips.count === 0) return output.remove(SKIPPED);
  await output.write(
    SKIPPED,
    (function* () {
      for (const line of skips.lines()) yield Buffer.from(line);
    })(),
  );
}

function statisticsOf(shards: readonly ShardRecord[]): Manifest['statistics'] {
  let all: Moments | undefined;
  for (const { statistics } of shards) if (statistics) all = mergeMoments(all, statistics);
  if (!all) return null;
  const { count, mean, m2 } = all;
  return { count, mean, variance: m2.map((sum) => sum / count) };
}

/** `mean` and `variance`, float64 [Z]. */
function statisticsFile(
  { sha256, header: { model } }: Manifest,
  { count, mean, variance }: NonNullable<Manifest['statistics']>,
): Uint8Array[] {
  const vector = { dtype: 'F64', shape: [mean.length] } as const;
  const entries = [['mean', vector] as const, ['variance', vector] as const];
  const head = safetensorsHeader(entries, { count: String(count), data: sha256, model: model.sha256 });
  return [head, new Uint8Array(Float64Array.from([...mean, ...variance]).buffer)];
}
