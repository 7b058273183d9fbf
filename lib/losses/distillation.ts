/**
 * Layer-wise adaptive self-distillation, the paper's L_dist: every layer of the student is kept close to its frozen teacher; deeper and worse-aligned layers
 * get a larger weight.
 *
 *   α_l = mean over tokens of (1 − cos(student_l, teacher_l))
 *   w_l = (l/L) exp(β α_l) / Σ_k (k/L) exp(β α_k)
 *   L_dist = Σ_l w_l α_l,  with w_l constant for the gradient
 *
 * Contract and cost are in native/ops/losses.h, the kernel is native/cpu/distillation.cpp.
 */
import type { NdArray } from 'ndarray';
import { UniFlowError } from '../errors.js';
import { native, type LayerWeights } from '../native.js';
import { recording } from '../tape.js';
import { Tensor, tensorOf } from '../tensor.js';

export const DEFAULT_BETA = 2;

export interface DistillationLoss {
  loss: Tensor; // [1]
  alpha: Tensor; // [L]
  weight: Tensor; // [L]
}

/** Queues the loss of two stacks of L tensors [B,S,D], layer 1 first. The first `skip` tokens are not compared. */
export function distillationLoss(
  student: readonly Tensor[],
  teacher: readonly Tensor[],
  { beta = DEFAULT_BETA, skip = 0, weights = 'adaptive' }: { beta?: number; skip?: number; weights?: LayerWeights } = {},
): DistillationLoss {
  const handles = (stack: readonly Tensor[]) => stack.map((t) => t.handle);
  const tape = recording(...student);
  const d = native.distillation(handles(student), handles(teacher), beta, skip, weights, tape !== undefined);
  const [loss, alpha, weight] = [tensorOf(d.loss), tensorOf(d.alpha), tensorOf(d.weight)];
  const grads = d.grads.map(tensorOf);
  // The kernel's gradients are those of the alphas. The layer's weight, known only now, is multiplied in when they are accumulated.
  tape?.add({
    outputs: [loss],
    inputs: student,
    backward: (_, scale) => grads.map((gradient, index) => ({ gradient, factor: weight, index, scale })),
  });
  return { loss, alpha, weight };
}

/**
 * The loss of two stacks of arrays [B,S,D] and, if requested, its gradients with respect to the student.
 * @throws UniFlowError `BAD_INPUT` if the stacks do not match.
 */
export async function distillation(
  student: readonly NdArray[],
  teacher: readonly NdArray[],
  {
    beta = DEFAULT_BETA,
    grads = false,
    skip = 0,
    weights = 'adaptive',
  }: { beta?: number; grads?: boolean; skip?: number; weights?: LayerWeights } = {},
): Promise<{ loss: number; alpha: number[]; weight: number[]; grads?: NdArray[] }> {
  if (!Number.isFinite(beta)) throw UniFlowError.expected('BAD_INPUT', 'beta', 'a finite number', String(beta));
  const tensors: Tensor[] = [];
  const upload = (stack: readonly NdArray[]): Tensor[] => stack.map((a) => (tensors.push(Tensor.from(a)), tensors.at(-1) as Tensor));
  try {
    const [s, t] = [upload(student), upload(teacher)];
    const d = native.distillation(
      s.map((x) => x.handle),
      t.map((x) => x.handle),
      beta,
      skip,
      weights,
      grads,
    );
    const scaled = d.grads.map((g, i) => native.add(undefined, g, d.weight, i, 1));
    tensors.push(...[d.loss, d.alpha, d.weight, ...d.grads, ...scaled].map((handle) => new Tensor(handle)));
    const numbers = async (handle: typeof d.loss): Promise<number[]> => [...((await new Tensor(handle).read()).data as Float32Array)];
    const [loss, alpha, weight] = await Promise.all([numbers(d.loss), numbers(d.alpha), numbers(d.weight)]);
    const arrays = await Promise.all(scaled.map((handle) => new Tensor(handle).read()));
    return { loss: loss[0] as number, alpha, weight, ...(grads ? { grads: arrays } : {}) };
  } finally {
    for (const tensor of tensors) tensor.dispose();
  }
}
