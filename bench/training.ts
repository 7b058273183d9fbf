/** Operations used only in training: the losses with their gradients, the optimizer, and the whole step through the public API. */
import ndarray from 'ndarray';
import { parseUniFlowConfig, presets } from '../lib/config.js';
import { native, type FloatType, type NativeOptimizedParameter } from '../lib/native.js';
import { Trainer } from '../lib/train/trainer.js';
import { UniFlow } from '../lib/uniflow.js';
import { sizeOf, trainingCost } from './costs.js';
import type { Row } from './harness.js';
import { noisePixels, type Inputs, onBench } from './inputs.js';
import { watchProcess } from './watch.js';

const base = parseUniFlowConfig(presets.base);

/** Reads both stacks once and writes the gradient once. */
function distillation(layers: number, batch: number, tokens: number, width: number, dtype: FloatType): Row {
  const shape = [batch, tokens, width];
  return {
    ...{ family: 'training', name: 'distillation with gradient', shape: [layers, ...shape].join('x'), dtype },
    cost: { bytes: 3 * layers * batch * tokens * width * sizeOf(dtype) },
    setup: (make) => {
      const stack = () => Array.from({ length: layers }, () => make.tensor(shape, dtype));
      const [student, teacher] = [stack(), stack()];
      return () => {
        const { loss, ...rest } = native.distillation(student, teacher, 2, 1, 'adaptive', true);
        for (const handle of [rest.alpha, rest.weight, ...rest.grads]) handle.dispose();
        return loss;
      };
    },
  };
}

function crossEntropy(rows: number, classes: number, dtype: FloatType): Row {
  return {
    ...{ family: 'training', name: 'cross-entropy with gradient', shape: `${rows}x${classes}`, dtype },
    cost: { bytes: 2 * rows * classes * sizeOf(dtype) + 4 * rows },
    setup: (make) => {
      const logits = make.tensor([rows, classes], dtype);
      const labels = make.keep(
        native.fromHost(
          Int32Array.from({ length: rows }, (_, i) => (i * 7) % classes),
          [rows],
        ),
      );
      return () => {
        const { loss, grad, correct } = native.crossEntropy(logits, labels);
        for (const handle of [grad, correct]) handle.dispose();
        return loss;
      };
    },
  };
}

/** Shapes of an encoder's parameters, for its optimizer. */
function encoderShapes({ encoder: { width: d, hidden, layers }, patch }: typeof base): number[][] {
  const block = [[3 * d, d], [3 * d], [d, d], [d], [hidden, d], [hidden], [d, hidden], [d], [d], [d], [d], [d]];
  return [[d, 3 * patch * patch], [d], ...Array.from({ length: layers }, () => block).flat()];
}

const countOf = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** Reads master, gradient and both moments; writes master, moments and a bfloat16 copy. */
function adamw(): Row {
  const shapes = encoderShapes(base);
  const parameters = shapes.reduce((sum, shape) => sum + countOf(shape), 0);
  const ofMaster = (make: Inputs, shape: number[]): NativeOptimizedParameter => ({
    ...{ parameter: make.tensor(shape, 'float32'), grad: make.tensor(shape, 'float32'), average: undefined },
    ...{ m: make.tensor(shape, 'float32'), v: make.keep(native.constantParameter(shape, 1)) },
    ...{ compute: make.tensor(shape, 'bfloat16'), lr: 1e-4, weightDecay: 0.05 },
  });
  return {
    ...{ family: 'training', name: 'AdamW of ViT-B', shape: `${(parameters / 1e6).toFixed(1)}M`, dtype: 'float32' },
    cost: { bytes: parameters * (4 * 4 + 3 * 4 + 2) },
    setup: (make) => {
      const all = shapes.map((shape) => ofMaster(make, shape));
      const norm = make.keep(native.constantParameter([1], 1));
      return () => {
        native.adamw(all, norm, { beta1: 0.9, beta2: 0.95, eps: 1e-8, ema: 0, clip: 1, step: 100 });
        return native.synchronize();
      };
    },
  };
}

/** ViT-B/14 with its teacher and its decoder. Recomputation does not raise the bound, because it is avoidable work. */
function step(batch: number, dtype: FloatType, recompute: boolean): Row {
  const [height, width] = base.imageSize;
  const shape = [batch, height, width, 3];
  return {
    ...{ family: 'training', name: `step of base${recompute ? ', recomputing' : ''}`, shape: shape.join('x'), dtype, images: batch },
    cost: trainingCost(base, batch),
    watch: watchProcess,
    setup: (make) => {
      native.trimMemory(); // so that resident memory measures this training
      const [student, teacher] = [0, 1].map((seed) => UniFlow.random('base', { ...onBench(), dtype, seed })) as [UniFlow, UniFlow];
      make.onRelease(() => Promise.all([student.dispose(), teacher.dispose()]));
      const trainer = new Trainer(student, { teacher, recompute });
      make.onRelease(() => trainer.finish());
      const pixels = ndarray(noisePixels(batch * height * width), shape);
      return () => trainer.step({ pixels });
    },
  };
}

export const rows: Row[] = [
  ...(['bfloat16', 'float32'] as const).flatMap((dtype) => [distillation(24, 4, 1024, 1024, dtype), crossEntropy(4096, 1000, dtype)]),
  adamw(),
  step(8, 'bfloat16', false),
  step(8, 'bfloat16', true),
];
