/** Units that carry channels through an activation unchanged: the building blocks of a linear start. */
import type { Matrix } from 'ml-matrix';
import type { Layer } from './weights.js';

/** x ↦ weight x + bias. */
export interface LinearMap {
  weight: Matrix; // [out, in]
  bias: Float64Array; // [out]
}

/** Shift of a unit without its other half: f(x + SHIFT) is x + SHIFT for nearly all values of a channel of variance 1. */
const SHIFT = 16;

/**
 * GELU and SiLU satisfy f(x) − f(−x) = x, so a channel uses a pair of units, one of each sign. If there are not enough units, the last channels have one
 * each, with the input shifted to where the activation is linear.
 */
export class Units {
  private readonly pairs: number;

  constructor(
    units: number,
    private readonly channels: number,
  ) {
    this.pairs = Math.min(channels, units - channels);
  }

  /** Units 0 to count − 1 are in use; the others keep their random weights. */
  get count(): number {
    return this.channels + this.pairs;
  }

  /** Maps into the units: unit k takes channel k, unit channels + k its negative. */
  enter({ weight, bias }: Layer, map: LinearMap): void {
    for (let k = 0; k < this.channels; k++) {
      const row = map.weight.getRow(k);
      const offset = map.bias[k] as number;
      weight.setRow(k, row);
      bias.set(0, k, k < this.pairs ? offset : offset + SHIFT);
      if (k >= this.pairs) continue;
      const opposite = row.map((w) => -w);
      weight.setRow(this.channels + k, opposite);
      bias.set(0, this.channels + k, -offset);
    }
  }

  /** Clears the input of the units; {@link enterFirst} then sets the input of channel 0's units. */
  clear({ weight, bias }: Layer): void {
    for (let i = 0; i < this.count; i++) {
      weight.setRow(i, new Array<number>(weight.columns).fill(0));
      bias.set(0, i, 0);
    }
  }

  enterFirst({ weight, bias }: Layer, row: readonly number[], offset: number): void {
    const opposite = row.map((w) => -w);
    weight.setRow(0, [...row]).setRow(this.channels, opposite);
    bias.set(0, 0, offset).set(0, this.channels, -offset);
  }

  /** Maps out of the units: the next layer's rows from `first` on become `map` [rows, channels] of the channels, and read nothing else. */
  leave({ weight, bias }: Layer, map: Matrix, first = 0): void {
    for (let i = 0; i < map.rows; i++) {
      const row = new Array<number>(weight.columns).fill(0);
      let offset = 0;
      for (let k = 0; k < this.channels; k++) {
        row[k] = map.get(i, k);
        if (k < this.pairs) row[this.channels + k] = -row[k]!;
        else offset -= SHIFT * row[k]!;
      }
      weight.setRow(first + i, row);
      bias.set(0, first + i, offset);
    }
  }
}
