/** `uniflow bench`: the throughput of a model on this machine, compared with the machine's peak. */
import ndarray, { type NdArray } from 'ndarray';
import { randomFillSync } from 'node:crypto';
import { Bench } from 'tinybench';
import { cpuInfo, measurePeak, type ModelType } from '../device.js';
import { checkBatchSize } from '../gather.js';
import { embeddedName } from '../package.js';
import type { UniFlow } from '../uniflow.js';
import { decoderFlops, encoderFlops, projectionFlops, withPrefix } from './cost.js';
import { collectItems } from './inputs.js';
import type { ModelOptions } from './options.js';
import { plural, printJson, rateText } from './output.js';
import { loadModel } from './shared.js';

export interface BenchCommandOptions extends ModelOptions {
  steps?: number;
  /** Duration of each row. */
  seconds?: number;
}

interface Setting {
  model: string;
  device: string;
  dtype: ModelType;
  /** Threads of the CPU, and the kernels' instruction set. */
  threads: number;
  kernels: string;
  /** FLOP/s of the fastest matrix product in `dtype`, measured before the rows. */
  peak: number;
}

interface Row {
  work: string;
  batch: number;
  /** Time per batch; missing for files. */
  medianMs?: number;
  p99Ms?: number;
  imagesPerSecond: number;
  flopsPerImage: number;
  /** Ratio of the reached FLOP/s to the peak. Only matrix products count as FLOPs. */
  ofPeak: number;
}

const SECONDS = 2;
const MIN_SAMPLES = 5;

export async function bench(images: readonly string[], options: BenchCommandOptions, signal: AbortSignal): Promise<void> {
  const { items } = images.length > 0 ? await collectItems(images, signal) : { items: [] };
  const files = items.flatMap(({ image }) => (typeof image === 'string' ? [image] : []));
  const uniflow = await loadModel(options, signal);
  const peak = (await measurePeak(uniflow.device))[uniflow.precision];
  const { kernels, threads } = cpuInfo();
  const { device, precision: dtype } = uniflow;
  const setting: Setting = { model: options.model ?? embeddedName, device, dtype, threads, kernels, peak };
  if (!options.json) process.stdout.write(heading(setting));
  const rows: Row[] = [];
  for await (const row of new Measurements(uniflow, peak, options, signal).all(files)) {
    rows.push(row);
    if (!options.json) process.stdout.write(line(row));
  }
  await uniflow.dispose();
  if (options.json) printJson({ ...setting, rows });
}

class Measurements {
  private readonly encodeFlops: number;
  private readonly decodeFlops: number;
  private readonly steps: number;
  private readonly batches: number[];
  private readonly seconds: number;

  constructor(
    private readonly uniflow: UniFlow,
    private readonly peak: number,
    options: BenchCommandOptions,
    private readonly signal: AbortSignal,
  ) {
    const { encoder, decoder, steps } = uniflow.config;
    this.steps = options.steps ?? steps;
    this.seconds = options.seconds ?? SECONDS;
    this.encodeFlops = encoderFlops(encoder, uniflow.config.imageSize) + projectionFlops(decoder);
    this.decodeFlops = decoderFlops(decoder, this.steps);
    this.batches = [...new Set([1, checkBatchSize(options.batch, decoder.grid.rows * decoder.grid.cols, uniflow.device)])];
  }

  async *all(files: readonly string[]): AsyncGenerator<Row, void, undefined> {
    const { uniflow, signal, steps } = this;
    for (const batch of this.batches)
      yield this.calls('encode', batch, this.encodeFlops, () => uniflow.encode(this.pixels(batch), { batchSize: batch, signal }));
    for (const batch of this.batches) {
      const { latents } = await uniflow.encode(this.pixels(batch), { signal });
      yield this.calls(`decode, ${plural(steps, 'step')}`, batch, this.decodeFlops, () =>
        uniflow.decode(latents, { steps, batchSize: batch, signal }),
      );
    }
    if (files.length > 0) yield this.stream(files, this.batches.at(-1) as number);
  }

  /** uint8 [B,H,W,3] */
  private pixels(batch: number): { pixels: NdArray } {
    const [height, width] = this.uniflow.config.imageSize;
    const bytes = randomFillSync(new Uint8Array(batch * height * width * 3));
    return { pixels: ndarray(bytes, [batch, height, width, 3]) };
  }

  private async calls(work: string, batch: number, flopsPerImage: number, call: () => Promise<unknown>): Promise<Row> {
    const measured = new Bench({ time: 1000 * this.seconds, iterations: MIN_SAMPLES, warmupIterations: 1, throws: true });
    const [task] = await measured.add(work, call, { async: true }).run();
    if (task?.result.state !== 'completed') throw new Error(`the measurement ended as '${String(task?.result.state)}'`);
    const { p50: medianMs, p99: p99Ms } = task.result.latency;
    return { ...this.row(work, batch, flopsPerImage, (1000 * batch) / medianMs), medianMs, p99Ms };
  }

  /** Encodes the files in a loop with `encodeStream`. */
  private async stream(files: readonly string[], batch: number): Promise<Row> {
    const { uniflow, signal } = this;
    let begin = 0;
    let images = 0;
    function* cycle(seconds: number): Generator<string, void, undefined> {
      for (const end = performance.now() + 1000 * seconds; performance.now() < end;) yield* files;
    }
    for await (const { ids } of uniflow.encodeStream(cycle(this.seconds), { batchSize: batch, signal })) {
      if (begin > 0) images += ids.length;
      else begin = performance.now(); // the time before the first batch is warm-up
    }
    const seconds = (performance.now() - begin) / 1000;
    return this.row(`encode ${plural(files.length, 'file')}`, batch, this.encodeFlops, images / seconds);
  }

  private row(work: string, batch: number, flopsPerImage: number, imagesPerSecond: number): Row {
    return { work, batch, imagesPerSecond, flopsPerImage, ofPeak: (imagesPerSecond * flopsPerImage) / this.peak };
  }
}

const COLUMNS = [24, 6, 12, 10, 10, 14, 9];
const TITLES = ['', 'batch', 'median ms', 'p99 ms', 'images/s', 'FLOP/image', 'of peak'];

function aligned(cells: readonly string[]): string {
  return `${cells.map((cell, i) => (i === 0 ? cell.padEnd(COLUMNS[i] as number) : cell.padStart(COLUMNS[i] as number))).join('')}\n`;
}

function heading({ model, device, dtype, threads, kernels, peak }: Setting): string {
  const place = device === 'cpu' ? `${threads} threads, ${kernels} kernels` : device;
  return `${model} in ${dtype} on ${place}; measured peak ${withPrefix(peak, 'FLOP/s')}\n\n${aligned(TITLES)}`;
}

function line({ work, batch, medianMs, p99Ms, imagesPerSecond, flopsPerImage, ofPeak }: Row): string {
  const milliseconds = (ms?: number): string => ms?.toFixed(2) ?? '';
  const cells = [milliseconds(medianMs), milliseconds(p99Ms), rateText(imagesPerSecond), withPrefix(flopsPerImage, 'FLOP')];
  return aligned([work, String(batch), ...cells, `${Math.round(100 * ofPeak)} %`]);
}
