/**
 * Reverse-mode differentiation. While a tape records, every operation on something that it watches leaves an entry: what
 * went in, what came out, and how to turn a gradient of the one into gradients of the other. `backward` walks the entries
 * from the last to the first. Everything is queued, nothing waits: the whole step belongs into one tidy().
 */
import { native } from './native.js';
import { tensorOf, tidy, type Tensor } from './tensor.js';

/** A gradient still to be multiplied, also by an element of a vector on the device: the sum that takes it in does that too. */
export interface ScaledGradient {
  gradient: Tensor;
  scale: number;
  factor?: Tensor;
  index?: number;
}

type Gradient = Tensor | ScaledGradient;

/**
 * From the gradients of an entry's outputs to those of its inputs, in their order; undefined where there is none.
 * The gradient of a loss, which is a scalar, is a number. `sums` are the gradients found so far, for who adds to them itself.
 */
export type Backward = (gradients: (Tensor | undefined)[], loss: number, sums: Map<Tensor, Tensor>) => (Gradient | undefined)[];

/** Where differentiation begins: a loss with its weight (nothing may follow on a loss), or another output with its gradient. */
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

  /** @param parameters what gradients are wanted of. */
  constructor(readonly parameters: readonly Tensor[]) {
    this.known = new Set(parameters);
  }

  /** Records what `fn` computes. */
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

  /** Whether the gradient with respect to `tensor` is wanted, for its own sake or on the way to another. */
  watches(tensor: Tensor | undefined): boolean {
    return tensor !== undefined && this.known.has(tensor);
  }

  /** @internal */
  add(entry: Entry): void {
    this.entries.push(entry);
    for (const output of entry.outputs) this.known.add(output);
  }

  /**
   * Gradients of sum(scale * loss) + sum(gradient * output) with respect to all that was watched and used, added to those in
   * `gradients`. Can be called once.
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
      if (loss === undefined && of.every((g) => g === undefined)) continue; // leads to no loss
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

/** The tape that must know of an operation on `inputs`, if any. */
export function recording(...inputs: (Tensor | undefined)[]): Tape | undefined {
  return inputs.some((input) => active?.watches(input)) ? active : undefined;
}

/** Runs `fn` unseen by any tape. */
export function unrecorded<T>(fn: () => T): T {
  const outer = active;
  active = undefined;
  try {
    return fn();
  } finally {
    active = outer;
  }
}

/** Tells the recording tape, if `inputs` concern it, how to differentiate what made `output`. Returns `output`. */
export function differentiable(
  output: Tensor,
  inputs: readonly (Tensor | undefined)[],
  backward: (gradient: Tensor) => (Gradient | undefined)[],
): Tensor {
  recording(...inputs)?.add({ outputs: [output], inputs, backward: ([gradient]) => backward(gradient as Tensor) });
  return output;
}

/**
 * fn(...inputs), of whose values between input and output nothing is kept for the backward pass, which computes them again
 * (activation checkpointing). What it costs is a second forward pass; the gradients are the same to the last bit.
 * @param fn makes one tensor of the inputs and of parameters; it must not take in anything else that a gradient is wanted of.
 */
export function recompute<Inputs extends Tensor[]>(fn: (...inputs: Inputs) => Tensor, inputs: [...Inputs]): Tensor {
  const outer = active;
  if (!outer) return fn(...inputs);
  const wanted = [...inputs.filter((input) => outer.watches(input)), ...outer.parameters];
  const run = (tape: Tape): Tensor => tape.record(() => fn(...inputs));
  const forgotten = new Tape(wanted); // on a tape all the same: what is recorded need not round as what is not
  const output = tidy(() => run(forgotten));
  if (!forgotten.watches(output)) return output;
  const backward: Backward = ([gradient], _, sums) => {
    tidy(() => {
      const tape = new Tape(wanted);
      tape.backward([{ output: run(tape), gradient: gradient as Tensor }], sums);
      return wanted.map((tensor) => sums.get(tensor)); // what of it lives on
    });
    return [];
  };
  outer.add({ outputs: [output], inputs: [], backward });
  return output;
}

/** Tells the recording tape of a loss whose gradient with respect to `value` is known already. Returns `loss`. */
export function withGradient(loss: Tensor, value: Tensor, gradient: Tensor): Tensor {
  recording(value)?.add({ outputs: [loss], inputs: [value], backward: (_, scale) => [{ gradient, scale }] });
  return loss;
}
