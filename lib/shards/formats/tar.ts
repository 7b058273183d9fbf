/**
 * A shard as WebDataset: per image KEY.json (id, size, grid), KEY.latents.npy, KEY.codes.npy and KEY.tokens.npy [N,Z]. KEY is the shard's number and the
 * row, because ids may contain dots and slashes, which have a meaning in tar names.
 */
import { Header } from 'tar';
import { UniFlowError } from '../../errors.js';
import { NPY_PREFIX, npyBegin, npyHeader, parseNpy } from '../../io/npy.js';
import { entriesIn, type TarBytes } from '../../sources/tar.js';
import type { Output } from '../output.js';
import type { PictureRecord } from '../pipeline.js';
import { ELEMENTS, type ElementType } from '../store.js';
import { elementType, storedRow, typeOf, type FilePicture, type Format, type LatentsName, type ShardContent } from './format.js';

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
      const size = ((offsets[row + 1] as number) - (offsets[row] as number)) * widths[name] * ELEMENTS[elementType(name, store)].bytes;
      return input.read(file, { begin: last - size, end: last });
    };
  },
  openFile: async (input, name) => {
    const pictures: FilePicture[] = [];
    const begins: number[] = [];
    let [type, width]: [ElementType, number] = ['float32', 0];
    let array: LatentsName | undefined;
    let record: Partial<PictureRecord> = {};
    for await (const { name: path, offset, size } of entriesIn(await bytesOf(input, name), undefined)) {
      const bytes = (end: number): Promise<Buffer> => input.read(name, { begin: offset, end: offset + end });
      if (path.endsWith('.json')) record = JSON.parse((await bytes(size)).toString()) as Partial<PictureRecord>;
      const member = /\.(latents|codes)\.npy$/.exec(path)?.[1] as LatentsName | undefined;
      if (member === undefined || member !== (array ??= member)) continue;
      const begin = npyBegin(path, await bytes(Math.min(size, NPY_PREFIX)));
      const { type: dtype, shape } = parseNpy(path, await bytes(begin));
      [type, width] = [typeOf('npy', dtype, member, `${name}: ${path}`), shape[1] ?? 0];
      pictures.push({ id: record.id, grid: record.grid, patches: shape[0] ?? 0 });
      begins.push(offset + begin);
      record = {};
    }
    if (array === undefined)
      throw UniFlowError.expected('BAD_INPUT', name, 'latents (KEY.json and KEY.latents.npy) or codes (KEY.codes.npy)', 'none');
    const sizeOf = (row: number): number => (pictures[row] as FilePicture).patches * width * ELEMENTS[type].bytes;
    const at = (row: number): number => begins[row] as number;
    return { array, pictures, type, width, read: (row) => input.read(name, { begin: at(row), end: at(row) + sizeOf(row) }) };
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
  for (const [i, picture] of content.pictures.entries()) {
    const key = keyOf(content.stem, i);
    yield entry(`${key}.json`, Buffer.from(JSON.stringify(picture)));
    for (const array of content.arrays) {
      const shape = [picture.grid.rows * picture.grid.cols, array.width];
      yield entry(
        `${key}.${array.name}.npy`,
        Buffer.concat([npyHeader(ELEMENTS[array.type].npy, shape), await storedRow(array, content, i)]),
      );
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
