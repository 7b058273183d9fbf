/** Checkpoint folders in the Hugging Face layout: config.json, model.safetensors (or shards with an index). */
import { type FileHandle as File } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { checkOptions, describe } from '../check.js';
import { checkFloatType, type Placement } from '../device.js';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { type FileHandle, type FloatType, native, type ParameterPart, type TensorHandle, type WeightType } from '../native.js';
import { ParameterSource, type Parameter, type Part } from '../parameters.js';
import { onDevice, tensorOf, type Tensor } from '../tensor.js';
import { makeFolder, pathExists, replaceFiles, safetensorsHeader, type Replacement, type SafetensorsEntry } from './files.js';
import { otherWeightsIn, refuseForeign } from './foreign.js';
import { readJson } from './json.js';

interface Stored {
  file: FileHandle;
  dtype: string;
  shape: number[];
}

/** A tensor that the model does not use, kept for {@link saveCheckpoint}: a pooling head, a mask token. */
export interface Carried extends Stored {
  /** Name in its file. */
  stored: string;
  /** Name under which the model saves it. */
  name: string;
}

/** The tensors of a checkpoint folder by name, read on demand. */
export class Checkpoint {
  private constructor(
    readonly path: string,
    readonly config: Record<string, unknown>,
    readonly tensors: ReadonlyMap<string, Stored>,
    readonly metadata: Readonly<Record<string, string>>,
  ) {}

  static async open(dir: string): Promise<Checkpoint> {
    const config = await readJson(join(dir, 'config.json'));
    const tensors = new Map<string, Stored>();
    const metadata: Record<string, string> = {};
    for (const name of await weightFiles(dir)) {
      const file = await openWeights(join(dir, name));
      Object.assign(metadata, file.metadata);
      for (const [key, { dtype, shape }] of Object.entries(file.tensors)) {
        if (tensors.has(key)) throw new UniFlowError('BAD_CHECKPOINT', `${dir}: the tensor ${key} is in several files`, { subject: key });
        tensors.set(key, { file: file.handle, dtype, shape });
      }
    }
    return new Checkpoint(dir, config, tensors, metadata);
  }

  /** Whether weights are stored as int8. */
  get quantized(): boolean {
    return [...this.tensors.values()].some(({ dtype }) => dtype === 'I8');
  }

  /**
   * The prefix of a model's tensor names, found through its tensor `marker`: nothing, a larger model's name for it, or a remnant of training wrappers
   * (`module.`, `_orig_mod.`). If several models match, the first of `preferred` is taken.
   */
  prefixOf(marker: string, preferred: readonly string[] = ['']): string | undefined {
    const found = [...this.tensors.keys()]
      .filter((name) => name === marker || name.endsWith(`.${marker}`))
      .map((name) => name.slice(0, name.length - marker.length));
    return preferred.find((prefix) => found.includes(prefix)) ?? (found.length === 1 ? found[0] : undefined);
  }
}

async function openWeights(path: string): Promise<ReturnType<typeof native.openSafetensors>> {
  try {
    return native.openSafetensors(path);
  } catch (error) {
    await refuseForeign(path);
    throw error;
  }
}

/** `model.safetensors`, or the shards named by its index. */
async function weightFiles(dir: string): Promise<string[]> {
  const exists = (name: string): Promise<boolean> => pathExists(join(dir, name));
  if (await exists('model.safetensors')) return ['model.safetensors'];
  if (!(await exists('model.safetensors.index.json')))
    throw UniFlowError.expected(
      'BAD_CHECKPOINT',
      dir,
      'model.safetensors or model.safetensors.index.json',
      `neither${await otherWeightsIn(dir)}`,
    );
  const index = await readJson(join(dir, 'model.safetensors.index.json'));
  const map = index['weight_map'];
  if (typeof map !== 'object' || map === null || Array.isArray(map) || Object.keys(map).length === 0)
    throw UniFlowError.expected('BAD_CHECKPOINT', `${dir}: weight_map`, 'an object of tensor and file names', describe(map));
  const files = [...new Set(Object.values(map as Record<string, unknown>))];
  for (const file of files)
    if (typeof file !== 'string' || basename(file) !== file)
      throw UniFlowError.expected('BAD_CHECKPOINT', 'weight_map', 'file names', JSON.stringify(file));
  return files as string[];
}

/** Parameters read from a checkpoint. Request all of them, then call {@link finish}, which reports all mismatches at once. */
export class CheckpointSource extends ParameterSource {
  private readonly used = new Set<string>();
  private readonly missing: string[] = [];
  private readonly misfits: string[] = [];

  /** @param under prefix of all of this model's names in this checkpoint (`vision_model.`). */
  constructor(
    private readonly checkpoint: Checkpoint,
    placement: Placement,
    private readonly under = '',
  ) {
    super(placement);
  }

  protected make(parts: readonly Part[], shape: readonly number[], dtype: WeightType, packed: boolean): Tensor {
    const before = this.missing.length + this.misfits.length;
    const stored = parts.map((part) => this.locate(part));
    if (this.missing.length + this.misfits.length > before) return tensorOf(native.constantParameter([0], 0)); // finish() will throw
    const int8 = packed && this.placement.int8 && parts.every(({ name }) => this.checkpoint.tensors.get(this.under + name)?.dtype === 'I8');
    return tensorOf(native.loadParameter(stored as ParameterPart[], shape, int8 ? 'int8' : dtype, packed));
  }

  private locate(part: Part): ParameterPart | undefined {
    if (part.absent) return { rows: part.shape[0] as number };
    const name = this.under + part.name;
    const found = this.checkpoint.tensors.get(name);
    this.used.add(name);
    if (!found) this.missing.push(name);
    else if (!['F32', 'F16', 'BF16', 'I8'].includes(found.dtype))
      this.misfits.push(`${name}: expected F32, F16, BF16 or I8, but got ${found.dtype}`);
    else if (found.shape.join() !== part.shape.join())
      this.misfits.push(`${name}: expected shape [${part.shape.join(', ')}], but got [${found.shape.join(', ')}]`);
    else if (found.dtype !== 'I8' || this.hasScales(name, part.shape[0] as number)) return { file: found.file, name };
    return undefined;
  }

  /** Whether the scales of an int8 tensor's rows are beside it. */
  private hasScales(name: string, rows: number): boolean {
    const scales = `${name}${SCALE}`;
    const found = this.checkpoint.tensors.get(scales);
    this.used.add(scales);
    if (found?.dtype === 'F32' && elements(found.shape) === rows) return true;
    const actual = found ? `${found.dtype} [${found.shape.join(', ')}]` : 'none';
    this.misfits.push(`${scales}: expected F32 [${rows}], the scales of an int8 tensor's rows, but got ${actual}`);
    return false;
  }

  /**
   * Waits for the loading. Throws BAD_CHECKPOINT listing every missing, misshapen and unexpected tensor.
   * @returns unused tensors: those without elements (no registers), and those that match `unused`.
   */
  async finish(unused?: RegExp): Promise<Carried[]> {
    const rest = [...this.checkpoint.tensors]
      .filter(([stored]) => !this.used.has(stored) && stored.startsWith(this.under))
      .map(([stored, tensor]): Carried => ({ ...tensor, stored, name: stored.slice(this.under.length) }));
    const carried = rest.filter(({ name, shape }) => shape.includes(0) || unused?.test(name));
    const problems = [
      ...this.misfits,
      ...this.missing.map((name) => `${name}: missing`),
      ...rest.filter((tensor) => !carried.includes(tensor)).map(({ stored }) => `${stored}: unexpected`),
    ];
    if (problems.length > 0) {
      for (const { tensor } of this.parameters) tensor.dispose();
      await onDevice(this.placement.device, () => native.synchronize()); // queued loads have been freed as well
      throw new UniFlowError('BAD_CHECKPOINT', `${this.checkpoint.path} does not fit its config.json:\n  ${problems.join('\n  ')}`, {
        subject: this.checkpoint.path,
        actual: problems.join('; '),
      });
    }
    await native.synchronize(this.parameters.map((p) => p.tensor.handle));
    return carried;
  }
}

// ----- writing --------------------------------------------------------------------------------------------------

/** Appended to an int8 tensor's name: the tensor of its rows' scales. */
const SCALE = '_scale';
/** Whether a tensor is the scales of an int8 one. */
export const isScale = (name: string): boolean => name.endsWith(`.weight${SCALE}`);

const STORED = { float32: { name: 'F32', bytes: 4 }, bfloat16: { name: 'BF16', bytes: 2 }, int8: { name: 'I8', bytes: 1 } } as const;

export interface SaveOptions {
  /** Type of the weight matrices that are not int8; vectors and position tables are always saved as float32. Default: the model's own. */
  dtype?: FloatType;
  signal?: AbortSignal;
}

/** Checks the options of a model's save(). */
export function saveOptions(options: SaveOptions, own: FloatType): { dtype: FloatType; signal: AbortSignal | undefined } {
  checkOptions(options);
  const { dtype = own, signal } = options;
  checkFloatType(dtype);
  return { dtype, signal };
}

/** `config.json` with the saved element type, in both spellings if it had both. */
export function withDtype(json: Record<string, unknown>, dtype: FloatType, spelling: 'dtype' | 'torch_dtype'): Record<string, unknown> {
  const spellings = ['dtype', 'torch_dtype'].filter((name) => name === spelling || name in json);
  return { ...json, ...Object.fromEntries(spellings.map((name) => [name, dtype])) };
}

export interface SavedModel {
  /** The other files' texts by name. */
  files: Record<string, string>;
  parameters: readonly Parameter[];
  carried?: readonly Carried[];
  /** For the header of the weights. */
  metadata?: Record<string, string>;
}

/** Writes model.safetensors and the other files; they get their names only when all are complete. */
export async function saveCheckpoint(
  dir: string,
  { files, parameters, carried = [], metadata = {} }: SavedModel,
  { dtype, signal }: { dtype: FloatType; signal: AbortSignal | undefined },
): Promise<void> {
  if (parameters.some(({ tensor }) => tensor.dtype === 'float8'))
    throw new UniFlowError('UNSUPPORTED', 'save: the weights were rounded to float8; load the model without float8 to save it', {
      subject: 'float8',
    });
  try {
    await makeFolder(dir);
    await replaceFiles([
      ...Object.entries(files).map(([name, text]): Replacement => ({ path: join(dir, name), write: (file) => file.writeFile(text) })),
      { path: join(dir, 'model.safetensors'), write: (file) => writeSafetensors(file, { parameters, carried, metadata }, dtype, signal) },
    ]);
  } catch (cause) {
    if (cause instanceof UniFlowError) throw cause;
    throw new UniFlowError('BAD_INPUT', `${dir} cannot be written: ${(cause as Error).message}`, { subject: dir, cause });
  }
}

const elements = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** Values of one parameter in C order, and the tensors that they are stored as; absent parts are skipped. */
interface Values {
  read: () => Promise<Uint8Array>;
  parts: readonly { name: string; dtype: keyof typeof STORED; shape: readonly number[]; absent: boolean }[];
}

function valuesOf({ tensor, parts, matrix }: Parameter, dtype: FloatType): Values[] {
  const type = tensor.dtype === 'int8' ? 'int8' : matrix ? dtype : 'float32';
  const values: Values = {
    read: () => valueBytes(tensor.handle, type),
    parts: parts.map(({ name, shape, absent = false }) => ({ name, dtype: type, shape, absent })),
  };
  if (type !== 'int8') return [values];
  const scales: Values = {
    read: () => readBytes(native.parameterScales(tensor.handle)),
    parts: parts.map(({ name, shape, absent = false }) => ({ name: name + SCALE, dtype: 'float32', shape: shape.slice(0, 1), absent })),
  };
  return [scales, values];
}

async function writeSafetensors(
  file: File,
  { parameters, carried, metadata }: Required<Omit<SavedModel, 'files'>>,
  dtype: FloatType,
  signal?: AbortSignal,
): Promise<void> {
  const all = parameters.flatMap((parameter) => valuesOf(parameter, dtype));
  const isInt8 = ({ parts }: Values): boolean => parts[0]?.dtype === 'int8';
  const values = [...all.filter((v) => !isInt8(v)), ...all.filter(isInt8)]; // single bytes last, so that the others are aligned
  const entries = values.flatMap(({ parts }) =>
    parts
      .filter(({ absent }) => !absent)
      .map(({ name, dtype, shape }): [string, SafetensorsEntry] => [name, { dtype: STORED[dtype].name, shape }]),
  );
  const others = carried.map((tensor) => ({ ...tensor, bytes: native.tensorBytes(tensor.file, tensor.stored) }));
  for (const { name, dtype, shape, bytes } of others)
    entries.push([name, { dtype: dtype as SafetensorsEntry['dtype'], shape, bytes: bytes.length }]);
  await file.writeFile(safetensorsHeader(entries, { format: 'pt', ...metadata }));
  for (const { read, parts } of values) {
    throwIfAborted(signal);
    const bytes = await read();
    let at = 0;
    for (const { dtype, shape, absent } of parts) {
      const size = elements(shape) * STORED[dtype].bytes;
      if (!absent) await file.writeFile(bytes.subarray(at, at + size));
      at += size;
    }
  }
  for (const { bytes } of others) await file.writeFile(bytes);
}

/** A tensor's values in C order, as stored in a file. */
export async function valueBytes(tensor: TensorHandle, dtype: FloatType | 'int8'): Promise<Uint8Array> {
  return readBytes(native.parameterBytes(tensor, dtype));
}

/** Reads a uint8 or float32 tensor, and disposes of it. */
async function readBytes(tensor: TensorHandle): Promise<Uint8Array> {
  const size = tensor.shape[0] as number;
  const out = tensor.dtype === 'float32' ? new Float32Array(size) : new Uint8Array(size);
  await tensor.read(out);
  tensor.dispose();
  return new Uint8Array(out.buffer);
}
