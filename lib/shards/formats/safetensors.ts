/**
 * A shard as one .safetensors: `latents` and `tokens`, [n,N,Z] or with grids of their own [T,Z], and `grids` int32 [n,2], the rows and columns of
 * each picture. The metadata are those of `uniflow encode`: `uniflow decode` takes a shard.
 */
import { safetensorsHeader, type SafetensorsEntry } from '../../io/files.js';
import { STORE } from '../store.js';
import { shapeOf, type Format, type ShardContent } from './format.js';

/** Bytes of ids in a header: readers refuse one of more than 100 MB. The list beside the shard has the ids in any case. */
const MAX_IDS = 90e6;

export const safetensors: Format = {
  files: (content) => [{ name: `${content.stem}.safetensors`, chunks: chunksOf(content) }],
  open: async ({ input, stem, store, widths, offsets }) => {
    const file = `${stem}.safetensors`;
    const length = Number((await input.read(file, { begin: 0, end: 8 })).readBigUInt64LE());
    const header = JSON.parse((await input.read(file, { begin: 8, end: 8 + length })).toString()) as Record<string, Entry>;
    return (name, row) => {
      const begin = 8 + length + (header[name] as Entry).data_offsets[0];
      const vector = widths[name] * STORE[store].bytes;
      return input.read(file, { begin: begin + (offsets[row] as number) * vector, end: begin + (offsets[row + 1] as number) * vector });
    };
  },
};

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [begin: number, end: number];
}

async function* chunksOf(content: ShardContent): AsyncGenerator<Uint8Array> {
  const { arrays, pictures, store, offsets, uniform, model } = content;
  const grids = Int32Array.from(pictures.flatMap(({ grid }) => [grid.rows, grid.cols]));
  const { bytes, safetensors: dtype } = STORE[store];
  const sizes = arrays.map(({ width }) => (offsets.at(-1) as number) * width * bytes);
  const entries: [string, SafetensorsEntry][] = [
    ['grids', { dtype: 'I32', shape: [pictures.length, 2] }], // in front, so that what follows is aligned
    ...arrays.map((array): [string, SafetensorsEntry] => [array.name, { dtype, shape: shapeOf(array, content) }]),
  ];
  yield safetensorsHeader(entries, metadataOf());
  yield new Uint8Array(grids.buffer);
  for (const [i, { rows }] of arrays.entries()) yield* rows.chunks(sizes[i] as number);

  function metadataOf(): Record<string, string> {
    const [first] = pictures;
    const ids = JSON.stringify(pictures.map(({ id }) => id));
    const fits = Buffer.byteLength(JSON.stringify(ids)) <= MAX_IDS;
    return { ...(fits ? { ids } : {}), ...(uniform && first ? { grid: `${first.grid.rows}x${first.grid.cols}` } : {}), model };
  }
}
