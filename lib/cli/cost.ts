/** The cost of a model: operations as counted in native/ops/*.h, and parameters. */
import type { DecoderConfig } from '../decoder/decoder.js';
import type { EncoderConfig } from '../encoder/config.js';
import { families } from '../encoder/families.js';
import { gridOf } from '../tensor.js';

const linear = (rows: number, inputs: number, out: number): number => 2 * rows * inputs * out;

type Size = readonly [height: number, width: number];

/** Shape of an image's tokens. `prefix` counts the tokens in front of the patches: class token and registers. */
export function tokensOf(
  config: EncoderConfig,
  size: Size = config.imageSize,
): { prefix: number; rows: number; cols: number; patches: number } {
  const { rows, cols } = gridOf(size, config.patch);
  return { prefix: (families[config.family].classToken ? 1 : 0) + config.registers, rows, cols, patches: rows * cols };
}

function transformerFlops(tokens: number, width: number, hidden: number, gated: boolean): number {
  const attention = linear(tokens, width, 3 * width) + 4 * tokens ** 2 * width + linear(tokens, width, width);
  return attention + linear(tokens, width, gated ? 2 * hidden : hidden) + linear(tokens, hidden, width);
}

/** FLOPs per image, by default at the size that the positions were trained for. */
export function encoderFlops(config: EncoderConfig, size: Size = config.imageSize): number {
  const { patches, prefix } = tokensOf(config, size);
  const { width, hidden, layers, gated, patch } = config;
  return linear(patches, 3 * patch ** 2, width) + layers * transformerFlops(patches + prefix, width, hidden, gated);
}

export function projectionFlops({ grid, width, latentChannels }: DecoderConfig): number {
  const patches = grid.rows * grid.cols;
  return linear(patches, width, width) + linear(patches, width, latentChannels);
}

/** FLOPs per image at the model's own size. */
export function decoderFlops(
  { grid, width, hidden, latentChannels, globalBlocks, flowBlocks, patch }: DecoderConfig,
  steps: number,
): number {
  const patches = grid.rows * grid.cols;
  const unprojection = linear(patches, latentChannels, width) + linear(patches, width, width);
  const blocks = globalBlocks * transformerFlops(patches, width, hidden, false);
  const pixels = 3 * patch ** 2;
  const step = 2 * linear(patches, pixels, width) + (5 * flowBlocks + 2) * linear(patches, width, width);
  return unprojection + blocks + linear(patches, width, width) + steps * step;
}

/** The parts of a UniFlow model, by the prefixes of their parameter names; everything else is the encoder. */
const PARTS: Record<string, RegExp> = {
  'latent projection': /^chal_(un)?proj\./,
  'global blocks': /^global_block/,
  'flow head': /^(flow_head|decoder_pos_embed)/,
};

export function countByPart(tensors: Iterable<readonly [name: string, shape: readonly number[]]>): Record<string, number> {
  const counts: Record<string, number> = { encoder: 0 };
  for (const [name, shape] of tensors) {
    const part = Object.keys(PARTS).find((key) => PARTS[key]?.test(name)) ?? 'encoder';
    counts[part] = (counts[part] ?? 0) + shape.reduce((a, b) => a * b, 1);
  }
  return counts;
}

/** For example `722 GFLOP` or `1.26 GB`. */
export function withPrefix(value: number, unit: string): string {
  const prefixes = ['', 'k', 'M', 'G', 'T', 'P'];
  const power = Math.min(prefixes.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(1, value)) / 3)));
  const scaled = value / 1000 ** power;
  return `${power === 0 ? scaled : scaled.toPrecision(3)} ${prefixes[power]}${unit}`.trim();
}
