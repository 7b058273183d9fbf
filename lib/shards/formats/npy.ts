/** A shard as one .npy per array: [n,N,Z], or [T,Z] if grids differ. bfloat16 is stored as the uint16 of its bits. */
import { UniFlowError } from '../../errors.js';
import { NPY_PREFIX, npyBegin, npyHeader, parseNpy } from '../../io/npy.js';
import { labelsOf, readLabels } from '../labels.js';
import type { Output } from '../output.js';
import { STORE } from '../store.js';
import { offsetsOf, picturesOf, shapeOf, storeOf, type Format, type ShardArray, type ShardContent } from './format.js';

export const npy: Format = {
  files: (content) => content.arrays.map((array) => ({ name: content.fileOf(array.name), chunks: chunksOf(array, content) })),
  open: ({ input, stem, store, widths, offsets }) => {
    const begins = new Map<string, Promise<number>>();
    return Promise.resolve(async (name, row) => {
      const file = `${stem}.${name}.npy`;
      if (!begins.has(file)) begins.set(file, beginOf(input, file));
      const begin = await (begins.get(file) as Promise<number>);
      const vector = widths[name] * STORE[store].bytes;
      return input.read(file, { begin: begin + (offsets[row] as number) * vector, end: begin + (offsets[row + 1] as number) * vector });
    });
  },
  openFile: async (input, name) => {
    const begin = await beginOf(input, name);
    const { type, shape } = parseNpy(name, await input.read(name, { begin: 0, end: begin }));
    const store = storeOf('npy', type, name);
    const pictures = picturesOf(name, shape, labelsOf(name, (await readLabels(input, name)) ?? {}));
    const width = shape.at(-1) as number;
    const [vector, offsets] = [width * STORE[store].bytes, offsetsOf(pictures)];
    const at = (row: number): number => begin + (offsets[row] as number) * vector;
    const [size, end] = [await input.size(name), at(pictures.length)];
    if (size !== end) throw UniFlowError.expected('BAD_INPUT', name, `${end} bytes for the shape [${shape.join(', ')}]`, `${size}`);
    return { pictures, store, width, read: (row) => input.read(name, { begin: at(row), end: at(row + 1) }) };
  },
};

/** Offset of the elements. */
async function beginOf(input: Output, name: string): Promise<number> {
  return npyBegin(name, await input.read(name, { begin: 0, end: NPY_PREFIX }));
}

async function* chunksOf(array: ShardArray, content: ShardContent): AsyncGenerator<Uint8Array> {
  const { bytes, npy: type } = STORE[content.store];
  yield npyHeader(type, shapeOf(array, content));
  yield* array.rows.chunks((content.offsets.at(-1) as number) * array.width * bytes);
}
