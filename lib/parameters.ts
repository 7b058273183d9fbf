/** A model's parameters: their source (a checkpoint, or random numbers) and the names under which they are saved. */
import { type Placement } from './device.js';
import { native, type Activation, type FloatType, type TensorHandle, type WeightType } from './native.js';
import { type Linear, type Norm } from './ops.js';
import { onDevice, tensorOf, type Tensor } from './tensor.js';

/** Initial value of a parameter that is not loaded: normal, truncated at two standard deviations, or constant. */
export type Init = { std: number } | { value: number };

/** 1 / E[f(n)²] of an activation f, n standard normal: the {@link LinearParameters.gain} of a matrix applied to its output. */
export const GAIN: Readonly<Record<Activation | 'swiglu', number>> = {
  ...{ gelu: 2.3517, gelu_tanh: 2.3519, quick_gelu: 2.3699, silu: 2.8108, swiglu: 2.8108 },
};

/** Options of {@link ParameterSource.linear}. */
export interface LinearParameters {
  /** Whether each stacked layer has a bias in the checkpoint. Default true. */
  bias?: boolean | readonly boolean[];
  /** The stored shape, if it is not [out, in]. */
  weightShape?: readonly number[];
  /** float8, if the model uses it. */
  compact?: boolean;
  /** Whether it may become int8: see {@link Parameter.quantizable}. */
  quantizable?: boolean;
  /**
   * Random weights are scaled by fan-in, with variance gain / in: an input of mean square 1 / gain gives outputs of variance 1 (He et al. 2015, "Delving Deep
   * into Rectifiers"). 0: they start at zero. Default 1.
   */
  gain?: number;
}

/** One tensor of the checkpoint layout. A parameter may be several concatenated ones (q, k, v). */
export interface Part {
  name: string;
  shape: readonly number[];
  /** Missing from the checkpoint, replaced by rows of zeros (DINOv3's key bias). */
  absent?: boolean;
}

export interface Parameter {
  tensor: Tensor;
  parts: readonly Part[];
  /** Weight of a linear layer: stored and computed in the model's dtype, and subject to weight decay. */
  matrix: boolean;
  /** Whether lib/quantize.ts may replace it by int8: the large layers that meet activations of a block. */
  quantizable: boolean;
}

/** Replaces a parameter's value outside of a trainer; a matrix is packed for products in `dtype`. */
export function assignParameter({ tensor, matrix }: Parameter, value: TensorHandle, dtype: FloatType): void {
  tensor.assign(matrix ? native.packLinear(value, dtype) : native.copyParameter(value, 'float32'));
}

/** Makes parameters by name and remembers them. */
export abstract class ParameterSource {
  readonly parameters: Parameter[] = [];

  constructor(readonly placement: Placement) {}

  get dtype(): FloatType {
    return this.placement.dtype;
  }

  /** All parts concatenated, as a tensor of `shape`; a matrix is packed for products in `dtype`. */
  protected abstract make(parts: readonly Part[], shape: readonly number[], dtype: WeightType, packed: boolean, init: Init): Tensor;

  /** Returns the object that `make` builds from these parameters. If it throws, the parameters are freed at once instead of by the garbage collector. */
  guard<T>(make: () => T): T {
    const drop = (error: unknown): never => {
      for (const { tensor } of this.parameters) tensor.dispose();
      throw error;
    };
    try {
      const made = make();
      return made instanceof Promise ? (made.catch(drop) as T) : made;
    } catch (error) {
      return drop(error);
    }
  }

  private prefix = '';

  /** Adds `prefix` to every name that `fn` requests. */
  within<T>(prefix: string, fn: () => T): T {
    const outer = this.prefix;
    this.prefix = outer + prefix;
    try {
      return fn();
    } finally {
      this.prefix = outer;
    }
  }

  private add(
    parts: readonly Part[],
    shape: readonly number[],
    dtype: WeightType,
    init: Init,
    { matrix, quantizable }: Pick<Parameter, 'matrix' | 'quantizable'> = { matrix: false, quantizable: false },
  ): Tensor {
    const named = parts.map((part) => ({ ...part, name: this.prefix + part.name }));
    const tensor = onDevice(this.placement.device, () => this.make(named, shape, dtype, matrix, init));
    this.parameters.push({ tensor, parts: named, matrix, quantizable });
    return tensor;
  }

  /** float32, in its own shape or reshaped to `as`. */
  plain(name: string, shape: readonly number[], init: Init, as: readonly number[] = shape): Tensor {
    return this.add([{ name, shape }], as, 'float32', init);
  }

  norm(name: string, width: number, bias: boolean): Norm {
    return {
      weight: this.plain(`${name}.weight`, [width], { value: 1 }),
      bias: bias ? this.plain(`${name}.bias`, [width], { value: 0 }) : undefined,
    };
  }

  /** `name.weight` [out, in] and `name.bias` [out]. Several names are stacked, with an equal number of rows each. */
  linear(
    name: string | readonly string[],
    out: number,
    inputs: number,
    { bias = true, weightShape, compact = false, quantizable = false, gain = 1 }: LinearParameters = {},
  ): Linear {
    const names = typeof name === 'string' ? [name] : name;
    const rows = out / names.length;
    const has = names.map((_, i) => (typeof bias === 'boolean' ? bias : (bias[i] as boolean)));
    const weights = names.map((n) => ({ name: `${n}.weight`, shape: weightShape ?? [rows, inputs] }));
    const biases = names.map((n, i) => ({ name: `${n}.bias`, shape: [rows], absent: !has[i] }));
    const dtype = compact && this.placement.float8 ? 'float8' : this.dtype;
    return {
      weight: this.add(weights, [out, inputs], dtype, { std: Math.sqrt(gain / inputs) }, { matrix: true, quantizable }),
      bias: has.includes(true) ? this.add(biases, [out], 'float32', { value: 0 }) : undefined,
    };
  }
}

/** The parameters of an existing model. Both own them; neither changes them. */
export class SharedSource extends ParameterSource {
  private readonly byName: Map<string, Tensor>;

  constructor(
    placement: Placement,
    parameters: readonly Parameter[],
    private readonly ownPrefix: string,
  ) {
    super(placement);
    this.byName = new Map(parameters.map(({ tensor, parts }) => [(parts[0] as Part).name, tensor]));
  }

  protected make(parts: readonly Part[]): Tensor {
    const name = (parts[0] as Part).name.slice(this.ownPrefix.length);
    return tensorOf((this.byName.get(name) as Tensor).handle.share());
  }
}

/** Standard deviation of a standard normal distribution truncated at two deviations. */
const CUT_OFF = 0.87962566;

/** Parameters drawn at random: the same for the same seed, whatever the dtype, device or thread count. */
export class RandomSource extends ParameterSource {
  private stream = 0;

  constructor(
    placement: Placement,
    private readonly seed: number,
  ) {
    super(placement);
  }

  protected make(_parts: readonly Part[], shape: readonly number[], dtype: WeightType, packed: boolean, init: Init): Tensor {
    if ('value' in init) return tensorOf(native.constantParameter(shape, init.value));
    return tensorOf(native.randomParameter(shape, dtype, packed, this.seed, this.stream++, init.std / CUT_OFF));
  }
}
