/** `uniflow quantize`: writes a model with int8 weights wherever they come out close enough to the float ones. */
import ndarray from 'ndarray';
import type { VisionEncoder } from '../encoder/vision-encoder.js';
import { UniFlowError } from '../errors.js';
import type { PixelInput } from '../images/input.js';
import { loadPixels } from '../io/preprocess.js';
import type { FloatType } from '../native.js';
import type { Quantization } from '../quantize.js';
import { evenlySpaced } from '../sources/evenly-spaced.js';
import type { UniFlow } from '../uniflow.js';
import { asNamed, collectItems } from './inputs.js';
import type { HubModelOptions } from './options.js';
import { plural, printJson } from './output.js';
import { loadAny } from './shared.js';

export interface QuantizeCommandOptions extends HubModelOptions {
  out: string;
  images?: string[];
  count: number;
  threshold?: number;
  maxLoss?: number;
  dtype?: FloatType;
}

export async function quantize(model: string, options: QuantizeCommandOptions, signal: AbortSignal): Promise<void> {
  const { out, threshold, maxLoss, dtype } = options;
  const { model: loaded } = await loadAny(model, { ...options, device: 'cpu', dtype: 'float32' }, signal);
  const images = options.images && (await calibrationImages(loaded, options.images, options.count, signal));
  const table = await loaded.quantize(images, { threshold, maxLoss, signal });
  await loaded.save(out, { dtype, signal });
  if (options.json) printJson({ folder: out, ...table });
  else process.stdout.write(`${quantizationTable(table)}\n${out} is the int8 model; use it with --dtype int8\n`);
}

/** Images spread evenly over the inputs, as the model sees them. */
async function calibrationImages(
  model: UniFlow | VisionEncoder,
  inputs: string[],
  count: number,
  signal: AbortSignal,
): Promise<PixelInput> {
  const { preprocessing } = model;
  const { items } = await collectItems(inputs, signal);
  const chosen = evenlySpaced(items.length, count).map((i) => asNamed(items[i]!));
  if (chosen.length === 0) throw UniFlowError.expected('BAD_INPUT', 'images', 'at least one image to compare on', 'none');
  const [height, width] = preprocessing.size;
  const data = await loadPixels(chosen, preprocessing, preprocessing.size, { signal });
  return { pixels: ndarray(data, [chosen.length, height, width, 3]) };
}

/** The gate's table as text, one line for each layer. */
export function quantizationTable({ threshold, images, synthetic, loss, layers }: Quantization): string {
  const passed = layers.filter(({ int8 }) => int8).length;
  const rows = layers.map(({ names, cosine, int8 }) => `  ${cosine.toFixed(6)}  ${int8 ? 'int8 ' : 'float'}  ${names.join(', ')}\n`);
  const on = plural(images, synthetic ? 'made-up image' : 'image');
  const lost = loss === undefined ? '' : `, ${loss.toFixed(2)} dB lost`;
  return `int8: ${passed} of ${plural(layers.length, 'layer')} (cosine from ${threshold} on ${on}${lost})\n${rows.join('')}`;
}
