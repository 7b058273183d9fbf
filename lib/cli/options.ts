/** The options of the command line: parsers of their values, and groups shared by several commands. */
import { InvalidArgumentError, Option, type Command } from 'commander';
import type { Schedule } from '../decoder/schedule.js';
import type { DeviceOptions, ModelType } from '../device.js';
import type { Pool } from '../encoder/pooling.js';
import type { Fit } from '../images/fit.js';
import type { FormatName } from '../shards/formats/index.js';
import type { StoreType } from '../shards/store.js';
import { parseGrid } from '../shards/labels.js';
import type { Grid } from '../tensor.js';

export interface ReportOptions {
  json?: true;
}

export interface HubModelOptions extends ReportOptions {
  revision?: string;
}

export interface ModelOptions extends HubModelOptions {
  model?: string;
  device?: DeviceOptions['device'];
  dtype?: ModelType;
  float8?: true;
  threads?: number;
  batch?: number;
}

export interface ImageOptions {
  size?: number | readonly [height: number, width: number];
}

export interface EncodeCommandOptions extends ModelOptions, ImageOptions {
  out: string;
  tokens?: true;
  codes?: true;
  /** False with --no-latents. */
  latents: boolean;
  fit?: Fit;
  store?: StoreType;
  shardSize?: number;
  format?: FormatName;
  maxFailures?: number;
  verify?: true;
  queue?: string;
  maxWaiting?: number;
  detach?: true;
}

export interface EmbedCommandOptions extends ModelOptions, ImageOptions {
  out: string;
  pool?: Pool;
  /** False with --no-normalize. */
  normalize: boolean;
}

export interface SamplingOptions {
  steps?: number;
  schedule?: Schedule;
  guidance?: number;
  seed?: number;
}

export type ImageFormat = 'png' | 'jpg' | 'webp';

export interface FolderOptions {
  out: string;
  format: ImageFormat;
}

// ----- values ---------------------------------------------------------------------------------------------------

export function integerFrom(least: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || value < least || !Number.isSafeInteger(value))
      throw new InvalidArgumentError(`It must be a whole number from ${least}.`);
    return value;
  };
}

export function number(text: string): number {
  const value = Number(text);
  if (text.trim() === '' || !Number.isFinite(value)) throw new InvalidArgumentError('It must be a number.');
  return value;
}

export function path(text: string): string {
  if (text === '') throw new InvalidArgumentError('It must not be empty.');
  return text;
}

/** Levels of codes, such as 8,8,8,5,5,5. */
export function levels(text: string): number[] {
  const list = text.split(',');
  if (!list.every((level) => /^[1-9]\d*$/.test(level))) throw new InvalidArgumentError('It must be whole numbers such as 8,8,8,5,5,5.');
  return list.map(Number);
}

function pair(text: string): [number, number] | undefined {
  const match = /^([1-9]\d*)x([1-9]\d*)$/i.exec(text);
  return match ? [Number(match[1]), Number(match[2])] : undefined;
}

function size(text: string): number | [number, number] {
  const value = pair(text) ?? (/^[1-9]\d*$/.test(text) ? Number(text) : undefined);
  if (value === undefined) throw new InvalidArgumentError('It must be N, or HEIGHTxWIDTH such as 224x448.');
  return value;
}

function grid(text: string): Grid {
  const value = parseGrid(text);
  if (!value) throw new InvalidArgumentError('It must be ROWSxCOLUMNS such as 16x32.');
  return value;
}

// ----- groups ---------------------------------------------------------------------------------------------------

const FLOATS = ['float32', 'bfloat16'];
export const dtypeOption = (description: string, choices: readonly string[] = FLOATS): Option =>
  new Option('--dtype <type>', description).choices(choices);
export const deviceOption = (): Option =>
  new Option('--device <name>', 'auto, cpu, cuda or cuda:N (default: auto, the first working GPU, else the CPU)');
export const gridOption = (): Option =>
  new Option('--grid <RxC>', 'patch rows and columns of the images (default: from the file)').argParser(grid);
export const sizeOption = (): Option =>
  new Option('--size <N|HxW>', "height and width that images are resized to (default: the model's)").argParser(size);

export function withJson(command: Command): Command {
  return command.option('--json', 'print one JSON object instead of text, and no progress');
}

export function withRevision(command: Command): Command {
  return command.option('--revision <name>', 'branch, tag or commit of a model on the hub (default: main)');
}

const MODEL = 'folder of a UniFlow model, or its name on the Hugging Face hub (default: the bundled one)';

/** Options for loading a model: its source, device and dtype. */
export function withLoadedModel(command: Command, model: string = MODEL): Command {
  command.option('-m, --model <model>', model);
  return withRevision(command)
    .addOption(deviceOption())
    .addOption(dtypeOption('data type of the computation; int8 for inference on the CPU (default: float32)', [...FLOATS, 'int8']))
    .option('--float8', "store the encoder's weights as e4m3: faster, less accurate; requires --dtype bfloat16 and a GPU that supports it")
    .option('--threads <n>', 'compute threads (default: UNIFLOW_THREADS, or the number of cores)', integerFrom(1));
}

/** Options for a model and its batch size. */
export function withModel(command: Command, model?: string): Command {
  return withLoadedModel(command, model).option(
    '--batch <n>',
    'images per batch (default: about 4,096 tokens; 32,000 on a GPU)',
    integerFrom(1),
  );
}

export function withSampling(command: Command): Command {
  return command
    .option('--steps <n>', "Euler steps (default: the model's num_sampling_steps)", integerFrom(1))
    .option('--schedule <name>', 'spacing of the steps: linear, or pow_P such as pow_0.25 (default: linear)')
    .option('--guidance <w>', 'classifier-free guidance; values other than 1 double the cost (default: 1)', number)
    .option('--seed <n>', 'seed of the noise (default: 0)', integerFrom(0));
}

export function withFolder(command: Command): Command {
  return command
    .requiredOption('-o, --out <folder>', 'output folder; created if missing', path)
    .addOption(new Option('--format <format>', 'file format of the images').choices(['png', 'jpg', 'webp']).default('png'));
}
