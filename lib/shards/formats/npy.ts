/**
 * A shard as one .npy per array: [n,N,Z], or [T,Z] if grids differ. bfloat16 is stored as the uint16 of its bits, so a file of codes has to be named
 * `*.codes.npy`.
 */
import { UniFlowError } from '../../errors.js';
import { NPY_PREFIX, npyBegin, npyHeader, parseNpy } from '../../io/npy.js';
import { labelsOf, readLabels } from '../labels.js';
import type { Output } from '../output.js';
import { ELEMENTS } from '../store.js';
import { elementType, offsetsOf, picturesOf, shapeOf, typeOf, type Format, type ShardArray, type ShardContent } from './format.js';

export const npy: Format = {
  files: (content) => content.arrays.map((array) => ({ name: content.fileOf(array.name), chunks: chunksOf(array, content) })),
  open: ({ input, stem, store, widths, offsets }) => {
    const begins = new Map<string, Promise<number>>();
    return Promise.resolve(async (name, row) => {
      const file = `${stem}.${name}.npy`;
      if (!begins.has(file)) begins.set(file, beginOf(input, file));
      const begin = await (begins.get(file) as Promise<number>);
      const vector = widths[name] * ELEMENTS[elementType(name, store)].bytes;
      return input.read(file, { begin: begin + (offsets[row] as number) * vector, end: begin + (offsets[row + 1] as number) * vector });
    });
  },
  openFile: async (input, name) => {
    const begin = await beginOf(input, name);
    const { type: dtype, shape } = parseNpy(name, await input.read(name, { begin: 0, end: begin }));
    const array = hasCodes(name) ? 'codes' : 'latents';
    const type = typeOf('npy', dtype, array, name);
    const pictures = picturesOf(name, shape, labelsOf(name, (await readLabels(input, name)) ?? {}));
    const width = shape.at(-1) as number;
    const [vector, offsets] = [width * ELEMENTS[type].bytes, offsetsOf(pictures)];
    const at = (row: number): number => begin + (offsets[row] as number) * vector;
    const [size, end] = [await input.size(name), at(pictures.length)];
    if (size !== end) throw UniFlowError.expected('BAD_INPUT', name, `${end} bytes for the shape [${shape.join(', ')}]`, `${size}`);
    return { array, pictures, type, width, read: (row) => input.read(name, { begin: at(row), end: at(row + 1) }) };
  },
};

/** Whether a .npy has codes, by its name. */
export function hasCodes(name: string): boolean {
  return /\.codes\.npy$/i.test(name);
}

/** Offset of the elements. */
async function beginOf(input: Output, name: string): Promise<number> {
  return npyBegin(name, await input.read(name, { begin: 0, end: NPY_PREFIX }));
}

async function* chunksOf(array: ShardArray, content: ShardContent): AsyncGenerator<Uint8Array> {
  const { bytes, npy: type } = ELEMENTS[array.type];
  yield npyHeader(type, shapeOf(array, content));
  yield* array.rows.chunks((content.offsets.at(-1) as number) * array.width * bytes);
}
