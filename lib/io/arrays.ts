/** Named arrays in files: written row by row, any number of rows, and read by name. */
import ndarray, { type NdArray } from 'ndarray';
import { randomUUID } from 'node:crypto';
import { open, rm, type FileHandle as File } from 'node:fs/promises';
import { UniFlowError } from '../errors.js';
import { native } from '../native.js';
import { contiguous } from '../tensor.js';
import { replaceFile, safetensorsHeader } from './files.js';
import { npyHeader } from './npy.js';

const TYPES = {
  Float32Array: { safetensors: 'F32', npy: '<f4', bytes: 4 },
  Uint8Array: { safetensors: 'U8', npy: '|u1', bytes: 1 },
} as const;

interface Spooled {
  file: File;
  type: (typeof TYPES)[keyof typeof TYPES];
  rows: number;
  /** The shape of one row. */
  row: readonly number[];
}

/**
 * Arrays that grow by rows. File formats put the number of rows first, but here it is known last. So rows wait on disk, in unnamed files that vanish with the
 * process, until the arrays are written.
 */
export class ArraySpool {
  private readonly arrays = new Map<string, Spooled>();

  /** @param beside a path in the folder of the temporary files. */
  constructor(private readonly beside: string) {}

  /** Adds rows [B, ...] to the array `name`; all rows of a name have the same shape and type. */
  async append(name: string, rows: NdArray): Promise<void> {
    const { data, shape } = contiguous(rows);
    const [count, ...row] = shape as [number, ...number[]];
    const type = TYPES[data[Symbol.toStringTag] as keyof typeof TYPES];
    const array = this.arrays.get(name) ?? { file: await namelessFile(this.beside), type, rows: 0, row };
    this.arrays.set(name, array);
    if (array.type !== type || array.row.join() !== row.join())
      throw UniFlowError.expected('BAD_INPUT', name, `rows [${array.row.join(', ')}]`, `[${row.join(', ')}]`);
    await array.file.writeFile(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    array.rows += count;
  }

  has(name: string): boolean {
    return this.arrays.has(name);
  }

  shape(name: string): number[] {
    const { rows, row } = this.get(name);
    return [rows, ...row];
  }

  /** Writes all arrays to a file that appears complete or not at all. */
  async writeSafetensors(path: string, metadata: Record<string, string>): Promise<void> {
    const entries = [...this.arrays].map(
      ([name, { type, rows, row }]) => [name, { dtype: type.safetensors, shape: [rows, ...row] }] as const,
    );
    await replaceFile(path, async (file) => {
      await file.writeFile(safetensorsHeader(entries, metadata));
      for (const array of this.arrays.values()) await copy(array.file, file);
    });
  }

  /** Writes one array to a file that appears complete or not at all. */
  async writeNpy(path: string, name: string): Promise<void> {
    const array = this.get(name);
    await replaceFile(path, async (file) => {
      await file.writeFile(npyHeader(array.type.npy, this.shape(name)));
      await copy(array.file, file);
    });
  }

  private get(name: string): Spooled {
    const array = this.arrays.get(name);
    if (!array) throw UniFlowError.expected('BAD_INPUT', 'name', [...this.arrays.keys()].join(', ') || 'rows first', name);
    return array;
  }

  async close(): Promise<void> {
    for (const { file } of this.arrays.values()) await file.close();
    this.arrays.clear();
  }
}

/** Opens an unnamed file, which disappears when it is closed, even if the process is killed. */
export async function namelessFile(beside: string): Promise<File> {
  const path = `${beside}.${randomUUID()}.tmp`;
  const file = await open(path, 'wx+');
  await rm(path);
  return file;
}

async function copy(from: File, to: File): Promise<void> {
  const chunks: AsyncIterable<Buffer> = from.createReadStream({ start: 0, autoClose: false, highWaterMark: 1 << 20 });
  for await (const chunk of chunks) await to.writeFile(chunk);
}

/** The arrays of a safetensors file, read on demand. */
export class ArrayFile {
  private readonly file: ReturnType<typeof native.openSafetensors>;

  /** @throws UniFlowError if the file is missing or damaged. */
  constructor(readonly path: string) {
    this.file = native.openSafetensors(path);
  }

  get metadata(): Record<string, string> {
    return this.file.metadata;
  }

  get names(): string[] {
    return Object.keys(this.file.tensors);
  }

  /** Reads an F32, F16 or BF16 array as float32. */
  async read(name: string): Promise<NdArray<Float32Array>> {
    const stored = this.file.tensors[name];
    if (!stored) throw UniFlowError.expected('BAD_INPUT', this.path, `a tensor '${name}'`, `${this.names.length} others`);
    if (!['F32', 'F16', 'BF16'].includes(stored.dtype))
      throw UniFlowError.expected('BAD_INPUT', `${this.path}: ${name}`, 'F32, F16 or BF16', stored.dtype);
    const tensor = native.loadParameter([{ file: this.file.handle, name }], stored.shape, 'float32', false);
    const data = new Float32Array(stored.shape.reduce((a, b) => a * b, 1));
    try {
      await tensor.read(data);
    } finally {
      tensor.dispose();
    }
    return ndarray(data, stored.shape);
  }
}
