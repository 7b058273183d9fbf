/** Named arrays in safetensors files, read by name. */
import ndarray, { type NdArray } from 'ndarray';
import { UniFlowError } from '../errors.js';
import { native } from '../native.js';

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
