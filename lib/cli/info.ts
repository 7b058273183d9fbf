/** `uniflow info`: the architecture and cost of a model. For a UniFlow model it reads only the header of the weights. */
import { codeCount, groupCount, type Levels } from '../codes.js';
import { parseUniFlowConfig, uniFlowPreprocessing, type UniFlowConfig } from '../config.js';
import type { EncoderConfig } from '../encoder/config.js';
import { VisionEncoder } from '../encoder/vision-encoder.js';
import { Checkpoint, isScale } from '../io/checkpoint.js';
import { resolveModel } from '../io/hub.js';
import { embeddedModel } from '../package.js';
import { storedQuantization, type Quantization } from '../quantize.js';
import type { Preprocessing } from '../io/preprocess.js';
import { countByPart, decoderFlops, encoderFlops, projectionFlops, tokensOf, withPrefix } from './cost.js';
import type { HubModelOptions } from './options.js';
import { plural, printJson } from './output.js';
import { quantizationTable } from './quantize.js';
import { downloading } from './shared.js';

interface Info {
  model: string;
  kind: 'uniflow' | 'encoder';
  family: string;
  encoder: EncoderConfig;
  tokens: ReturnType<typeof tokensOf>;
  /** Only for UniFlow models, like `decoder`. */
  latents?: { shape: [patches: number, channels: number]; bytes: number };
  /** Only for models with codes; `count` is the number of codes of a group. */
  codes?: { levels: Levels; count: number; shape: [patches: number, groups: number]; bytes: number };
  decoder?: { width: number; globalBlocks: number; flowBlocks: number; steps: number };
  parameters: { total: number; parts: Record<string, number> };
  /** Dtypes of a UniFlow model's stored tensors. */
  stored?: string[];
  weightBytes: { float32: number; bfloat16: number };
  /** How the layers of an int8 model came through the gate. */
  quantization?: Quantization;
  /** FLOPs per image at the model's own size; decoding in one step. */
  flops: { encode: number; decode?: number };
  preprocessing: Preprocessing;
}

export async function info(model: string = embeddedModel, options: HubModelOptions, signal: AbortSignal): Promise<void> {
  const { revision } = options;
  const folder = await downloading(options.json === true, (onProgress) => resolveModel(model, { revision, onProgress, signal }));
  const checkpoint = await Checkpoint.open(folder);
  const found = checkpoint.config['model_type'] === 'uniflow' ? uniFlowInfo(model, checkpoint) : await encoderInfo(model, folder);
  const quantization = storedQuantization(checkpoint.metadata, checkpoint.path);
  if (quantization) found.quantization = quantization;
  if (options.json) printJson(found);
  else process.stdout.write(table(found));
}

function uniFlowInfo(model: string, { config: json, tensors }: Checkpoint): Info {
  const config: UniFlowConfig = parseUniFlowConfig(json);
  const { encoder, decoder, latentChannels, steps } = config;
  const { width, globalBlocks, flowBlocks } = decoder;
  const tokens = tokensOf(encoder, config.imageSize);
  return {
    model,
    kind: 'uniflow',
    family: encoder.family,
    encoder,
    tokens,
    latents: { shape: [tokens.patches, latentChannels], bytes: 4 * tokens.patches * latentChannels },
    ...(config.codes ? { codes: codesInfo(config.codes, tokens.patches, groupCount(config)) } : {}),
    decoder: { width, globalBlocks, flowBlocks, steps },
    ...weights(countByPart([...tensors].filter(([name]) => !isScale(name)).map(([name, { shape }]) => [name, shape] as const))),
    stored: [...new Set([...tensors.values()].map(({ dtype }) => dtype))].sort(),
    flops: { encode: encoderFlops(encoder, config.imageSize) + projectionFlops(decoder), decode: decoderFlops(decoder, 1) },
    preprocessing: uniFlowPreprocessing(config),
  };
}

function codesInfo(levels: Levels, patches: number, groups: number): NonNullable<Info['codes']> {
  return { levels, count: codeCount(levels), shape: [patches, groups], bytes: 2 * patches * groups };
}

/** The encoder's tensors and preprocessing are determined only by loading the checkpoint. */
async function encoderInfo(model: string, folder: string): Promise<Info> {
  const loaded = await VisionEncoder.load(folder);
  const { config, preprocessing, parameters } = loaded;
  const stored = parameters.flatMap((p) => p.parts.filter((part) => !part.absent).map(({ shape }) => shape));
  await loaded.dispose();
  return {
    model,
    kind: 'encoder',
    family: config.family,
    encoder: config,
    tokens: tokensOf(config, preprocessing.size),
    ...weights({ encoder: stored.reduce((sum, shape) => sum + shape.reduce((a, b) => a * b, 1), 0) }),
    flops: { encode: encoderFlops(config, preprocessing.size) },
    preprocessing,
  };
}

function weights(parts: Record<string, number>): Pick<Info, 'parameters' | 'weightBytes'> {
  const total = Object.values(parts).reduce((a, b) => a + b, 0);
  return { parameters: { total, parts }, weightBytes: { float32: 4 * total, bfloat16: 2 * total } };
}

function table(info: Info): string {
  const { encoder: e, tokens: t, latents, codes, decoder: d, parameters, weightBytes, flops, preprocessing: p } = info;
  const [height, width] = p.size;
  const registers = e.registers > 0 ? `, ${e.registers} registers` : '';
  const rows: [string, string][] = [
    [
      'image',
      `${height}x${width}, patches of ${e.patch}: ${t.rows}x${t.cols} = ${t.patches} tokens${t.prefix > 0 ? `, and ${t.prefix} in front` : ''}`,
    ],
    [
      'encoder',
      `${e.family}: ${e.layers} layers, width ${e.width}, ${e.heads} heads, MLP ${e.hidden}${e.gated ? ' gated' : ''}${registers}`,
    ],
  ];
  if (latents) rows.push(['latents', `[${latents.shape.join(', ')}] per image, ${withPrefix(latents.bytes, 'B')} in float32`]);
  if (codes) {
    const { levels, count, shape, bytes } = codes;
    rows.push([
      'codes',
      `[${shape.join(', ')}] per image, ${withPrefix(bytes, 'B')} in uint16: ${count.toLocaleString('en')} codes, levels ${levels.join(',')}`,
    ]);
  }
  if (d)
    rows.push([
      'decoder',
      `${plural(d.globalBlocks, 'global block')} and ${plural(d.flowBlocks, 'flow block')}, width ${d.width}; steps by default: ${d.steps}`,
    ]);
  rows.push(['parameters', withPrefix(parameters.total, '')]);
  if (d) rows.push(...Object.entries(parameters.parts).map(([part, n]): [string, string] => [`  ${part}`, withPrefix(n, '')]));
  rows.push([
    'weights',
    `${withPrefix(weightBytes.float32, 'B')} in float32, ${withPrefix(weightBytes.bfloat16, 'B')} in bfloat16${storedAs(info)}`,
  ]);
  rows.push(['encoding', `${withPrefix(flops.encode, 'FLOP')} per image`]);
  if (flops.decode !== undefined) rows.push(['decoding', `${withPrefix(flops.decode, 'FLOP')} per image in one step`]);
  rows.push(['preprocessing', `${MODES[p.mode]}, ${p.filter}; mean ${p.mean.join(' ')}, std ${p.std.join(' ')}`]);
  const title = `${info.model}: ${info.kind === 'uniflow' ? 'UniFlow tokenizer' : 'vision encoder'}`;
  const gate = info.quantization ? quantizationTable(info.quantization) : '';
  return `${title}\n${rows.map(([name, value]) => `  ${name.padEnd(20)}${value}\n`).join('')}${gate}`;
}

const MODES: Record<Preprocessing['mode'], string> = {
  cover: 'centre crop that covers the square',
  shortest_edge: 'shortest edge resized, then centre crop',
  stretch: 'stretched to the size',
};

function storedAs({ stored }: Info): string {
  return stored ? `; stored as ${stored.join(', ')}` : '';
}
