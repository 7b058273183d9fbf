/** Handles of native arrays, and the scopes that dispose of them. The operations are in ops.ts. */
import ndarray, { type NdArray } from 'ndarray';
import { describe } from './check.js';
import { aborted, throwIfAborted, UniFlowError } from './errors.js';
import { native, type CancelToken, type DType, type TensorHandle } from './native.js';

/**
 * A dense array on the device, in C order. Its value may not have been computed yet: operations are queued on the device's stream and run in order.
 *
 * Dispose of a tensor as soon as no further operation needs it ({@link tidy} does this for a whole function); queued operations keep their inputs alive. The
 * garbage collector is only a safety net.
 */
export class Tensor {
  private current: TensorHandle;

  constructor(handle: TensorHandle) {
    this.current = handle;
  }

  /** @internal The native handle. */
  get handle(): TensorHandle {
    return this.current;
  }

  /** @internal Replaces the value for everyone who holds this tensor; training updates a model's parameters this way. */
  assign(handle: TensorHandle): void {
    this.current.dispose();
    this.current = handle;
  }

  /** A copy of a host array, made before this returns. `Uint16Array` holds bfloat16 bits. */
  static from(array: NdArray | { data: HostData; shape: readonly number[] }, name = 'array'): Tensor {
    if (typeof array !== 'object' || array === null) throw UniFlowError.expected('BAD_INPUT', name, 'an ndarray', describe(array));
    const { data, shape } = 'stride' in array ? contiguous(array, name) : array;
    return track(new Tensor(native.fromHost(data, shape)));
  }

  get shape(): number[] {
    return this.handle.shape;
  }
  get dtype(): DType {
    return this.handle.dtype;
  }
  /** Whether it is a linear weight in the layout for fast products. */
  get packed(): boolean {
    return this.handle.packed;
  }
  /** `'cpu'`, `'cuda:0'`. */
  get device(): string {
    return this.handle.device;
  }
  get disposed(): boolean {
    return this.handle.disposed;
  }

  /** Size of dimension `i`; negative values count from the end. */
  dim(i: number): number {
    return this.shape.at(i) as number;
  }

  /** The same elements with another shape. */
  reshape(shape: readonly number[]): Tensor {
    return track(new Tensor(this.handle.reshape(shape)));
  }

  /** Rows [begin, end) of the first dimension; shares the memory. */
  slice(begin: number, end: number): Tensor {
    return track(new Tensor(this.handle.slice(begin, end)));
  }

  /** Waits for the value and copies it to the host; bfloat16 is returned as float32. */
  async read(): Promise<NdArray<Float32Array | Uint8Array | Int32Array>> {
    const shape = this.shape;
    const size = shape.reduce((a, b) => a * b, 1);
    const data = this.dtype === 'uint8' ? new Uint8Array(size) : this.dtype === 'int32' ? new Int32Array(size) : new Float32Array(size);
    await this.handle.read(data);
    return ndarray(data, shape);
  }

  /** Drops this reference; the memory returns to the pool after the last queued use. */
  dispose(): void {
    this.handle.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}

type HostData = Float32Array | Uint8Array | Int32Array | Uint16Array;

/** The array's elements in C order: the same data if they already are, else a copy. */
export function contiguous(array: NdArray, name = 'array'): { data: HostData; shape: number[] } {
  const data = array.data as unknown;
  if (!(ArrayBuffer.isView(data) && ['Float32Array', 'Uint8Array', 'Int32Array', 'Uint16Array'].includes(tagOf(data))))
    throw UniFlowError.expected('BAD_INPUT', name, 'an ndarray over a Float32Array, Uint8Array, Int32Array or Uint16Array', tagOf(data));
  const host = data as HostData;
  const shape = array.shape;
  const size = shape.reduce((a, b) => a * b, 1);
  checkExtent(array, host.length, name);
  let expected = 1;
  let inOrder = true;
  for (let i = shape.length - 1; i >= 0; i--) {
    if (shape[i] !== 1 && array.stride[i] !== expected) inOrder = false;
    expected *= shape[i] as number;
  }
  if (inOrder) return { data: host.subarray(array.offset, array.offset + size), shape };
  const out = new (host.constructor as new (n: number) => HostData)(size);
  const last = ndarray(out, shape);
  copyInto(last, array);
  return { data: out, shape };
}

/** Checks that all elements are inside the data. A transferred ArrayBuffer has none. */
function checkExtent({ shape, stride, offset, size }: NdArray, length: number, name: string): void {
  if (size === 0) return;
  const steps = shape.map((n, i) => (n - 1) * (stride[i] as number));
  const first = steps.reduce((at, step) => at + Math.min(0, step), offset);
  const last = steps.reduce((at, step) => at + Math.max(0, step), offset);
  if (first >= 0 && last < length) return;
  const found = length === 0 ? 'none (was its ArrayBuffer transferred?)' : String(length);
  throw UniFlowError.expected('BAD_INPUT', name, `data of at least ${last + 1} elements for [${shape.join(', ')}]`, found);
}

/** The slow path of {@link contiguous}: copies a transposed or strided view element by element. */
function copyInto(to: NdArray, from: NdArray): void {
  const index = new Array<number>(from.shape.length).fill(0);
  for (let n = 0; n < from.size; n++) {
    to.set(...index, from.get(...index));
    for (let d = index.length - 1; d >= 0 && ++(index[d] as number) === from.shape[d]; d--) index[d] = 0;
  }
}

/** `Float32Array` etc., also for arrays of another realm. */
function tagOf(value: unknown): string {
  return Object.prototype.toString.call(value).slice(8, -1);
}

// ----- scopes ---------------------------------------------------------------------------------------------------

let scope: Set<Tensor> | undefined;

/** @internal A tensor around a native handle, in the current scope. */
export function tensorOf(handle: TensorHandle): Tensor {
  return track(new Tensor(handle));
}

function track(tensor: Tensor): Tensor {
  scope?.add(tensor);
  return tensor;
}

/**
 * Runs `fn` and disposes of every tensor made in it, except those in its result (a tensor, or an array or object of tensors). `fn` must be synchronous;
 * operations only queue, so this covers a whole forward pass.
 */
export function tidy<T>(fn: () => T): T {
  const outer = scope;
  const mine = new Set<Tensor>();
  scope = mine;
  let result: T | undefined;
  try {
    result = fn();
    if (result instanceof Promise) throw new UniFlowError('BAD_INPUT', 'tidy: the function must not be async; read after it');
    return result;
  } finally {
    scope = outer;
    const kept = tensorsIn(result);
    for (const tensor of mine) {
      if (kept.has(tensor)) track(tensor);
      else tensor.dispose();
    }
  }
}

/** Removes a tensor from the scope that would dispose of it; for caches that outlive the call. */
export function keep(tensor: Tensor): Tensor {
  scope?.delete(tensor);
  return tensor;
}

function tensorsIn(value: unknown, found = new Set<Tensor>()): Set<Tensor> {
  if (value instanceof Tensor) found.add(value);
  else if (Array.isArray(value)) for (const v of value) tensorsIn(v, found);
  else if (value && typeof value === 'object') for (const v of Object.values(value)) tensorsIn(v, found);
  return found;
}

// ----- devices --------------------------------------------------------------------------------------------------

let inUse = 'cpu';

/** The device of tensors that are not made from other tensors. */
export function deviceInUse(): string {
  return inUse;
}

/** From now on, tensors that are not made from other tensors are created on `device`. For programs that use a single device. */
export function useDevice(device: string): void {
  native.useDevice(device);
  inUse = device;
}

/** While `fn` runs, tensors that are not made from other tensors (uploads, parameters, random numbers) are created on `device`. `fn` must be synchronous. */
export function onDevice<T>(device: string, fn: () => T): T {
  const outer = inUse;
  if (device === outer) return fn();
  native.useDevice(device);
  inUse = device;
  try {
    return fn();
  } finally {
    inUse = outer;
    native.useDevice(outer);
  }
}

// ----- cancellation ---------------------------------------------------------------------------------------------

let token: CancelToken | undefined;

/** Operations queued by `fn` carry the token `of`. Cancelling it skips those still waiting and stops long ones between chunks. */
function withToken<T>(of: CancelToken | undefined, fn: () => T): T {
  const outer = token;
  token = of;
  native.useToken(of);
  try {
    return fn();
  } finally {
    token = outer;
    native.useToken(outer);
  }
}

/** Work queued by `fn` outlives the current call and must not be cancelled with it. */
export function uncancellable<T>(fn: () => T): T {
  return withToken(undefined, fn);
}

/**
 * Runs `work`, which queues its operations through the function passed to it; `signal` cancels those operations.
 * @throws UniFlowError `ABORTED` with the signal's reason as its cause.
 */
export async function cancellable<T>(signal: AbortSignal | undefined, work: (queue: <R>(fn: () => R) => R) => Promise<T>): Promise<T> {
  if (!signal) return work((fn) => fn());
  throwIfAborted(signal);
  const mine = native.createToken();
  const cancel = (): void => native.cancel(mine);
  signal.addEventListener('abort', cancel);
  try {
    return await work((fn) => withToken(mine, fn));
  } catch (error) {
    throw signal.aborted && error instanceof UniFlowError && error.code === 'ABORTED' ? aborted(signal) : error;
  } finally {
    signal.removeEventListener('abort', cancel);
  }
}

export interface Grid {
  rows: number;
  cols: number;
}

/** The whole patches of an image [height, width]. Pixels to the right of and below the last one are dropped, as in a convolution. */
export function gridOf([height, width]: readonly [number, number], patch: number): Grid {
  return { rows: Math.floor(height / patch), cols: Math.floor(width / patch) };
}
