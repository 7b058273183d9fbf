/**
 * The commands: arguments, options and help. Each command's implementation is in the file of its name, which is loaded only when it runs:
 * help appears at once, even if the addon cannot be loaded.
 */
import { Option, type Command } from 'commander';
import type { Pool } from '../encoder/pooling.js';
import type { Fit } from '../images/fit.js';
import type { FormatName } from '../shards/formats/index.js';
import type { StoreType } from '../shards/store.js';
import type { Preset } from '../config.js';
import type { BenchCommandOptions } from './bench.js';
import type { DecodeCommandOptions } from './decode.js';
import type { EvalCommandOptions } from './eval.js';
import type { InitCommandOptions } from './init.js';
import { defaults as serving } from '../serve/options.js';
import type { Regime } from '../train/regimes.js';
import {
  deviceOption,
  dtypeOption,
  gridOption,
  integerFrom,
  number,
  path,
  sizeOption,
  withFolder,
  withJson,
  withLoadedModel,
  withModel,
  withRevision,
  withSampling,
  type EmbedCommandOptions,
  type EncodeCommandOptions,
  type HubModelOptions,
  type ReportOptions,
} from './options.js';
import type { ReconstructCommandOptions } from './reconstruct.js';
import type { ServeCommandOptions } from './serve.js';
import type { TrainCommandOptions } from './train.js';
import type { WorkerCommandOptions } from './worker.js';

const REGIMES: Record<Regime, true> = {
  ...{ adaptive: true, uniform: true, last: true, finetune: true, frozen: true, layers: true, reparam: true },
};

const PRESETS: Record<Preset, true> = { nano: true, tiny: true, small: true, base: true, official: true };

const FORMATS: Record<FormatName, true> = { safetensors: true, npy: true, tar: true, parquet: true };

const POOLS: Record<Pool, true> = { cls: true, mean: true, head: true };

const FITS: Record<Fit, true> = { crop: true, pad: true, native: true };

const STORES: Record<StoreType, true> = { float32: true, float16: true, bfloat16: true };

const INPUTS = 'images, folders of them to the bottom, globs, lists (.txt, .csv, .jsonl), .tar (- on stdin), .tar.gz, .parquet, IDX, URLs';

export function addCommands(program: Command, signal: AbortSignal): void {
  addEncode(program, signal);
  addEmbed(program, signal);
  addWorker(program, signal);
  addDecode(program, signal);
  addReconstruct(program, signal);
  addServe(program, signal);
  addTrain(program, signal);
  addEval(program, signal);
  addInit(program, signal);
  addInfo(program, signal);
  addBench(program, signal);
  addDoctor(program);
  addBuild(program);
}

function collected(value: string, before: string[] = []): string[] {
  return [...before, value];
}

function examples(...lines: string[]): string {
  return `\nExamples:\n${lines.map((line) => `  $ ${line}\n`).join('')}`;
}

function addEncode(program: Command, signal: AbortSignal): void {
  const command = program
    .command('encode')
    .description('Turn pictures into latents: in one file, or as shards in a folder, for any number of pictures.')
    .argument('<inputs...>', INPUTS);
  withJson(withModel(command))
    .requiredOption(
      '-o, --out <path>',
      'where the latents go: a file (.safetensors, .npy with .ids.json beside it, .tar, .parquet), or a folder of shards',
      path,
    )
    .option('--tokens', "write the encoder's semantic tokens as well")
    .addOption(sizeOption())
    .option('--shard-size <n>', 'shards: pictures of each (default: 1024)', integerFrom(1))
    .addOption(new Option('--format <format>', 'shards: of the files (default: safetensors)').choices(Object.keys(FORMATS)))
    .addOption(new Option('--fit <how>', 'how pictures of other shapes fit (default: crop)').choices(Object.keys(FITS)))
    .addOption(new Option('--store <type>', 'numbers in the files (default: float32)').choices(Object.keys(STORES)))
    .option('--no-latents', 'write the tokens only')
    .option('--max-failures <n>', 'shards: stop after more unreadable pictures than this (default: never)', integerFrom(0))
    .option('--verify', 'shards: tell by the content of the files, not by size and time, whether a run that goes on has the same')
    .option('--queue <url>', 'shards: have them made by `uniflow worker`s that take from this Redis, as redis://host:6379')
    .option('--max-waiting <n>', 'queue: shards that wait for a worker; others are planned later (default: 64)', integerFrom(1))
    .option('--detach', 'queue: return when all is planned; the same command without it waits, and seals the run')
    .addHelpText(
      'after',
      examples(
        'uniflow encode photos/ --out latents.safetensors',
        'uniflow encode cat.jpg dog.png -m my-model -o latents.npy --tokens',
        'uniflow encode photos/ -m owner/name -o latents.safetensors --dtype bfloat16 --json',
        "uniflow encode 'data/shard-{000..099}.tar' -o latents/ --format tar --store float16",
        'curl -s https://example.org/photos.tar | uniflow encode - -o latents/ --fit native',
        'uniflow encode /nfs/photos -o s3://bucket/latents --queue redis://10.0.0.1:6379',
      ) + '\nShards: a run that was stopped, even by a power cut, goes on where it was when the command is given again.\n',
    )
    .action(async (inputs: string[], options: EncodeCommandOptions) => (await import('./encode.js')).encode(inputs, options, signal));
}

function addEmbed(program: Command, signal: AbortSignal): void {
  const command = program
    .command('embed')
    .description('Turn images into one vector each, for search and classification.')
    .argument('<inputs...>', INPUTS);
  withJson(withModel(command, 'folder of a vision encoder or a UniFlow model, or its name on the Hugging Face hub (default: the bundled one)'))
    .requiredOption('-o, --out <file>', 'where the vectors go: .npy with .ids.json beside it, or .parquet', path)
    .addOption(
      new Option('--pool <how>', 'class token, mean of the patch tokens, or pooling head (default: the head if the model has one)').choices(
        Object.keys(POOLS),
      ),
    )
    .option('--no-normalize', 'keep the length of the vectors; by default it is 1')
    .addOption(sizeOption())
    .addHelpText(
      'after',
      examples(
        'uniflow embed photos/ -m google/siglip-base-patch16-224 -o photos.parquet',
        'uniflow embed photos/ -m facebook/dinov2-small -o photos.npy --pool mean',
        'uniflow embed photos/ -m run/model -o photos.npy --no-normalize --json',
      ),
    )
    .action(async (inputs: string[], options: EmbedCommandOptions) => (await import('./embed.js')).embed(inputs, options, signal));
}

function addWorker(program: Command, signal: AbortSignal): void {
  const command = program
    .command('worker')
    .description('Encode shards of what `uniflow encode --queue` has planned, on as many machines as there are.');
  withJson(withRevision(command))
    .requiredOption('--queue <url>', 'Redis to take work from, as redis://host:6379')
    .option('-m, --model <model>', 'where the model is, if not where the run says; its weights have to be the same')
    .addOption(deviceOption())
    .option('--threads <n>', 'threads that compute (default: UNIFLOW_THREADS, or the number of cores)', integerFrom(1))
    .option('--concurrency <n>', 'shards under way at once (default: 2)', integerFrom(1))
    .option('--stall <s>', 'give a shard to another worker when its own has not been heard of for so long (default: 30)', number)
    .option('--metrics-port <n>', 'serve /metrics for Prometheus, and /healthz; 0 takes a free port', integerFrom(0))
    .option('--metrics-host <address>', 'address to serve them on (default: 127.0.0.1, which only this machine can reach)')
    .addHelpText(
      'after',
      examples(
        'uniflow worker --queue redis://10.0.0.1:6379',
        'uniflow worker --queue redis://10.0.0.1:6379 -m my-model --metrics-host 0.0.0.0 --metrics-port 9100',
      ) + '\nSIGTERM or Ctrl-C: takes no more shards, finishes those under way, exit code 0.\n',
    )
    .action(async (options: WorkerCommandOptions) => (await import('./worker.js')).workerCommand(options, signal));
}

function addDecode(program: Command, signal: AbortSignal): void {
  const command = program
    .command('decode')
    .description('Turn latents back into pictures.')
    .argument('<latents>', 'what encode wrote: a file (.safetensors, .npy, .tar, .parquet), a shard, or a folder of shards');
  withJson(withFolder(withSampling(withModel(command))))
    .addOption(gridOption())
    .addHelpText(
      'after',
      examples(
        'uniflow decode latents.safetensors --out pictures/',
        'uniflow decode latents/ -m my-model -o pictures/',
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
        'uniflow reconstruct photos/ --out compared/',
        'uniflow reconstruct cat.jpg -m my-model -o compared/ --steps 4',
        'uniflow reconstruct photos/ -m my-model -o compared/ --json > quality.json',
      ),
    )
    .action(async (inputs: string[], options: ReconstructCommandOptions) =>
      (await import('./reconstruct.js')).reconstruct(inputs, options, signal),
    );
}

function addServe(program: Command, signal: AbortSignal): void {
  const command = program
    .command('serve')
    .description('Serve a model over HTTP: encode, decode and reconstruct; pictures of requests that come together are computed together.');
  const seconds = (milliseconds: number): number => milliseconds / 1000;
  withJson(withLoadedModel(command))
    .option('--host <address>', `address to listen on (default: ${serving.host}, which only this machine can reach)`)
    .option('--port <n>', `port to listen on; 0 takes a free one (default: ${serving.port})`, integerFrom(0))
    .addOption(new Option('--token <text>', 'clients must send it as bearer token').env('UNIFLOW_TOKEN'))
    .option('--allow-url <host>', 'fetch pictures from this host where a client names a URL; can be repeated', collected)
    .option('--cors <origin>', 'let web pages of this origin ask, as https://example.org, or * for all; can be repeated', collected)
    .option('--max-batch <n>', 'pictures computed together (default: as many as make about 4,096 tokens)', integerFrom(1))
    .option('--max-wait <ms>', `wait so long for others to compute a picture with (default: ${serving.maxWait})`, integerFrom(0))
    .option('--max-queue <n>', `pictures in the service; more get 503 (default: ${serving.maxQueue})`, integerFrom(1))
    .option('--max-requests <n>', `requests under way; more get 503 (default: ${serving.maxRequests})`, integerFrom(1))
    .option('--max-images <n>', `pictures per request (default: ${serving.maxImages})`, integerFrom(1))
    .option('--max-body <MiB>', `size of a request (default: ${serving.maxBody / 2 ** 20})`, integerFrom(1))
    .option('--max-pixels <n>', `pixels of a picture, as sent (default: ${serving.maxPixels})`, integerFrom(1))
    .option('--max-patches <n>', `patches of a picture, as computed (default: ${serving.maxPatches})`, integerFrom(1))
    .option('--max-steps <n>', `Euler steps that a client may ask for (default: ${serving.maxSteps})`, integerFrom(1))
    .option(
      '--timeout <s>',
      `for a client to send, for the service to compute, and for the client to read (default: ${seconds(serving.timeout)})`,
      integerFrom(1),
    )
    .option('--drain <s>', `for what is under way when told to stop (default: ${seconds(serving.drain)})`, integerFrom(0))
    .addHelpText(
      'after',
      examples(
        'uniflow serve --port 8080',
        'UNIFLOW_TOKEN=secret uniflow serve -m my-model --host 0.0.0.0 --max-batch 32',
        'curl --data-binary @cat.jpg -H content-type:image/jpeg http://127.0.0.1:8080/v1/encode',
      ) + '\nSIGTERM or Ctrl-C: takes no more requests, finishes those under way, exit code 0.\n',
    )
    .action(async (options: ServeCommandOptions) => (await import('./serve.js')).serveCommand(options, signal));
}

function addTrain(program: Command, signal: AbortSignal): void {
  const command = program
    .command('train')
    .description('Make a tokenizer of a vision encoder: fine-tune it near itself, and train the pixel flow decoder on top.');
  withJson(command)
    .option('-o, --out <folder>', 'the folder of the run: settings, log, state, model/, report.html', path)
    .option('--resume <folder>', 'go on with a run that was stopped; the result is the same to the bit')
    .option('--config <file>', 'settings as JSON (train.json of a run is one); options given here win')
    .option('--encoder <model>', 'vision encoder to start from, and the teacher: folder, or name on the hub')
    .option('--model <model>', 'UniFlow model to go on from; its encoder is the teacher')
    .option('--init <preset>', 'start with random weights, of this size; takes --regime finetune')
    .option('-d, --data <path>', 'images: a folder, a list (.txt, .csv), an IDX file, a WebDataset .tar, .parquet')
    .option('--validation <path>', 'pictures to measure PSNR and SSIM on')
    .addOption(new Option('--regime <name>', 'what happens to the encoder (default: adaptive)').choices(Object.keys(REGIMES)))
    .option('--steps <n>', 'optimizer steps', integerFrom(1))
    .option('--batch <n>', 'pictures a step (default: 16)', integerFrom(1))
    .option('--accumulate <n>', 'parts that a batch is computed in, to save memory (default: 1)', integerFrom(1))
    .option('--recompute', 'compute activations again for the gradient, to save memory')
    .option('--size <n>', "height and width (default: the model's own)", integerFrom(1))
    .option('--lr <x>', 'learning rate (default: 1e-4)', number)
    .option('--encoder-lr <x>', 'of the encoder (default: --lr)', number)
    .option('--warmup <n>', 'steps in which the learning rate rises (default: 100)', integerFrom(0))
    .option('--beta <x>', 'how strongly misaligned layers are held (default: 2)', number)
    .option('--lambda-distillation <x>', 'weight of the distillation loss (default: 1)', number)
    .option('--ema <x>', "weight of the old value in the weights' moving average (default: 0.999)", number)
    .addOption(dtypeOption('numbers to compute with; the master weights are float32 (default: bfloat16)'))
    .option('--seed <n>', 'of weights, order, crops, noise and times (default: 0)', integerFrom(0))
    .option('--validate-every <n>', 'steps between two validations (default: 500)', integerFrom(1))
    .option('--checkpoint-every <n>', 'steps between two checkpoints (default: 500)', integerFrom(1))
    .addOption(deviceOption())
    .option('--threads <n>', 'threads that compute (default: UNIFLOW_THREADS, or the number of cores)', integerFrom(1))
    .addHelpText(
      'after',
      examples(
        'uniflow train --encoder facebook/dinov2-base --data photos/ --validation held-out/ --steps 20000 --out run',
        'uniflow train --resume run',
        'uniflow train --config run/train.json --regime uniform --out run-uniform',
        'uniflow train --init tiny --regime finetune --data train.tar --steps 5000 --lr 1e-3 --out run-new',
        "uniflow train --init tiny --regime finetune --data 'cifar10/train-*.parquet' --steps 5000 --out run-cifar",
      ) + '\nCtrl-C stops after the step under way, with a checkpoint. The less common settings have no option: see --config.\n',
    )
    .action(async (options: TrainCommandOptions) => (await import('./train.js')).trainCommand(options, signal));
}

function addEval(program: Command, signal: AbortSignal): void {
  const command = program
    .command('eval')
    .description('Measure a tokenizer: how close the reconstructions are, and what the tokens know.')
    .argument('<data>', 'images: a folder (sub-folders are classes), a list (.txt, .csv), an IDX file, a WebDataset .tar, .parquet');
  withJson(withSampling(withModel(command)))
    .addOption(sizeOption())
    .option('--limit <n>', 'at most so many pictures of a data set, evenly spaced', integerFrom(1))
    .option('--train <data>', 'labelled pictures to learn from: linear probe and k-NN accuracy on <data>, which has labels, too')
    .option('--baseline <data>', 'images to fit the PCA baseline to (default: those of --train, else <data> itself)')
    .addOption(new Option('--convention <name>', "how SSIM is computed: paper as UniFlow's notebook").choices(['standard', 'paper']))
    .option('--teacher <model>', "encoder that the model's was fine-tuned from: each layer's cosine to it")
    .addOption(new Option('--latent-pool <how>', 'latents as one vector (default: mean)').choices(['mean', 'concat']))
    .option('--features <model>', 'encoder to compute FID with, or an .npy with features of the reconstructions')
    .addOption(new Option('--inception <file>', 'ONNX file of an Inception-v3 to compute rFID with').conflicts('features'))
    .addOption(new Option('--pool <how>', 'features of an encoder (default: mean)').choices(['mean', 'class']))
    .option('--reference <file>', "an .npy with features to compare with, instead of the originals'")
    .option('--allow-unpinned', 'take .npy files without a .json that says what they are of')
    .addOption(new Option('--save-features <file>', "write the originals' features: a --reference for later").conflicts('reference'))
    .option('-o, --out <file>', 'write the results as JSON', path)
    .addHelpText(
      'after',
      examples(
        'uniflow eval held-out/',
        'uniflow eval kodak/ -m run/model --baseline train/ --convention paper',
        'uniflow eval val/ -m run/model --teacher facebook/dinov2-base --train train/ --out result.json',
        'uniflow eval val/ -m run/model --features facebook/dinov2-base --save-features val.npy',
        'uniflow eval val/ -m run/model --steps 4 --features facebook/dinov2-base --reference val.npy',
        'uniflow eval val/ -m run/model --inception inception-v3.onnx --json',
      ),
    )
    .action(async (data: string, options: EvalCommandOptions) => (await import('./eval.js')).evaluateCommand(data, options, signal));
}

function addInit(program: Command, signal: AbortSignal): void {
  const command = program
    .command('init')
    .description('Make a model folder with random weights, or with the linear codec (PCA) of photographs, a better start for training.')
    .argument('<folder>', 'where the model goes');
  withJson(command)
    .addOption(new Option('--preset <name>', 'size of the model').choices(Object.keys(PRESETS)).makeOptionMandatory())
    .option('--photos <data>', 'start as the PCA of these images: a folder, list, IDX file or tar')
    .option('--seed <n>', 'of the weights (default: 0)', integerFrom(0))
    .addOption(dtypeOption('numbers to store (default: float32)'))
    .option('--force', 'overwrite a model that is there')
    .addHelpText(
      'after',
      examples(
        'uniflow init my-model --preset tiny',
        'uniflow init my-model --preset base --seed 7 --dtype bfloat16',
        'uniflow init my-model --preset base --photos photos/',
        'uniflow init my-model --preset nano --force',
      ),
    )
    .action(async (folder: string, options: InitCommandOptions) => (await import('./init.js')).init(folder, options, signal));
}

function addInfo(program: Command, signal: AbortSignal): void {
  const command = program
    .command('info')
    .description('Say what a model is: sizes, parameters, operations, preprocessing.')
    .argument('[model]', 'folder of a UniFlow model or of a vision encoder, or its name on the hub (default: the bundled one)');
  withJson(withRevision(command))
    .addHelpText('after', examples('uniflow info my-model', 'uniflow info facebook/dinov2-base', 'uniflow info my-model --json'))
    .action(async (model: string | undefined, options: HubModelOptions) => (await import('./info.js')).info(model, options, signal));
}

function addBench(program: Command, signal: AbortSignal): void {
  const command = program
    .command('bench')
    .description('Measure how fast a model encodes and decodes here, and what part of the measured peak that is.')
    .argument('[pictures...]', 'files and folders to measure encoding from files on; they are read again and again');
  withJson(withModel(command))
    .option('--steps <n>', "Euler steps (default: the model's num_sampling_steps)", integerFrom(1))
    .option('--seconds <s>', 'how long to measure each row (default: 2)', integerFrom(1))
    .addHelpText(
      'after',
      examples(
        'uniflow bench',
        'uniflow bench photos/ -m my-model --dtype bfloat16',
        'uniflow bench -m my-model --device cuda --batch 64 --seconds 10 --json',
      ) + '\nNothing else should run meanwhile. The kernels one by one, and beside ONNX Runtime: bench/README.md of the repository.\n',
    )
    .action(async (pictures: string[], options: BenchCommandOptions) => (await import('./bench.js')).bench(pictures, options, signal));
}

function addDoctor(program: Command): void {
  withJson(program.command('doctor').description('Check this installation, and say what is missing and what to do about it.'))
    .addHelpText('after', examples('uniflow doctor', 'uniflow doctor --json'))
    .action(async (options: ReportOptions) => (await import('./doctor.js')).doctor(options));
}

function addBuild(program: Command): void {
  program
    .command('build')
    .description('Compile the native addon for this machine, where there is no prebuilt one or to add the GPU backend.')
    .argument('[cmake-options...]', 'after --: options for CMake')
    .addHelpText(
      'after',
      examples('uniflow build', 'uniflow build -- -DUNIFLOW_CUDA=ON') +
        "\nThe addon goes into the package's folder, or to ~/.cache/uniflow-tokenizer where that cannot be written.\n",
    )
    .action(async (options: string[]) => (await import('./build.js')).build(options));
}
