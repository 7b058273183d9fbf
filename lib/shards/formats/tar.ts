/**
 * A shard as WebDataset: per image KEY.json (id, size, grid), KEY.latents.npy and KEY.tokens.npy [N,Z]. KEY is the shard's number and the
 * row, because ids may contain dots and slashes, which have a meaning in tar names.
 */
import { Header } from 'tar';
import { UniFlowError } from '../../errors.js';
import { NPY_PREFIX, npyBegin, npyHeader, parseNpy } from '../../io/npy.js';
import { entriesIn, type TarBytes } from '../../sources/tar.js';
import type { Output } from '../output.js';
import type { PictureRecord } from '../pipeline.js';
import { STORE, type StoreType } from '../store.js';
import { storedRow, storeOf, type FilePicture, type Format, type ShardContent } from './format.js';

const BLOCK = 512;

export const tar: Format = {
  files: (content) => [{ name: content.fileOf('latents'), chunks: chunksOf(content) }],
  open: async ({ input, stem, store, widths, offsets }) => {
    const file = `${stem}.tar`;
    const ends = new Map<string, number>();
    for await (const { name, offset, size } of entriesIn(await bytesOf(input, file), undefined)) ends.set(name, offset + size);
    return async (name, row) => {
      const path = `${keyOf(stem, row)}.${name}.npy`;
      const last = ends.get(path);
      if (last === undefined) throw new Error(`no ${path}`);
      const size = ((offsets[row + 1] as number) - (offsets[row] as number)) * widths[name] * STORE[store].bytes;
      return input.read(file, { begin: last - size, end: last });
    };
  },
  openFile: async (input, name) => {
    const pictures: FilePicture[] = [];
    const begins: number[] = [];
    let [store, width]: [StoreType, number] = ['float32', 0];
    let record: Partial<PictureRecord> = {};
    for await (const { name: path, offset, size } of entriesIn(await bytesOf(input, name), undefined)) {
      const bytes = (end: number): Promise<Buffer> => input.read(name, { begin: offset, end: offset + end });
      if (path.endsWith('.json')) record = JSON.parse((await bytes(size)).toString()) as Partial<PictureRecord>;
      if (!path.endsWith('.latents.npy')) continue;
      const begin = npyBegin(path, await bytes(Math.min(size, NPY_PREFIX)));
      const { type, shape } = parseNpy(path, await bytes(begin));
      [store, width] = [storeOf('npy', type, `${name}: ${path}`), shape[1] ?? 0];
      pictures.push({ id: record.id, grid: record.grid, patches: shape[0] ?? 0 });
      begins.push(offset + begin);
      record = {};
    }
    if (pictures.length === 0) throw UniFlowError.expected('BAD_INPUT', name, 'latents (KEY.json and KEY.latents.npy)', 'none');
    const sizeOf = (row: number): number => (pictures[row] as FilePicture).patches * width * STORE[store].bytes;
    const at = (row: number): number => begins[row] as number;
    return { pictures, store, width, read: (row) => input.read(name, { begin: at(row), end: at(row) + sizeOf(row) }) };
  },
};

async function bytesOf(input: Output, name: string): Promise<TarBytes> {
  const size = (await input.size(name)) ?? BLOCK; // if the file is missing, the read reports it
  const read = (begin: number, length: number): Promise<Buffer> => input.read(name, { begin, end: begin + length });
  return { name, size, read, endsAt: (offset) => Promise.resolve(offset >= size) };
}

const keyOf = (stem: string, row: number): string => `${stem.replace(/^.*-/, '')}-${String(row).padStart(6, '0')}`;
const padded = (size: number): number => Math.ceil(size / BLOCK) * BLOCK;

async function* chunksOf(content: ShardContent): AsyncGenerator<Uint8Array> {
  const { bytes, npy } = STORE[content.store];
  for (const [i, picture] of content.pictures.entries()) {
    const key = keyOf(content.stem, i);
    yield entry(`${key}.json`, Buffer.from(JSON.stringify(picture)));
    for (const array of content.arrays) {
      const shape = [picture.grid.rows * picture.grid.cols, array.width];
      yield entry(`${key}.${array.name}.npy`, Buffer.concat([npyHeader(npy, shape), await storedRow(array, content, bytes, i)]));
    }
  }
  yield Buffer.alloc(2 * BLOCK);
}

/** An archive member without timestamp or owner, so that every run writes the same bytes. */
function entry(path: string, content: Buffer): Buffer {
  const out = Buffer.alloc(BLOCK + padded(content.length));
  new Header({ path, size: content.length, type: 'File', mode: 0o644, uid: 0, gid: 0, mtime: new Date(0) }).encode(out, 0);
  content.copy(out, BLOCK);
  return out;
}
