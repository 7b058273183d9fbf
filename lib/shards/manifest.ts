/** What a run is, which of its shards are there, and the seal on a run that is complete. */
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
export const JOURNAL = 'manifest.jsonl';
export const FAILURES = 'failures.jsonl';
export const SKIPPED = 'skipped.jsonl';
export const STATISTICS = 'latent_stats.safetensors';

/** What all shards of a run share. Runs with equal headers and pictures have equal shards. */
export interface Header {
  schema: 1;
  /** Version of this package. */
  version: string;
  /** `name` is how it was named at first: one model can have several. */
  model: { name: string; sha256: string; dtype: string };
  /** Elements of a vector of each array that is stored. */
  arrays: Partial<Record<ArrayName, number>>;
  store: StoreType;
  format: FormatName;
  fit: Fit;
  size: readonly [height: number, width: number];
  patch: number;
  batchSize: number;
  shardSize: number;
}

/** A complete run. */
export interface Manifest {
  header: Header;
  /** Pictures in all shards. */
  count: number;
  failures: number;
  /** sha256 (hex) of the sha256 of all files in order: names the data. */
  sha256: string;
  /** Of the latents, per channel, over all their vectors; null where there are none. */
  statistics: { count: number; mean: number[]; variance: number[] } | null;
  shards: ShardRecord[];
}

/**
 * What a run begins with. Hashes the weights, which takes a while for a large model.
 * @throws {UniFlowError} `UNSUPPORTED` where what the format is written with is not installed.
 */
export async function headerOf(encoder: ShardEncoder, shardSize: number): Promise<Header> {
  const { uniflow, pipeline, arrays, store, format, model: name } = encoder;
  await FORMATS[format].checkInstalled?.();
  const { fit, size, patch } = pipeline.target;
  return {
    ...{ schema: 1, version: packageVersion },
    model: { name, sha256: await hashModel(uniflow), dtype: uniflow.dtype },
    arrays: Object.fromEntries(arrays.map((array) => [array, encoder.widthOf(array)])),
    ...{ store, format, fit, size, patch, batchSize: pipeline.batchSize, shardSize },
  };
}

/** sha256 (hex) of a model's configuration and of all parameters with their names, as it computes with them. */
export async function hashModel(uniflow: UniFlow): Promise<string> {
  const hash = createHash('sha256').update(JSON.stringify(uniflow.config));
  for (const { tensor, parts, matrix } of uniflow.parameters) {
    hash.update(JSON.stringify(parts.map((part) => part.name)));
    hash.update(await valueBytes(tensor.handle, matrix ? uniflow.dtype : 'float32'));
  }
  return hash.digest('hex');
}

/**
 * Refuses to go on with a run that is another one.
 * @throws {UniFlowError} `BAD_INPUT` that says in what they differ.
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

/** Fields by path. */
function flat(value: object, prefix = ''): Map<string, string> {
  return new Map(
    Object.entries(value).flatMap(([name, field]: [string, unknown]): [string, string][] =>
      typeof field === 'object' && field !== null && !Array.isArray(field)
        ? [...flat(field, `${prefix}${name}.`)]
        : [[prefix + name, JSON.stringify(field)]],
    ),
  );
}

/** @throws {UniFlowError} `BAD_INPUT` where it is no manifest; undefined where there is none. */
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

/** Ends a run whose shards are all there: the manifest is written last, so that a folder that has one is complete. */
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

/** failures.jsonl with exactly these; none where nothing failed. */
export async function writeFailures(output: Output, failures: readonly Failure[]): Promise<void> {
  if (failures.length === 0) return output.remove(FAILURES);
  await output.write(
    FAILURES,
    failures.map((failure) => Buffer.from(`${JSON.stringify(failure)}\n`)),
  );
}

/** skipped.jsonl: the files that the source passed over; none where there are none. */
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
