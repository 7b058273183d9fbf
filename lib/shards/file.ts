/** Encodes images to one file of latents: a run of one shard, without a manifest. */
import { basename, dirname, join } from 'node:path';
import { UniFlowError } from '../errors.js';
import { makeFolder } from '../io/files.js';
import type { Item } from '../sources/item.js';
import type { Grid } from '../tensor.js';
import type { UniFlow } from '../uniflow.js';
import { shapeOf, type Layout, type ShardContent, type ShardFile } from './formats/format.js';
import { hasCodes } from './formats/npy.js';
import { idsInside } from './formats/safetensors.js';
import { besideOf } from './labels.js';
import { formatOfFile } from './latents.js';
import type { Utilisation } from './meter.js';
import { FolderOutput } from './output.js';
import { ShardEncoder, type EncodeShardOptions, type ShardOptions, type ShardRecord } from './shard.js';

export interface FileOptions extends Omit<ShardOptions, 'format'>, Pick<EncodeShardOptions, 'signal' | 'onFailure'> {
  /** Called after each computed batch with its number of images and the utilisation of the stages. */
  onCount?: ((pictures: number, utilisation: () => Utilisation) => void) | undefined;
}

export interface FileResult {
  /** Written files, the latents first. */
  files: string[];
  /** Shape of the latents; without them, of the codes or else of the tokens. */
  shape: number[];
  /** Grid of all images; undefined if they differ. */
  grid: Grid | undefined;
  record: ShardRecord;
}

/**
 * Encodes images into one file, which appears complete or not at all: `.safetensors`, `.npy` (with the ids in `.ids.json` and tokens in
 * `.tokens.npy` beside it), `.tar` or `.parquet`. Images that cannot be read are skipped.
 * @throws {UniFlowError} `BAD_INPUT` if the path has another extension or cannot be written, or if no image can be read; `ABORTED`.
 */
export async function encodeToFile(
  uniflow: UniFlow,
  items: Iterable<Item> | AsyncIterable<Item>,
  path: string,
  { signal, onFailure, onCount, ...options }: FileOptions = {},
): Promise<FileResult> {
  const format = formatOfFile(path, 'out');
  const encoder = new ShardEncoder(uniflow, { ...options, format });
  if (format === 'npy') checkNpyName(path, encoder);
  const { meter } = encoder.pipeline;
  const output = new FolderOutput(dirname(path));
  await makeFolder(output.name);
  const layout = new FileLayout(basename(path));
  const record = await encoder.encode(0, items, output, {
    ...{ signal, layout, onFailure },
    onCount: (pictures) => onCount?.(pictures, () => meter.read()),
  });
  const { content } = layout;
  if (!content) {
    const failed = record.failures.length > 0 ? ` (${record.failures.length} failed)` : '';
    throw new UniFlowError('BAD_INPUT', `nothing is written: no image could be read${failed}`);
  }
  if (format === 'npy' && !content.arrays.some(({ name }) => name === 'tokens')) await output.remove(layout.fileOf('tokens')); // left over from other latents
  const labels = (name: string): number => Number(name.endsWith('.ids.json'));
  const names = record.files.map(({ name }) => name).sort((a, b) => labels(a) - labels(b));
  return {
    files: names.map((name) => join(dirname(path), name)),
    shape: shapeOf(content.arrays[0] as ShardContent['arrays'][number], content),
    grid: content.uniform ? content.pictures[0]?.grid : undefined,
    record,
  };
}

/** Codes and the bits of bfloat16 are both uint16 in a .npy: its name tells them apart. */
function checkNpyName(path: string, { arrays: [first] }: ShardEncoder): void {
  if (hasCodes(path) === (first === 'codes')) return;
  const [expected, actual] = first === 'codes' ? ['a name ending in .codes.npy', 'codes'] : ['a name not ending in .codes.npy', `${first}`];
  throw UniFlowError.expected('BAD_INPUT', 'out', `${expected} for ${actual}`, `'${path}'`);
}

/** A file under its own name, with the ids in a second file if its format cannot hold them. */
class FileLayout implements Layout {
  content: ShardContent | undefined;

  constructor(private readonly name: string) {}

  readonly fileOf: Layout['fileOf'] = (array) =>
    array === 'latents' || !/\.npy$/i.test(this.name) || (array === 'codes' && hasCodes(this.name))
      ? this.name
      : besideOf(this.name, `.${array}.npy`);

  readonly filesOf: Layout['filesOf'] = (files, content) => {
    this.content = content;
    return [...this.labels(content), ...files]; // written first, so that the labels exist once the latents do
  };

  private labels({ pictures, uniform, model }: ShardContent): ShardFile[] {
    if (/\.(tar|parquet)$/i.test(this.name) || (/\.safetensors$/i.test(this.name) && idsInside(pictures) !== undefined)) return [];
    const { rows, cols } = (pictures[0] as ShardContent['pictures'][number]).grid;
    const grids = uniform ? { grid: `${rows}x${cols}` } : { grids: pictures.map(({ grid }) => grid) };
    const text = JSON.stringify({ ids: pictures.map(({ id }) => id), ...grids, model }, null, 2);
    return [{ name: besideOf(this.name, '.ids.json'), chunks: [Buffer.from(`${text}\n`)] }];
  }
}
