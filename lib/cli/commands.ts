/**
 * The commands: arguments, options and help. What a command does is in the file of its name, which is loaded only
 * when it runs: help appears at once, and also where the addon cannot be loaded.
 */
import { Option, type Command } from 'commander';
import type { Preset } from '../config.js';
import type { DecodeCommandOptions } from './decode.js';
import type { EncodeCommandOptions } from './encode.js';
import type { InitCommandOptions } from './init.js';
import {
  dtypeOption,
  gridOption,
  integerFrom,
  sizeOption,
  withFolder,
  withJson,
  withModel,
  withRevision,
  withSampling,
  type HubModelOptions,
  type ReportOptions,
} from './options.js';
import type { ReconstructCommandOptions } from './reconstruct.js';

const PRESETS: Record<Preset, true> = { nano: true, tiny: true, base: true, official: true };

const INPUTS = 'picture files and folders; folders are searched to the bottom';

export function addCommands(program: Command, signal: AbortSignal): void {
  addEncode(program, signal);
  addDecode(program, signal);
  addReconstruct(program, signal);
  addInit(program, signal);
  addInfo(program, signal);
  addDoctor(program);
}

function examples(...lines: string[]): string {
  return `\nExamples:\n${lines.map((line) => `  $ ${line}\n`).join('')}`;
}

function addEncode(program: Command, signal: AbortSignal): void {
  const command = program.command('encode').description('Turn pictures into latents.').argument('<inputs...>', INPUTS);
  withJson(withModel(command))
    .requiredOption('-o, --out <file>', 'where the latents go: .safetensors, or .npy with .ids.json beside it')
    .option('--tokens', "write the encoder's semantic tokens as well")
    .addOption(sizeOption())
    .addHelpText(
      'after',
      examples(
        'uniflow encode photos/ --model my-model --out latents.safetensors',
        'uniflow encode cat.jpg dog.png -m my-model -o latents.npy --tokens',
        'uniflow encode photos/ -m owner/name -o latents.safetensors --dtype bfloat16 --json',
      ),
    )
    .action(async (inputs: string[], options: EncodeCommandOptions) => (await import('./encode.js')).encode(inputs, options, signal));
}

function addDecode(program: Command, signal: AbortSignal): void {
  const command = program
    .command('decode')
    .description('Turn latents back into pictures.')
    .argument('<latents>', 'a file that encode wrote');
  withJson(withFolder(withSampling(withModel(command))))
    .addOption(gridOption())
    .addHelpText(
      'after',
      examples(
        'uniflow decode latents.safetensors --model my-model --out pictures/',
        'uniflow decode latents.npy -m my-model -o pictures/ --steps 4 --schedule pow_0.25',
        'uniflow decode latents.npy -m my-model -o pictures/ --grid 16x32 --format webp --seed 7',
      ),
    )
    .action(async (path: string, options: DecodeCommandOptions) => (await import('./decode.js')).decode(path, options, signal));
}

function addReconstruct(program: Command, signal: AbortSignal): void {
  const command = program
    .command('reconstruct')
    .description('Encode and decode pictures; write them side by side and print how close they are.')
    .argument('<inputs...>', INPUTS);
  withJson(withFolder(withSampling(withModel(command))))
    .addOption(sizeOption())
    .addHelpText(
      'after',
      examples(
        'uniflow reconstruct photos/ --model my-model --out compared/',
        'uniflow reconstruct cat.jpg -m my-model -o compared/ --steps 4',
        'uniflow reconstruct photos/ -m my-model -o compared/ --json > quality.json',
      ),
    )
    .action(async (inputs: string[], options: ReconstructCommandOptions) =>
      (await import('./reconstruct.js')).reconstruct(inputs, options, signal),
    );
}

function addInit(program: Command, signal: AbortSignal): void {
  const command = program
    .command('init')
    .description('Make a model folder with random weights.')
    .argument('<folder>', 'where the model goes');
  withJson(command)
    .addOption(new Option('--preset <name>', 'size of the model').choices(Object.keys(PRESETS)).makeOptionMandatory())
    .option('--seed <n>', 'of the weights (default: 0)', integerFrom(0))
    .addOption(dtypeOption('numbers to store (default: float32)'))
    .option('--force', 'overwrite a model that is there')
    .addHelpText(
      'after',
      examples(
        'uniflow init my-model --preset tiny',
        'uniflow init my-model --preset base --seed 7 --dtype bfloat16',
        'uniflow init my-model --preset nano --force',
      ),
    )
    .action(async (folder: string, options: InitCommandOptions) => (await import('./init.js')).init(folder, options, signal));
}

function addInfo(program: Command, signal: AbortSignal): void {
  const command = program
    .command('info')
    .description('Say what a model is: sizes, parameters, operations, preprocessing.')
    .argument('<model>', 'folder of a UniFlow model or of a vision encoder, or its name on the hub');
  withJson(withRevision(command))
    .addHelpText('after', examples('uniflow info my-model', 'uniflow info facebook/dinov2-base', 'uniflow info my-model --json'))
    .action(async (model: string, options: HubModelOptions) => (await import('./info.js')).info(model, options, signal));
}

function addDoctor(program: Command): void {
  withJson(program.command('doctor').description('Check this installation, and say what is missing and what to do about it.'))
    .addHelpText('after', examples('uniflow doctor', 'uniflow doctor --json'))
    .action(async (options: ReportOptions) => (await import('./doctor.js')).doctor(options));
}
