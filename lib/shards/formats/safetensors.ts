/**
 * A shard as one .safetensors: `latents`, `codes` and `tokens`, [n,N,Z], or [T,Z] if grids differ, and `grids` int32 [n,2], the rows and columns of
 * each image. The metadata are those of `uniflow encode`, so `uniflow decode` accepts a shard.
 */
import { UniFlowError } from '../../errors.js';
import { safetensorsHeader, type SafetensorsEntry } from '../../io/files.js';
import type { Grid } from '../../tensor.js';
import { labelsOf, parseIds, readLabels } from '../labels.js';
import type { Output } from '../output.js';
import { ELEMENTS } from '../store.js';
import { elementType, offsetsOf, picturesOf, shapeOf, typeOf, type Format, type ShardContent } from './format.js';

/** Maximum size of the ids in a header, because readers refuse headers above 100 MB. The list beside the shard always has the ids. */
const MAX_IDS = 90e6;

/** The ids as stored in the header; undefined if they would make it too long. */
export function idsInside(pictures: readonly { id: string }[]): string | undefined {
  const ids = JSON.stringify(pictures.map(({ id }) => id));
  return Buffer.byteLength(JSON.stringify(ids)) <= MAX_IDS ? ids : undefined;
}

export const safetensors: Format = {
  files: (content) => [{ name: content.fileOf('latents'), chunks: chunksOf(content) }],
  open: async ({ input, stem, store, widths, offsets }) => {
    const file = `${stem}.safetensors`;
    const { header, data } = await headerOf(input, file);
    return (name, row) => {
      const begin = data + (header[name] as Entry).data_offsets[0];
      const vector = widths[name] * ELEMENTS[elementType(name, store)].bytes;
      return input.read(file, { begin: begin + (offsets[row] as number) * vector, end: begin + (offsets[row + 1] as number) * vector });
    };
  },
  openFile: async (input, name) => {
    const { header, data } = await headerOf(input, name);
    const { latents, codes, grids, __metadata__: text = {} } = header as Record<string, Entry> & { __metadata__?: Record<string, string> };
    const array = latents || !codes ? 'latents' : 'codes';
    const entry = latents ?? codes;
    if (!entry) throw UniFlowError.expected('BAD_INPUT', name, "a tensor 'latents' or 'codes'", Object.keys(header).join(', ') || 'none');
    const { ids } = text; // missing if they would make the header too long; they are then beside the file
    const labels = labelsOf(name, { ...text, ...(ids === undefined ? await readLabels(input, name) : { ids: parseIds(name, ids) }) });
    const pictures = picturesOf(name, entry.shape, grids ? { ...labels, grids: await readGrids(input, name, data, grids) } : labels);
    const type = typeOf('safetensors', entry.dtype, array, `${name}: ${array}`);
    const width = entry.shape.at(-1) as number;
    const [begin, vector, offsets] = [data + entry.data_offsets[0], width * ELEMENTS[type].bytes, offsetsOf(pictures)];
    const at = (row: number): number => begin + (offsets[row] as number) * vector;
    return { array, pictures, type, width, read: (row) => input.read(name, { begin: at(row), end: at(row + 1) }) };
  },
};

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [begin: number, end: number];
}

/** @returns the header and the offset of the data. */
async function headerOf(input: Output, file: string): Promise<{ header: Record<string, Entry>; data: number }> {
  const data = 8 + Number((await input.read(file, { begin: 0, end: 8 })).readBigUInt64LE());
  const text = (await input.read(file, { begin: 8, end: data })).toString();
  try {
    return { header: JSON.parse(text) as Record<string, Entry>, data };
  } catch (cause) {
    throw UniFlowError.expected('BAD_INPUT', file, 'a .safetensors file', (cause as Error).message, cause);
  }
}

/** int32 [n,2] */
async function readGrids(input: Output, file: string, data: number, { data_offsets: [begin, end] }: Entry): Promise<Grid[]> {
  const bytes = await input.read(file, { begin: data + begin, end: data + end });
  return Array.from({ length: bytes.length / 8 }, (_, i) => ({ rows: bytes.readInt32LE(8 * i), cols: bytes.readInt32LE(8 * i + 4) }));
}

async function* chunksOf(content: ShardContent): AsyncGenerator<Uint8Array> {
  const { arrays, pictures, offsets, uniform, model } = content;
  const grids = Int32Array.from(pictures.flatMap(({ grid }) => [grid.rows, grid.cols]));
  const sizes = arrays.map(({ width, type }) => (offsets.at(-1) as number) * width * ELEMENTS[type].bytes);
  const entries: [string, SafetensorsEntry][] = [
    ['grids', { dtype: 'I32', shape: [pictures.length, 2] }], // first, so that the following arrays are aligned
    ...arrays.map((array): [string, SafetensorsEntry] => [
      array.name,
      { dtype: ELEMENTS[array.type].safetensors, shape: shapeOf(array, content) },
    ]),
  ];
  yield safetensorsHeader(entries, metadataOf());
  yield new Uint8Array(grids.buffer);
  for (const [i, { rows }] of arrays.entries()) yield* rows.chunks(sizes[i] as number);

  function metadataOf(): Record<string, string> {
    const [first] = pictures;
    const ids = idsInside(pictures);
    return { ...(ids === undefined ? {} : { ids }), ...(uniform && first ? { grid: `${first.grid.rows}x${first.grid.cols}` } : {}), model };
  }
}
