/** Trains and measures everything in a plan. Results that already exist in the same folder with the same settings are reused. */
import type { NdArray } from 'ndarray';
import { createHash } from 'node:crypto';
import { mkdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { openDataset, subset, type Dataset } from '../../lib/sources/dataset.js';
import { batches } from '../../lib/train/loader.js';
import { encoderFeatures, evaluate, type Baseline, type Evaluation, type FeatureExtractor, type FeatureSet } from '../../lib/eval/index.js';
import { UniFlow, VisionEncoder } from '../../lib/index.js';
import type { TrainConfig } from '../../lib/train/config.js';
import { resume, train } from '../../lib/train/train.js';
import { Labelled } from './images.js';
import type { Plan, Variant } from './plan.js';
import { seams } from './seams.js';
import { trainTeacher } from './teacher.js';

export interface Quality {
  /** dB */
  psnr: number;
  ssim: number;
  /** Fréchet distance on the teacher's mean tokens. */
  fid: number;
}

/** One trained tokenizer. Accuracies are in [0, 1]. */
export interface RunResult extends Quality {
  /** Id of the plan's variant. */
  variant: string;
  seed: number;
  globalBlocks: number;
  seams: number;
  /** Linear probes; not measured if only the seams matter. */
  understanding?: { tokens: number; latents: number; teacher: number };
  /** Mean cosine to the teacher after each layer. */
  layers: number[];
  /** Quality of a PCA with as many coefficients. */
  pca: Pick<Baseline, 'psnr' | 'ssim'>;
  /** Quality by number of Euler steps, if measured. */
  sampling?: Record<string, Quality>;
  seconds: number;
}

export interface Results {
  teacher: { /** Accuracy of its own classification head. */ accuracy: number; seconds: number };
  runs: RunResult[];
}

export interface ReproduceOptions {
  /** Folder with the data files of the plan. */
  data: string;
  /** Folder for models and measurements. */
  work: string;
  /** Prints a line of progress. */
  print: (line: string) => void;
}

export async function reproduce(plan: Plan, options: ReproduceOptions): Promise<Results> {
  const reproduction = await Reproduction.open(plan, options);
  try {
    return await reproduction.run();
  } finally {
    await reproduction.close();
  }
}

type RunPlan = Pick<RunResult, 'variant' | 'seed' | 'globalBlocks'>;

class Reproduction {
  private constructor(
    private readonly plan: Plan,
    private readonly options: ReproduceOptions,
    private readonly train: Dataset,
    private readonly test: Dataset,
  ) {}

  static async open(plan: Plan, options: ReproduceOptions): Promise<Reproduction> {
    const open = (file: string): Promise<Dataset> => openDataset(join(options.data, file));
    return new Reproduction(plan, options, await open(plan.files.train), await open(plan.files.test));
  }

  async close(): Promise<void> {
    await this.train.close();
    await this.test.close();
  }

  async run(): Promise<Results> {
    const { print } = this.options;
    const { folder, result: teacher } = await this.teacher();
    print(`teacher: ${percent(teacher.accuracy)} of the test set, ${teacher.seconds.toFixed(0)} s`);
    const runs: RunResult[] = [];
    const meter = await Meter.open(this.plan, { teacher: folder, train: this.train, test: this.test });
    try {
      for (const planned of runsOf(this.plan)) {
        const result = await this.adapted(planned, folder, meter);
        runs.push(result);
        print(lineOf(result));
      }
    } finally {
      await meter.close();
    }
    return { teacher, runs };
  }

  /** The folder of the trained encoder. */
  private async teacher(): Promise<{ folder: string; result: Results['teacher'] }> {
    const { encoder, teacher, classes } = this.plan;
    return this.once('teacher', { encoder, teacher, classes }, async (folder) => {
      const side = encoder['image_size'] as number;
      const state = join(folder, 'state.safetensors');
      const progress = { state, every: 500, onStep: this.onTeacherStep() };
      const classifier = await trainTeacher(await Labelled.read(this.train, side), { encoder, classes, ...teacher }, progress);
      await classifier.encoder.save(folder);
      const accuracy = await classifier.accuracy(await Labelled.read(this.test, side));
      await classifier.dispose();
      await rm(state, { force: true });
      return { accuracy };
    });
  }

  /** Prints the teacher's progress, ten times. */
  private onTeacherStep(): (step: number) => void {
    const { steps } = this.plan.teacher;
    const every = Math.ceil(steps / 10);
    return (step) => {
      if (step % every === 0) this.options.print(`teacher: step ${step} of ${steps}`);
    };
  }

  private async adapted(planned: RunPlan, teacher: string, meter: Meter): Promise<RunResult> {
    const { adaptation, globalBlocks, samplingSteps, images, paper, files } = this.plan;
    const { seed } = planned;
    const { regime, beta, lambdaDistillation } = this.plan.variants.find(({ id }) => id === planned.variant) as Variant;
    const config: TrainConfig = {
      ...{ ...adaptation, regime, seed, globalBlocks: planned.globalBlocks, encoder: teacher, data: join(this.options.data, files.train) },
      ...(beta === undefined ? {} : { beta }),
      ...(lambdaDistillation === undefined ? {} : { lambdaDistillation }),
    };
    const usual = planned.globalBlocks === globalBlocks;
    const steps = usual && planned.variant === paper ? samplingSteps : [];
    const name = `${planned.variant}-${planned.globalBlocks}-${seed}`;
    const { result } = await this.once(name, { config, steps, images }, async (folder) => {
      const model = await modelOf(join(folder, 'run'), config);
      return { ...planned, ...(await meter.measure(model, { probe: usual, steps })) };
    });
    return result;
  }

  /** Runs `work` in its own folder, unless its result already exists. */
  private async once<T extends object>(
    name: string,
    settings: object,
    work: (folder: string) => Promise<T>,
  ): Promise<{ folder: string; result: T & { seconds: number } }> {
    const pin = createHash('sha256').update(JSON.stringify(settings)).digest('hex').slice(0, 8);
    const folder = join(this.options.work, `${name}-${pin}`);
    const path = join(folder, 'result.json');
    const there = await readFile(path, 'utf8').catch(() => undefined);
    if (there !== undefined) return { folder, result: JSON.parse(there) as T & { seconds: number } };
    await mkdir(folder, { recursive: true });
    const begin = performance.now();
    const result = { ...(await work(folder)), seconds: (performance.now() - begin) / 1000 };
    await writeFile(path, JSON.stringify(result, null, 2));
    return { folder, result };
  }
}

/** All variants for each seed in turn, so that early results cover all variants; then the other decoder depths. */
function runsOf({ variants, paper, globalBlocks, seamBlocks, seeds }: Plan): RunPlan[] {
  const all = Array.from({ length: seeds }, (_, seed) => seed);
  const others = seamBlocks.filter((blocks) => blocks !== globalBlocks);
  return [
    ...all.flatMap((seed) => variants.map(({ id: variant }) => ({ variant, seed, globalBlocks }))),
    ...all.flatMap((seed) => others.map((blocks) => ({ variant: paper, seed, globalBlocks: blocks }))),
  ];
}

/** Trains a model, or resumes an interrupted training. */
async function modelOf(folder: string, config: TrainConfig): Promise<string> {
  const begun = await stat(join(folder, 'state.safetensors')).catch(() => undefined);
  if (begun) return (await resume(folder)).model;
  await rm(folder, { recursive: true, force: true });
  return (await train(folder, config)).model;
}

/** Measures models on the test set. */
class Meter {
  /** Features of the originals, cached by the first measurement. */
  private reference: FeatureSet | undefined;

  private constructor(
    private readonly teacher: VisionEncoder,
    private readonly features: FeatureExtractor,
    private readonly train: Dataset,
    private readonly test: Dataset,
    private readonly shown: NdArray<Uint8Array>,
    private readonly patch: number,
  ) {}

  static async open({ images, patch }: Plan, of: { teacher: string; train: Dataset; test: Dataset }): Promise<Meter> {
    const teacher = await VisionEncoder.load(of.teacher, { dtype: 'bfloat16' });
    const test = first(of.test, images.test);
    const options = {
      batchSize: Math.min(images.seams, test.length),
      size: teacher.config.imageSize,
      crop: 'center',
      epochs: 1,
    } as const;
    const shown = (await batches(test, { ...options, prefetch: 0 }).next()).value?.pixels;
    const train = first(of.train, images.probe);
    return new Meter(teacher, await encoderFeatures(teacher), train, test, shown as NdArray<Uint8Array>, patch);
  }

  async measure(
    folder: string,
    { probe, steps }: { probe: boolean; steps: readonly number[] },
  ): Promise<Omit<RunResult, keyof RunPlan | 'seconds'>> {
    const model = await UniFlow.load(folder, { dtype: 'bfloat16' });
    try {
      const one = await this.evaluated(model, 1, probe);
      const { tokens, latents, teacher } = one.understanding ?? {};
      const { images } = await model.reconstruct({ pixels: this.shown }, { steps: 1 });
      const sampling: Record<string, Quality> = {};
      for (const n of steps) sampling[n] = qualityOf(n === 1 ? one : await this.evaluated(model, n, false));
      return {
        ...qualityOf(one),
        seams: seams(images as NdArray<Uint8Array>, this.shown, this.patch),
        layers: one.layers ?? [],
        pca: pcaOf(one),
        ...(tokens && latents && teacher
          ? { understanding: { tokens: tokens.probe, latents: latents.probe, teacher: teacher.probe } }
          : {}),
        ...(steps.length > 0 ? { sampling } : {}),
      };
    } finally {
      await model.dispose();
    }
  }

  private async evaluated(model: UniFlow, steps: number, probe: boolean): Promise<Evaluation> {
    const { teacher, features, reference, test, train } = this;
    const result = await evaluate(model, {
      data: test,
      teacher,
      features,
      reference,
      steps,
      ...(probe ? { train } : {}),
      latentPool: 'concat',
    });
    this.reference ??= result.featureSets?.reference;
    return result;
  }

  close(): Promise<void> {
    return this.teacher.dispose();
  }
}

function qualityOf({ psnr, ssim, fid }: Evaluation): Quality {
  return { psnr, ssim, fid: (fid as NonNullable<typeof fid>).value };
}

function pcaOf({ baseline }: Evaluation): RunResult['pca'] {
  const { psnr, ssim } = baseline as NonNullable<typeof baseline>;
  return { psnr, ssim };
}

/** The first `count` samples. The hash is cached, because evaluations request it repeatedly. */
function first(dataset: Dataset, count: number): Dataset {
  const kept = subset(
    dataset,
    Array.from({ length: Math.min(count, dataset.length) }, (_, i) => i),
  );
  let hash: Promise<string> | undefined;
  return { ...kept, hash: () => (hash ??= kept.hash()) };
}

export const percent = (share: number): string => `${(100 * share).toFixed(1)} %`;

function lineOf({ variant, seed, globalBlocks, understanding, psnr, ssim, fid, seams, seconds }: RunResult): string {
  const probes = understanding ? `tokens ${percent(understanding.tokens)}, latents ${percent(understanding.latents)}, ` : '';
  const quality = `PSNR ${psnr.toFixed(2)} dB, SSIM ${ssim.toFixed(3)}, FID ${fid.toFixed(2)}, seams ${seams.toFixed(3)}`;
  return `${variant.padEnd(14)} K=${globalBlocks} seed ${seed}: ${probes}${quality}, ${seconds.toFixed(0)} s`;
}
