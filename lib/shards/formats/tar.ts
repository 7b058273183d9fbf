/**
 * A shard as WebDataset: per picture KEY.json (id, size, grid) and KEY.latents.npy, KEY.tokens.npy [N,Z]. KEY is the shard's number and the row:
 * ids have dots and slashes, which mean something in names of a tar.
 */
import { Header } from 'tar';
import { npyHeader } from '../../io/npy.js';
import { STORE } from '../store.js';
import { storedRow, type Format, type ShardContent } from './format.js';

const BLOCK = 512;

export const tar: Format = {
  files: (content) => [{ name: `${content.stem}.tar`, chunks: chunksOf(content) }],
  open: async ({ input, stem, store, widths, offsets }) => {
    const file = `${stem}.tar`;
    const ends = new Map<string, number>();
    const end = (await input.size(file)) ?? BLOCK; // where there is none, reading it says so
    for (let at = 0; at + BLOCK <= end;) {
      const header = new Header(await input.read(file, { begin: at, end: at + BLOCK }));
      if (!header.cksumValid) break; // the zeros at the end, or damage
      const begin = at + BLOCK;
      ends.set(header.path as string, begin + (header.size as number));
      at = begin + padded(header.size as number);
    }
    return async (name, row) => {
      const path = `${keyOf(stem, row)}.${name}.npy`;
      const last = ends.get(path);
      if (last === undefined) throw new Error(`no ${path}`);
      const size = ((offsets[row + 1] as number) - (offsets[row] as number)) * widths[name] * STORE[store].bytes;
      return input.read(file, { begin: last - size, end: last });
    };
  },
};

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

/** A file in the archive, the same in every run: no times, no owner. */
function entry(path: string, content: Buffer): Buffer {
  const out = Buffer.alloc(BLOCK + padded(content.length));
  new Header({ path, size: content.length, type: 'File', mode: 0o644, uid: 0, gid: 0, mtime: new Date(0) }).encode(out, 0);
  content.copy(out, BLOCK);
  return out;
}
