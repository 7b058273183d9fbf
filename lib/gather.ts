/** Runs batches on the device and collects their outputs in whole arrays. */
import ndarray, { type NdArray } from 'ndarray';
import { UniFlowError, throwIfAborted } from './errors.js';
import { native } from './native.js';
import { cancellable, onDevice, tidy, Tensor } from './tensor.js';

/** Approximate tokens per batch, and the most images: enough rows to keep the matrix products busy, few enough to bound memory. */
const CPU_BATCH = { tokens: 4096, images: 64 };
const GPU_BATCH = { tokens: 32_768, images: 256 }; // the smallest product of a layer then has a thousand tiles, several for each multiprocessor

export function defaultBatchSize(tokensPerImage: number, device: string): number {
  const { tokens, images } = device === 'cpu' ? CPU_BATCH : GPU_BATCH;
  return Math.min(images, Math.max(1, Math.round(tokens / tokensPerImage)));
}

export function checkBatchSize(batchSize: number | undefined, tokensPerImage: number, device: string): number {
  if (batchSize === undefined) return defaultBatchSize(tokensPerImage, device);
  if (!Number.isInteger(batchSize) || batchSize < 1)
    throw UniFlowError.expected('BAD_INPUT', 'batchSize', 'a positive integer', String(batchSize));
  return batchSize;
}

type Gathering = Float32Array | Uint8Array | Int32Array;

/** One output of all batches, concatenated along the first dimension; each batch is read directly into its place. */
class Gathered {
  private data: Gathering | undefined;
  private shape: number[] = [];

  constructor(private readonly count: number) {}

  read(tensor: Tensor, begin: number): Promise<void> {
    const [rows, ...rest] = tensor.shape as [number, ...number[]];
    const row = rest.reduce((a, b) => a * b, 1);
    const size = this.count * row;
    this.data ??=
      tensor.dtype === 'uint8' ? new Uint8Array(size) : tensor.dtype === 'int32' ? new Int32Array(size) : new Float32Array(size);
    this.shape = [this.count, ...rest];
    return tensor.handle.read(this.data.subarray(begin * row, (begin + rows) * row));
  }

  get array(): NdArray<Gathering> {
    return ndarray(this.data as Gathering, this.shape);
  }
}

export interface BatchRun {
  /** The device to run on. */
  device: string;
  count: number;
  batchSize: number;
  signal?: AbortSignal | undefined;
  /** The batch's input tensors; disposed of once the work is queued. */
  load(begin: number, end: number): Tensor[] | Promise<Tensor[]>;
  /** Queues the batch's work; returns the outputs to collect, each with the batch as first dimension. */
  forward(inputs: Tensor[], begin: number, end: number): Tensor[];
}

/** Collects the outputs of all batches. While one batch is computed, the next one is loaded and queued behind it. */
export function runBatches(run: BatchRun): Promise<NdArray<Gathering>[]> {
  return cancellable(run.signal, async (queue) => {
    const gathered: Gathered[] = [];
    let reading: Promise<unknown> = Promise.resolve();
    const read = (outputs: Tensor[], begin: number): Promise<unknown> => {
      const reads = outputs.map((tensor, i) => (gathered[i] ??= new Gathered(run.count)).read(tensor, begin));
      for (const tensor of outputs) tensor.dispose();
      const all = Promise.all(reads);
      all.catch(() => undefined); // it is awaited, but possibly only after the next batch has been read
      return all;
    };
    try {
      for (let begin = 0; begin < run.count; begin += run.batchSize) {
        const end = Math.min(run.count, begin + run.batchSize);
        const inputs = await run.load(begin, end);
        try {
          await reading; // at most one batch is queued behind the running one
          throwIfAborted(run.signal);
          reading = read(
            queue(() => onDevice(run.device, () => tidy(() => run.forward(inputs, begin, end)))),
            begin,
          );
        } finally {
          for (const tensor of inputs) tensor.dispose();
        }
      }
      await reading;
    } catch (error) {
      await onDevice(run.device, () => native.synchronize()); // when this rejects, none of its work is running or in memory
      throw error;
    }
    return gathered.map((g) => g.array);
  });
}
