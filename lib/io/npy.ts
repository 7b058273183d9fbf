/** NumPy's .npy files, version 1.0: one array in C order. */
import ndarray, { type NdArray } from 'ndarray';
import { readFile } from 'node:fs/promises';
import { UniFlowError } from '../errors.js';
import { native } from '../native.js';

export type NpyType = '<f4' | '<f2' | '|u1';

const MAGIC = Buffer.from('\x93NUMPY', 'latin1');
const BYTES: Record<NpyType, number> = { '<f4': 4, '<f2': 2, '|u1': 1 };

/** Bytes that tell how long the header is. */
export const NPY_PREFIX = 10;

/** The header; its length is a multiple of 64, as in NumPy. */
export function npyHeader(type: NpyType | '<u2', shape: readonly number[]): Buffer {
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
 * Reads an array of float32, float16 (as float32) or uint8.
 * @throws UniFlowError `NOT_FOUND`, or `BAD_INPUT` for any other file.
 */
export async function readNpy(path: string): Promise<NdArray<Float32Array | Uint8Array>> {
  const bytes = await readFile(path).catch((cause: NodeJS.ErrnoException) => {
    throw new UniFlowError(cause.code === 'ENOENT' ? 'NOT_FOUND' : 'BAD_INPUT', `${path}: cannot be read: ${cause.message}`, {
      subject: path,
      cause,
    });
  });
  const begin = npyBegin(path, bytes);
  const { type, shape } = parseNpy(path, bytes.subarray(0, begin));
  if (!isNpyType(type)) throw UniFlowError.expected('BAD_INPUT', path, "float32 ('<f4'), float16 ('<f2') or uint8 ('|u1')", `'${type}'`);
  const size = shape.reduce((a, b) => a * b, 1);
  const expected = size * BYTES[type];
  if (bytes.length - begin !== expected)
    throw UniFlowError.expected('BAD_INPUT', path, `${expected} bytes for the shape [${shape.join(', ')}]`, `${bytes.length - begin}`);
  const own = new Uint8Array(bytes.subarray(begin)); // copied, because Float32Array requires an aligned buffer
  if (type === '|u1') return ndarray(own, shape);
  const values = type === '<f4' ? new Float32Array(own.buffer) : new Float32Array(size);
  if (type === '<f2') await native.restore(new Uint16Array(own.buffer), 'float16', values);
  return ndarray(values, shape);
}

function isNpyType(type: string): type is NpyType {
  return Object.hasOwn(BYTES, type);
}

/** Offset of the elements, from the first bytes of a file. @throws UniFlowError `BAD_INPUT` if it is not a .npy file. */
export function npyBegin(path: string, bytes: Buffer): number {
  if (bytes.length < NPY_PREFIX || !bytes.subarray(0, MAGIC.length).equals(MAGIC))
    throw UniFlowError.expected('BAD_INPUT', path, 'a .npy file', 'another file');
  if (bytes[6] !== 1) throw UniFlowError.expected('BAD_INPUT', path, 'a .npy file of version 1.0', `version ${bytes[6]}.${bytes[7]}`);
  return NPY_PREFIX + bytes.readUInt16LE(8);
}

/** Dtype and shape of an array, from the bytes before its elements. @throws UniFlowError `BAD_INPUT` if it is not in C order. */
export function parseNpy(path: string, head: Buffer): { type: string; shape: number[] } {
  const text = head.subarray(NPY_PREFIX).toString('latin1');
  const type = /'descr': '([^']*)'/.exec(text)?.[1];
  const dimensions = /'shape': \(([\d, ]*)\)/.exec(text)?.[1];
  if (type === undefined || dimensions === undefined || !/'fortran_order': False/.test(text))
    throw UniFlowError.expected('BAD_INPUT', path, 'an array of one type in C order', text.trim());
  return { type, shape: dimensions.split(',').flatMap((d) => (d.trim() === '' ? [] : Number(d))) };
}
