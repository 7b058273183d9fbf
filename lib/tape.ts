/**
 * Reverse-mode differentiation. While a tape records, every operation on a watched tensor adds an entry: its inputs, its outputs, and a function from output
 * gradients to input gradients. `backward` visits the entries from last to first. Everything is queued and nothing waits, so a whole step fits in one tidy().
 */
import { native } from './native.js';
import { tensorOf, tidy, type Tensor } from './tensor.js';

/** A gradient that is still to be multiplied, possibly by an element of a vector on the device. The multiplication is fused into the addition. */
export interface ScaledGradient {
  gradient: Tensor;
  scale: number;
  factor?: Tensor;
  index?: number;
}

type Gradient = Tensor | ScaledGradient;

/**
 * Maps the gradients of an entry's outputs to those of its inputs, in order; undefined if there is none. The gradient of a loss, which is a scalar, is a
 * number. `sums`: gradients accumulated so far, for entries that accumulate in place.
 */
export type Backward = (gradients: (Tensor | undefined)[], loss: number, sums: Map<Tensor, Tensor>) => (Gradient | undefined)[];

/** Start of differentiation: a loss with its weight (nothing may depend on the loss), or another output with its gradient. */
export type Origin = { loss: Tensor; scale: number } | { output: Tensor; gradient: Tensor };

interface Entry {
  outputs: readonly Tensor[];
  inputs: readonly (Tensor | undefined)[];
  backward: Backward;
}

let active: Tape | undefined;

export class Tape {
  private readonly entries: Entry[] = [];
  private readonly known: Set<Tensor>;

  /** @param parameters tensors to differentiate with respect to. */
  constructor(readonly parameters: readonly Tensor[]) {
    this.known = new Set(parameters);
  }

  /** Records the operations in `fn`. */
  record<T>(fn: () => T): T {
    const outer = active;
    // eslint-disable-next-line @typescript-eslint/no-this-alias -- the tape that records is a module variable
    active = this;
    try {
      return fn();
    } finally {
      active = outer;
    }
  }

  /** Whether the gradient with respect to `tensor` is needed, for its own sake or to compute another one. */
  watches(tensor: Tensor | undefined): boolean {
    return tensor !== undefined && this.known.has(tensor);
  }

  /** @internal */
  add(entry: Entry): void {
    this.entries.push(entry);
    for (const output of entry.outputs) this.known.add(output);
  }

  /**
   * Returns the gradients of sum(scale * loss) + sum(gradient * output) with respect to everything watched and used, added to those in `gradients`. Can be
   * called only once.
   */
  backward(origins: readonly Origin[], gradients = new Map<Tensor, Tensor>()): Map<Tensor, Tensor> {
    const scales = new Map<Tensor, number>();
    for (const origin of origins) {
      if ('loss' in origin) scales.set(origin.loss, origin.scale);
      else gradients.set(origin.output, origin.gradient);
    }
    for (let entry = this.entries.pop(); entry; entry = this.entries.pop()) {
      const of = entry.outputs.map((output) => gradients.get(output));
      const loss = scales.get(entry.outputs[0] as Tensor);
      if (loss === undefined && of.every((g) => g === undefined)) continue; // does not lead to a loss
      for (const output of entry.outputs) gradients.delete(output);
      const inputs = entry.inputs;
      entry.backward(of, loss ?? 0, gradients).forEach((gradient, i) => {
        const input = inputs[i];
        if (gradient && input && this.known.has(input)) gradients.set(input, accumulate(gradients.get(input), gradient));
      });
    }
    return gradients;
  }
}

/** sum + gradient, in one pass. */
function accumulate(sum: Tensor | undefined, gradient: Gradient): Tensor {
  const { gradient: g, factor, index = 0, scale } = 'gradient' in gradient ? gradient : { gradient, scale: 1 };
  if (!sum && !factor && scale === 1) return g;
  return tensorOf(native.add(sum?.handle, g.handle, factor?.handle, index, scale));
}

/** The tape that must record an operation on `inputs`, if any. */
export function recording(...inputs: (Tensor | undefined)[]): Tape | undefined {
  return inputs.some((input) => active?.watches(input)) ? active : undefined;
}

/** Runs `fn` without recording. */
export function unrecorded<T>(fn: () => T): T {
  const outer = active;
  active = undefined;
  try {
    return fn();
  } finally {
    active = outer;
  }
}

/** If a tape records one of `inputs`, adds an entry for the operation that made `output`. Returns `output`. */
export function differentiable(
  output: Tensor,
  inputs: readonly (Tensor | undefined)[],
  backward: (gradient: Tensor) => (Gradient | undefined)[],
): Tensor {
  recording(...inputs)?.add({ outputs: [output], inputs, backward: ([gradient]) => backward(gradient as Tensor) });
  return output;
}

/**
 * fn(...inputs), without keeping intermediate values for the backward pass, which recomputes them (activation checkpointing). It costs a second forward pass;
 * the gradients are bit-identical.
 * @param fn makes one tensor from the inputs and from parameters. It must not use any other tensor that needs a gradient.
 */
export function recompute<Inputs extends Tensor[]>(fn: (...inputs: Inputs) => Tensor, inputs: [...Inputs]): Tensor {
  const outer = active;
  if (!outer) return fn(...inputs);
  const wanted = [...inputs.filter((input) => outer.watches(input)), ...outer.parameters];
  const run = (tape: Tape): Tensor => tape.record(() => fn(...inputs));
  const forgotten = new Tape(wanted); // record anyway: recorded operations may round differently from unrecorded ones
  const output = tidy(() => run(forgotten));
  if (!forgotten.watches(output)) return output;
  const backward: Backward = ([gradient], _, sums) => {
    tidy(() => {
      const tape = new Tape(wanted);
      tape.backward([{ output: run(tape), gradient: gradient as Tensor }], sums);
      return wanted.map((tensor) => sums.get(tensor)); // the only tensors of it that survive
    });
    return [];
  };
  outer.add({ outputs: [output], inputs: [], backward });
  return output;
}

/** Adds a loss whose gradient with respect to `value` is already known. Returns `loss`. */
export function withGradient(loss: Tensor, value: Tensor, gradient: Tensor): Tensor {
  recording(value)?.add({ outputs: [loss], inputs: [value], backward: (_, scale) => [{ gradient, scale }] });
  return loss;
}
