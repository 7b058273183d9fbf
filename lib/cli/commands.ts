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
  levels,
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
import type { QuantizeCommandOptions } from './quantize.js';
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

const INPUTS =
  'images, folders (searched recursively), globs, lists (.txt, .csv, .jsonl), .tar (- reads stdin), .tar.gz, .parquet, IDX, URLs';

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
  addQuantize(program, signal);
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
    .description('Encode images to latents, in one file or, for any number of images, in a folder of shards.')
    .argument('<inputs...>', INPUTS);
  withJson(withModel(command))
    .requiredOption(
      '-o, --out <path>',
      'output: a file (.safetensors, .npy with .ids.json beside it, .tar, .parquet), or a folder or s3://bucket/prefix of shards',
      path,
    )
    .option('--tokens', "also write the encoder's semantic tokens")
    .option('--codes', 'write the codes of a model that has them, uint16, instead of latents (.npy: named .codes.npy)')
    .addOption(sizeOption())
    .option('--shard-size <n>', 'images per shard (default: 1024)', integerFrom(1))
    .addOption(new Option('--format <format>', 'file format of the shards (default: safetensors)').choices(Object.keys(FORMATS)))
    .addOption(new Option('--fit <how>', 'how to fit images of another aspect ratio (default: crop)').choices(Object.keys(FITS)))
    .addOption(new Option('--store <type>', 'data type in the files (default: float32)').choices(Object.keys(STORES)))
    .option('--no-latents', 'write only the tokens')
    .option('--max-failures <n>', 'shards: stop after more than n unreadable images (default: never)', integerFrom(0))
    .option('--verify', 'shards: on resume, compare input files by content instead of size and modification time')
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
        'uniflow encode photos/ -m run/model -o codes/ --codes',
        'uniflow encode photos/ -o s3://bucket/latents',
        'uniflow encode /nfs/photos -o /nfs/latents --queue redis://10.0.0.1:6379',
      ) + '\nShards: to resume a stopped run, even after a power cut, repeat the command.\n',
    )
    .action(async (inputs: string[], options: EncodeCommandOptions) => (await import('./encode.js')).encode(inputs, options, signal));
}

function addEmbed(program: Command, signal: AbortSignal): void {
  const command = program
    .command('embed')
    .description('Turn images into one vector each, for search and classification.')
    .argument('<inputs...>', INPUTS);
  withJson(
    withModel(command, 'folder of a vision encoder or a UniFlow model, or its name on the Hugging Face hub (default: the bundled one)'),
  )
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
    .option('-m, --model <model>', 'location of the model, if it differs from the one in the run; the weights must be the same')
    .addOption(deviceOption())
    .option('--threads <n>', 'compute threads (default: UNIFLOW_THREADS, or the number of cores)', integerFrom(1))
    .option('--concurrency <n>', 'shards encoded concurrently (default: 2)', integerFrom(1))
    .option('--stall <s>', 'seconds without a sign of life after which a shard goes to another worker (default: 30)', number)
    .option('--metrics-port <n>', 'serve /metrics (Prometheus) and /healthz; 0 picks a free port', integerFrom(0))
    .option('--metrics-host <address>', 'address of the metrics server (default: 127.0.0.1, reachable only from this machine)')
    .addHelpText(
      'after',
      examples(
        'uniflow worker --queue redis://10.0.0.1:6379',
        'uniflow worker --queue redis://10.0.0.1:6379 -m my-model --metrics-host 0.0.0.0 --metrics-port 9100',
      ) + '\nOn SIGTERM or Ctrl-C it finishes the current shards and exits with code 0.\n',
    )
    .action(async (options: WorkerCommandOptions) => (await import('./worker.js')).workerCommand(options, signal));
}

function addDecode(program: Command, signal: AbortSignal): void {
  const command = program
    .command('decode')
    .description('Decode latents or codes to images.')
    .argument('<latents>', 'output of encode: a file (.safetensors, .npy, .codes.npy, .tar, .parquet), a shard, or a folder of shards');
  withJson(withFolder(withSampling(withModel(command))))
    .addOption(gridOption())
    .addHelpText(
      'after',
      examples(
        'uniflow decode latents.safetensors --out images/',
        'uniflow decode latents/ -m my-model -o images/',
        'uniflow decode latents.npy -m my-model -o images/ --steps 4 --schedule pow_0.25',
        'uniflow decode latents.npy -m my-model -o images/ --grid 16x32 --format webp --seed 7',
      ),
    )
    .action(async (path: string, options: DecodeCommandOptions) => (await import('./decode.js')).decode(path, options, signal));
}

function addReconstruct(program: Command, signal: AbortSignal): void {
  const command = program
    .command('reconstruct')
    .description('Encode and decode images, write both side by side, and print PSNR and SSIM.')
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
    .description('Serve a model over HTTP: encode, decode and reconstruct, with dynamic batching across requests.');
  const seconds = (milliseconds: number): number => milliseconds / 1000;
  withJson(withLoadedModel(command))
    .option('--host <address>', `address to listen on (default: ${serving.host}, reachable only from this machine)`)
    .option('--port <n>', `port to listen on; 0 picks a free one (default: ${serving.port})`, integerFrom(0))
    .addOption(new Option('--token <text>', 'bearer token that clients must send').env('UNIFLOW_TOKEN'))
    .option('--allow-url <host>', 'allow requests to name image URLs on this host; repeatable', collected)
    .option(
      '--cors <origin>',
      'allow requests from web pages of this origin, such as https://example.org, or * for all; repeatable',
      collected,
    )
    .option('--no-page', 'do not answer / with the page that shows what the model makes of an image')
    .option('--max-batch <n>', 'images per batch (default: about 4,096 tokens; 32,000 on a GPU)', integerFrom(1))
    .option('--max-wait <ms>', `milliseconds to wait for more images to fill a batch (default: ${serving.maxWait})`, integerFrom(0))
    .option('--max-queue <n>', `images in the service; further requests get 503 (default: ${serving.maxQueue})`, integerFrom(1))
    .option('--max-requests <n>', `concurrent requests; further ones get 503 (default: ${serving.maxRequests})`, integerFrom(1))
    .option('--max-images <n>', `maximum images per request (default: ${serving.maxImages})`, integerFrom(1))
    .option('--max-body <MiB>', `maximum size of a request (default: ${serving.maxBody / 2 ** 20})`, integerFrom(1))
    .option('--max-pixels <n>', `maximum pixels of a sent image (default: ${serving.maxPixels})`, integerFrom(1))
    .option('--max-patches <n>', `maximum patches of an image after resizing (default: ${serving.maxPatches})`, integerFrom(1))
    .option('--max-steps <n>', `maximum Euler steps that a client may request (default: ${serving.maxSteps})`, integerFrom(1))
    .option(
      '--timeout <s>',
      `time limit for receiving a request, for computing it, and for sending the answer (default: ${seconds(serving.timeout)})`,
      integerFrom(1),
    )
    .option('--drain <s>', `time limit for current requests after a stop signal (default: ${seconds(serving.drain)})`, integerFrom(0))
    .addHelpText(
      'after',
      examples(
        'uniflow serve --port 8080',
        'UNIFLOW_TOKEN=secret uniflow serve -m my-model --host 0.0.0.0 --max-batch 32',
        'curl --data-binary @cat.jpg -H content-type:image/jpeg http://127.0.0.1:8080/v1/encode',
      ) + '\nOn SIGTERM or Ctrl-C it finishes the current requests and exits with code 0.\n',
    )
    .action(async (options: ServeCommandOptions) => (await import('./serve.js')).serveCommand(options, signal));
}

function addTrain(program: Command, signal: AbortSignal): void {
  const command = program
    .command('train')
    .description('Train a tokenizer from a vision encoder: self-distillation of the encoder, and a pixel flow decoder.');
  withJson(command)
    .option('-o, --out <folder>', 'folder of the run: settings, log, state, model/, report.html', path)
    .option('--resume <folder>', 'resume a stopped run; the result is bit-identical')
    .option('--config <file>', 'settings as JSON, such as train.json of a run; options on the command line take precedence')
    .option('--encoder <model>', 'vision encoder to start from, also the teacher: a folder, or a name on the hub')
    .option('--model <model>', 'UniFlow model to continue from; its encoder is the teacher')
    .option('--init <preset>', 'new model of this size; requires --regime finetune')
    .option('-d, --data <path>', 'images: a folder, a list (.txt, .csv), an IDX file, a WebDataset .tar, .parquet')
    .option('--validation <path>', 'images to measure PSNR and SSIM on')
    .option('--latent-channels <n>', 'latent channels of a tokenizer on --encoder (default: 64)', integerFrom(1))
    .option('--codes <levels>', 'discrete latents: levels of the channels of a group, such as 8,8,8,5,5,5', levels)
    .addOption(new Option('--regime <name>', 'how the encoder is trained (default: adaptive)').choices(Object.keys(REGIMES)))
    .option('--steps <n>', 'optimizer steps', integerFrom(1))
    .option('--batch <n>', 'images per step (default: 16)', integerFrom(1))
    .option('--accumulate <n>', 'micro-batches per step, to save memory (default: 1)', integerFrom(1))
    .option('--recompute', 'recompute activations in the backward pass, to save memory')
    .option('--size <n>', "height and width (default: the model's own)", integerFrom(1))
    .option('--lr <x>', 'learning rate (default: 1e-4)', number)
    .option('--encoder-lr <x>', 'learning rate of the encoder (default: --lr)', number)
    .option('--warmup <n>', 'steps in which the learning rate rises (default: 100)', integerFrom(0))
    .option('--beta <x>', 'how much more misaligned layers are weighted in the distillation loss (default: 2)', number)
    .option('--lambda-distillation <x>', 'weight of the distillation loss (default: 1)', number)
    .option('--ema <x>', "weight of the old value in the weights' moving average (default: 0.999)", number)
    .addOption(dtypeOption('data type of the computation; master weights are float32 (default: bfloat16)'))
    .option('--seed <n>', 'seed of weights, order, crops, noise and times (default: 0)', integerFrom(0))
    .option('--validate-every <n>', 'steps between validations (default: 500)', integerFrom(1))
    .option('--checkpoint-every <n>', 'steps between checkpoints (default: 500)', integerFrom(1))
    .addOption(deviceOption())
    .option('--threads <n>', 'compute threads (default: UNIFLOW_THREADS, or the number of cores)', integerFrom(1))
    .addHelpText(
      'after',
      examples(
        'uniflow train --encoder facebook/dinov2-base --data photos/ --validation held-out/ --steps 20000 --out run',
        'uniflow train --resume run',
        'uniflow train --config run/train.json --regime uniform --out run-uniform',
        'uniflow train --init tiny --regime finetune --data train.tar --steps 5000 --lr 1e-3 --out run-new',
        'uniflow train --init small --regime finetune --data photos/ --codes 8,8,8,5,5,5 --steps 5000 --out run-codes',
        "uniflow train --init tiny --regime finetune --data 'cifar10/train-*.parquet' --steps 5000 --out run-cifar",
      ) + '\nCtrl-C stops after the current step and writes a checkpoint. Less common settings are only in --config.\n',
    )
    .action(async (options: TrainCommandOptions) => (await import('./train.js')).trainCommand(options, signal));
}

function addEval(program: Command, signal: AbortSignal): void {
  const command = program
    .command('eval')
    .description('Evaluate a tokenizer: reconstruction (PSNR, SSIM, FID) and understanding (linear probe, k-NN).')
    .argument('<data>', 'images: a folder (sub-folders are classes), a list (.txt, .csv), an IDX file, a WebDataset .tar, .parquet');
  withJson(withSampling(withModel(command)))
    .addOption(sizeOption())
    .option('--limit <n>', 'use at most n images of each data set, evenly spaced', integerFrom(1))
    .option('--train <data>', 'labelled training images for the linear probe and k-NN; <data> must have labels too')
    .option('--baseline <data>', 'images to fit the PCA baseline to (default: --train, else <data>)')
    .addOption(new Option('--convention <name>', "SSIM convention; paper: as in UniFlow's notebook").choices(['standard', 'paper']))
    .option('--teacher <model>', "original encoder: measures each layer's cosine to it")
    .addOption(new Option('--latent-pool <how>', 'pooling of the latents (default: mean)').choices(['mean', 'concat']))
    .option('--features <model>', 'encoder for FID, or an .npy with features of the reconstructions')
    .addOption(new Option('--inception <file>', 'ONNX file of an Inception-v3, for rFID').conflicts('features'))
    .addOption(new Option('--pool <how>', 'pooling of the features (default: mean)').choices(['mean', 'class']))
    .option('--reference <file>', ".npy with reference features, instead of the originals'")
    .option('--allow-unpinned', 'accept .npy files without the .json that identifies them')
    .addOption(new Option('--save-features <file>', "write the originals' features, for --reference").conflicts('reference'))
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
    .description('Create a model with random weights or, better for training, with the linear codec (PCA) of photographs.')
    .argument('<folder>', 'output folder');
  withJson(command)
    .addOption(new Option('--preset <name>', 'size of the model').choices(Object.keys(PRESETS)).makeOptionMandatory())
    .option('--photos <data>', 'start as the PCA of these images: a folder, list, IDX file or tar')
    .option('--seed <n>', 'seed of the weights (default: 0)', integerFrom(0))
    .addOption(dtypeOption('data type of the weights (default: float32)'))
    .option('--force', 'overwrite an existing model')
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

function addQuantize(program: Command, signal: AbortSignal): void {
  const command = program
    .command('quantize')
    .description('Write a model with int8 weights, for faster inference on the CPU. Layers that int8 changes too much keep their weights.')
    .argument('<model>', 'folder of a UniFlow model or of a vision encoder, or its name on the hub')
    .argument('<folder>', 'where the int8 model goes', path);
  withJson(withRevision(command))
    .option('--images <inputs...>', 'images to compare the layers on: files, folders, lists (default: two made-up ones)')
    .option('--count <n>', 'how many of them to compare on', integerFrom(1), 4)
    .option('--threshold <c>', 'lowest cosine between the int8 and the float products of a layer (default: 0.9998)', number)
    .option('--max-loss <dB>', "PSNR that the images' reconstructions may lose (default: 0.1; requires --images)", number)
    .addOption(dtypeOption('data type of the other matrices (default: float32)'))
    .addHelpText(
      'after',
      examples(
        'uniflow quantize my-model my-model-int8 --images photos/',
        'uniflow encode photos/ -m my-model-int8 --dtype int8 -o latents.npy',
      ),
    )
    .action(async (model: string, out: string, options: Omit<QuantizeCommandOptions, 'out'>) =>
      (await import('./quantize.js')).quantize(model, { ...options, out }, signal),
    );
}

function addInfo(program: Command, signal: AbortSignal): void {
  const command = program
    .command('info')
    .description('Describe a model: sizes, parameters, operations, preprocessing.')
    .argument('[model]', 'folder of a UniFlow model or of a vision encoder, or its name on the hub (default: the bundled one)');
  withJson(withRevision(command))
    .addHelpText('after', examples('uniflow info my-model', 'uniflow info facebook/dinov2-base', 'uniflow info my-model --json'))
    .action(async (model: string | undefined, options: HubModelOptions) => (await import('./info.js')).info(model, options, signal));
}

function addBench(program: Command, signal: AbortSignal): void {
  const command = program
    .command('bench')
    .description('Measure the throughput of a model on this machine, and its share of the measured peak.')
    .argument('[images...]', 'files and folders for measuring encoding from files; they are read repeatedly');
  withJson(withModel(command))
    .option('--steps <n>', "Euler steps (default: the model's num_sampling_steps)", integerFrom(1))
    .option('--seconds <s>', 'duration of each measurement (default: 2)', integerFrom(1))
    .addHelpText(
      'after',
      examples(
        'uniflow bench',
        'uniflow bench photos/ -m my-model --dtype bfloat16',
        'uniflow bench -m my-model --device cuda --batch 64 --seconds 10 --json',
      ) +
        '\nNothing else should run meanwhile. Benchmarks of single kernels, and against ONNX Runtime: bench/README.md of the repository.\n',
    )
    .action(async (images: string[], options: BenchCommandOptions) => (await import('./bench.js')).bench(images, options, signal));
}

function addDoctor(program: Command): void {
  withJson(program.command('doctor').description('Check this installation, and explain how to fix what is missing.'))
    .addHelpText('after', examples('uniflow doctor', 'uniflow doctor --json'))
    .action(async (options: ReportOptions) => (await import('./doctor.js')).doctor(options));
}

function addBuild(program: Command): void {
  program
    .command('build')
    .description('Compile the native addon for this machine, if there is no prebuilt one, or to add the GPU backend.')
    .argument('[cmake-options...]', 'after --: options for CMake')
    .addHelpText(
      'after',
      examples('uniflow build', 'uniflow build -- -DUNIFLOW_CUDA=ON') +
        "\nThe addon is written to the package's folder or, if that is read-only, to ~/.cache/uniflow-tokenizer.\n",
    )
    .action(async (options: string[]) => (await import('./build.js')).build(options));
}
