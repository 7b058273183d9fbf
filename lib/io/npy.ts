/** NumPy's .npy files, version 1.0: one array in C order. */
import ndarray, { type NdArray } from 'ndarray';
import { readFile } from 'node:fs/promises';
import { UniFlowError } from '../errors.js';

export type NpyType = '<f4' | '|u1';

const MAGIC = Buffer.from('\x93NUMPY', 'latin1');
const BYTES: Record<NpyType, number> = { '<f4': 4, '|u1': 1 };

/** The header; its length is a multiple of 64, as in NumPy. */
export function npyHeader(type: NpyType | '<f2' | '<u2', shape: readonly number[]): Buffer {
  const tuple = shape.length === 1 ? `(${shape[0]},)` : `(${shape.join(', ')})`;
  const text = `{'descr': '${type}', 'fortran_order': False, 'shape': ${tuple}, }`;
  const before = MAGIC.length + 4;
  const length = Math.ceil((before + text.length + 1) / 64) * 64 - before;
  const head = Buffer.alloc(before);
  MAGIC.copy(head);
  head.set([1, 0], MAGIC.length);
  head.writeUInt16LE(length, MAGIC.length + 2);
  return Buffer.concat([head, Buffer.from(`${text.padEnd(length - 1)}\n`, 'latin1')]);
}

/**
 * Reads an array of float32 or uint8.
 * @throws UniFlowError `NOT_FOUND`, or `BAD_INPUT` for any other file.
 */
export async function readNpy(path: string): Promise<NdArray<Float32Array | Uint8Array>> {
  const bytes = await readFile(path).catch((cause: NodeJS.ErrnoException) => {
    throw new UniFlowError(cause.code === 'ENOENT' ? 'NOT_FOUND' : 'BAD_INPUT', `${path}: cannot be read: ${cause.message}`, {
      subject: path,
      cause,
    });
  });
  const { type, shape, begin } = parseHeader(path, bytes);
  const size = shape.reduce((a, b) => a * b, 1);
  const expected = size * BYTES[type];
  if (bytes.length - begin !== expected)
    throw UniFlowError.expected('BAD_INPUT', path, `${expected} bytes for the shape [${shape.join(', ')}]`, `${bytes.length - begin}`);
  const own = new Uint8Array(bytes.subarray(begin)); // copied, because Float32Array requires an aligned buffer
  return ndarray(type === '|u1' ? own : new Float32Array(own.buffer), shape);
}

function parseHeader(path: string, bytes: Buffer): { type: NpyType; shape: number[]; begin: number } {
  if (bytes.length < 10 || !bytes.subarray(0, MAGIC.length).equals(MAGIC))
    throw UniFlowError.expected('BAD_INPUT', path, 'a .npy file', 'another file');
  if (bytes[6] !== 1) throw UniFlowError.expected('BAD_INPUT', path, 'a .npy file of version 1.0', `version ${bytes[6]}.${bytes[7]}`);
  const begin = 10 + bytes.readUInt16LE(8);
  const text = bytes.subarray(10, begin).toString('latin1');
  const type = /'descr': '([^']*)'/.exec(text)?.[1] ?? '';
  const dimensions = /'shape': \(([\d, ]*)\)/.exec(text)?.[1];
  if (!(type in BYTES) || dimensions === undefined || !/'fortran_order': False/.test(text))
    throw UniFlowError.expected('BAD_INPUT', path, "float32 ('<f4') or uint8 ('|u1') in C order", text.trim());
  return {
    type: type as NpyType,
    shape: dimensions
      .split(',')
      .filter((d) => d.trim() !== '')
      .map(Number),
    begin,
  };
}
