/** Embeds images to one file: a vector and an id for each. */
import { basename, dirname, extname, join } from 'node:path';
import { checkOptions } from '../check.js';
import { embedImages, type Embedder, type EmbedOptions } from '../encoder/embed.js';
import { reasonOf, UniFlowError } from '../errors.js';
import { makeFolder } from '../io/files.js';
import { npyHeader } from '../io/npy.js';
import type { NdArray } from 'ndarray';
import type { Item } from '../sources/item.js';
import { besideOf } from './labels.js';
import type { Utilisation } from './meter.js';
import { embeddingsParquet, type Embeddings } from './embeddings-parquet.js';
import { loadParquetWriter } from './parquet-writer.js';
import { FolderOutput } from './output.js';
import { Pipeline, type PictureBatch, type PipelineOptions } from './pipeline.js';
import type { Failure } from './shard.js';
import type { ShardFile } from './formats/format.js';
import { Spool } from './spool.js';

export interface EmbeddingFileOptions extends EmbedOptions, Pick<PipelineOptions, 'download'> {
  /** Name of the model to store in the file. Default: none. */
  model?: string | undefined;
  onFailure?: ((failure: Failure) => void) | undefined;
  /** Called after each computed batch with its number of images and the utilisation of the stages. */
  onCount?: ((images: number, utilisation: () => Utilisation) => void) | undefined;
}

export interface EmbeddingFileResult {
  /** Written files, the vectors first. */
  files: string[];
  /** Number of images in the file, and length of their vectors. */
  shape: [images: number, dimensions: number];
  failures: Failure[];
}

const OPTIONS: readonly (keyof EmbeddingFileOptions)[] = [
  ...(['pool', 'normalize', 'size', 'batchSize', 'signal'] as const),
  ...(['download', 'model', 'onFailure', 'onCount'] as const),
];

/** Files of each extension. The vectors come last, so that the ids exist once they do. */
const FORMATS: Record<string, { checkInstalled?: () => Promise<unknown>; files: (name: string, embeddings: Embeddings) => ShardFile[] }> = {
  '.npy': {
    files: (name, { ids, dimensions, rows, origin }) => [
      { name: besideOf(name, '.ids.json'), chunks: [Buffer.from(`${JSON.stringify({ ids, ...origin }, null, 2)}\n`)] },
      { name, chunks: npyChunks(rows, [ids.length, dimensions]) },
    ],
  },
  '.parquet': { checkInstalled: loadParquetWriter, files: (name, all) => [{ name, chunks: embeddingsParquet(all) }] },
};

/**
 * Embeds images to one file, which appears complete or not at all: `.npy` [n,E], with the ids in `.ids.json` beside it, or `.parquet` with the columns `id` and
 * `embedding`, a list of fixed size. Images are read ahead, and those that cannot be read are skipped.
 * @throws {UniFlowError} `BAD_INPUT` if the path has another extension or cannot be written, or if no image can be read; `UNSUPPORTED` for a pool that the model
 * lacks; `ABORTED`.
 */
export async function embedToFile(
  model: Embedder,
  items: Iterable<Item> | AsyncIterable<Item>,
  path: string,
  options: EmbeddingFileOptions = {},
): Promise<EmbeddingFileResult> {
  checkOptions(options, OPTIONS);
  const { pool = model.defaultPool, normalize = true, size, batchSize, signal, download, model: name = '', onFailure, onCount } = options;
  const format = formatOf(path);
  await format.checkInstalled?.();
  const { device, preprocessing, encoder } = model;
  const run = async (pixels: { pixels: NdArray }, of: object): Promise<{ vectors: NdArray<Float32Array> }> => ({
    vectors: await embedImages(model, pixels, { pool, normalize, ...of }),
  });
  const pipeline = new Pipeline({ device, patch: encoder.config.patch, preprocessing, run }, { size, batchSize, signal, download });
  const output = new FolderOutput(dirname(path));
  await makeFolder(output.name);
  const rows = await Spool.open(output.scratch);
  const embeddings = { ids: [] as string[], dimensions: 0, rows, origin: { model: name, pool, normalized: String(normalize) } };
  const failures: Failure[] = [];
  try {
    for await (const event of pipeline.run(items)) {
      if ('error' in event) {
        const failure = { id: event.id, reason: reasonOf(event.error, event.error.subject ?? event.id) };
        failures.push(failure);
        onFailure?.(failure);
        continue;
      }
      await addRows(embeddings, event);
      onCount?.(event.pictures.length, () => pipeline.meter.read());
    }
    const { ids, dimensions } = embeddings;
    if (ids.length === 0) throw nothing(failures.length);
    const files = format.files(basename(path), embeddings);
    await pipeline.meter.write.during(async () => {
      for (const { name, chunks } of files) await output.write(name, chunks);
    });
    return { files: files.map((file) => join(dirname(path), file.name)).reverse(), shape: [ids.length, dimensions], failures };
  } finally {
    await rows.close();
  }
}

/** The images of a batch follow each other, because all images have the same grid. */
async function addRows(
  embeddings: { ids: string[]; dimensions: number; rows: Spool },
  { pictures, vectors }: PictureBatch<{ vectors: NdArray<Float32Array> }>,
): Promise<void> {
  const { data, shape } = vectors;
  embeddings.dimensions = shape[1] as number;
  for (const { row, record } of pictures) embeddings.ids[row] = record.id;
  const begin = (pictures[0] as (typeof pictures)[number]).row;
  await embeddings.rows.write(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), begin * embeddings.dimensions * 4);
}

function formatOf(path: string): (typeof FORMATS)[string] {
  const format = FORMATS[extname(path).toLowerCase()];
  if (format) return format;
  throw UniFlowError.expected('BAD_INPUT', 'out', `a name ending in ${Object.keys(FORMATS).join(', ')}`, `'${path}'`);
}

function nothing(failed: number): UniFlowError {
  return new UniFlowError('BAD_INPUT', `nothing is written: no image could be read${failed > 0 ? ` (${failed} failed)` : ''}`);
}

async function* npyChunks(rows: Spool, shape: [number, number]): AsyncGenerator<Uint8Array> {
  yield npyHeader('<f4', shape);
  yield* rows.chunks(4 * shape[0] * shape[1]);
}
