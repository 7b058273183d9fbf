/**
 * Reverse-mode differentiation. While a tape records, every operation on something that it watches leaves an entry: what
 * went in, what came out, and how to turn a gradient of the one into gradients of the other. `backward` walks the entries
 * from the last to the first. Everything is queued, nothing waits: the whole step belongs into one tidy().
 */
import { native } from './native.js';
import { tensorOf, type Tensor } from './tensor.js';

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
 * The gradient of a loss, which is a scalar, is a number.
 */
export type Backward = (gradients: (Tensor | undefined)[], loss: number) => (Gradient | undefined)[];

interface Entry {
  outputs: readonly Tensor[];
  inputs: readonly (Tensor | undefined)[];
  backward: Backward;
}

let active: Tape | undefined;

export class Tape {
  private readonly entries: Entry[] = [];
  private readonly known = new Set<Tensor>();

  /** @param parameters what gradients are wanted of. */
  constructor(parameters: Iterable<Tensor>) {
    for (const p of parameters) this.known.add(p);
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

  /** Gradients of sum(scale * loss) with respect to all that was watched and used. Can be called once. */
  backward(losses: readonly { loss: Tensor; scale: number }[]): Map<Tensor, Tensor> {
    const gradients = new Map<Tensor, Tensor>();
    const scales = new Map(losses.map(({ loss, scale }) => [loss, scale]));
    for (let entry = this.entries.pop(); entry; entry = this.entries.pop()) {
      const of = entry.outputs.map((output) => gradients.get(output));
      const loss = scales.get(entry.outputs[0] as Tensor);
      if (loss === undefined && of.every((g) => g === undefined)) continue; // leads to no loss
      for (const output of entry.outputs) gradients.delete(output);
      const inputs = entry.inputs;
      entry.backward(of, loss ?? 0).forEach((gradient, i) => {
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

/** Tells the recording tape of a loss whose gradient with respect to `value` is known already. Returns `loss`. */
export function withGradient(loss: Tensor, value: Tensor, gradient: Tensor): Tensor {
  recording(value)?.add({ outputs: [loss], inputs: [value], backward: (_, scale) => [{ gradient, scale }] });
  return loss;
}
