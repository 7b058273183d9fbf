/** A vision transformer of any family: its parameters, and its forward pass as queued operations. */
import { UniFlowError } from '../errors.js';
import { runBatches, type BatchRun } from '../gather.js';
import type { FloatType, NativeNormalisation } from '../native.js';
import { GAIN, type ParameterSource } from '../parameters.js';
import { add, assemble, norm, patchEmbed, reshape, resizeTable, ropeTable, sliceTokens, type Linear, type Norm } from '../ops.js';
import { recording } from '../tape.js';
import { gridOf, keep, tidy, uncancellable, type Grid, type Tensor } from '../tensor.js';
import type { EncoderConfig } from './config.js';
import { families } from './families.js';
import { transformerBlock, type Block } from './transformer.js';

/** Number of position tables kept, for the most recently used grids. */
const KEPT_GRIDS = 16;

/** Computes a cached tensor. It must survive the scope of the call that first needs it, and that call's cancellation. */
const derived = (fn: () => Tensor): Tensor => keep(uncancellable(() => tidy(fn)));

export interface EncoderOutput {
  /** Output of the last layer and the final norm: [B, prefix + N, D]. */
  last: Tensor;
  /** The embedding and every layer's output, L+1 tensors [B, prefix + N, D]; empty unless requested. */
  states: Tensor[];
  /** Sum of the outputs of the last {@link ForwardOptions.layers} layers, without the final norm; of one layer, `last`. */
  sum: Tensor;
}

export interface ForwardOptions {
  /** Every layer's output as well. Default false. */
  states?: boolean;
  /** In training, computes each block again in the backward pass instead of keeping what is inside. Default false. */
  recompute?: boolean;
  /** Layers to add up for {@link EncoderOutput.sum}. Default 1. */
  layers?: number;
  /** Embeds the patches instead of the encoder's own {@link Encoder.makeEmbedding}. */
  embedding?: Linear | undefined;
}

export class Encoder {
  private readonly projection: Linear;
  private readonly classToken: Tensor | undefined; // [1, 1, D]
  private readonly registers: Tensor | undefined; // [1, R, D]
  private readonly position: Tensor | undefined; // [1, (1 +) N, D]
  private readonly preNorm: Norm | undefined;
  private readonly finalNorm: Norm | undefined;
  private readonly blocks: Block[];
  private readonly grids = new Map<string, Tensor>();
  private prefixTokens: Tensor | undefined;

  constructor(
    readonly config: EncoderConfig,
    source: ParameterSource,
    private readonly normalisation: NativeNormalisation,
    private readonly dtype: FloatType,
  ) {
    const names = families[config.family];
    const d = config.width;
    const grid = this.trainedGrid;
    const random = { std: 0.02 };
    if (names.classToken)
      this.classToken = source.plain(names.classToken.name, names.classToken.rank === 1 ? [d] : [1, 1, d], random, [1, 1, d]);
    if (names.registers && config.registers > 0) this.registers = source.plain(names.registers, [1, config.registers, d], random);
    this.projection = this.makeEmbedding(source, names.patch);
    if (names.position && !config.rope) {
      const rows = grid.rows * grid.cols + (names.classToken ? 1 : 0);
      this.position = source.plain(names.position.name, names.position.rank === 2 ? [rows, d] : [1, rows, d], random, [1, rows, d]);
    }
    this.preNorm = names.preNorm ? source.norm(names.preNorm, d, true) : undefined;
    this.blocks = Array.from({ length: config.layers }, (_, i) => this.makeBlock(source, i));
    this.finalNorm = names.finalNorm && config.finalNorm ? source.norm(names.finalNorm, d, true) : undefined; // always LayerNorm, whatever the layers use
  }

  /** A patch embedding of this encoder's shape. */
  makeEmbedding(source: ParameterSource, name: string): Linear {
    const { family, width, patch } = this.config;
    return source.linear(name, width, 3 * patch ** 2, { bias: families[family].patchBias, weightShape: [width, 3, patch, patch] });
  }

  private makeBlock(source: ParameterSource, i: number): Block {
    const c = this.config;
    const n = families[c.family].layer(i, c);
    const d = c.width;
    const withBias = c.norm === 'layer';
    const scale = (name: string | undefined): Tensor | undefined =>
      c.layerScale && name ? source.plain(name, [d], { value: 1 }) : undefined;
    const qkNorm = (name: string | undefined): Tensor | undefined =>
      c.qkNorm && name ? source.plain(`${name}.weight`, [d], { value: 1 }) : undefined;
    const eightBit = { compact: true, quantizable: true };
    const share = 1 / (2 * c.layers); // per branch, of which there are 2L: the residual stream's variance at most doubles
    return {
      norm1: source.norm(n.norm1, d, withBias),
      qkv: source.linear(n.qkv, 3 * d, d, { bias: typeof n.qkv === 'string' ? c.bias.q : [c.bias.q, c.bias.k, c.bias.v], ...eightBit }),
      qNorm: qkNorm(n.qNorm),
      kNorm: qkNorm(n.kNorm),
      proj: source.linear(n.proj, d, d, { bias: c.bias.proj, ...eightBit, gain: share }),
      scale1: scale(n.scale1),
      norm2: source.norm(n.norm2, d, withBias),
      fc1: source.linear(n.fc1, c.gated ? 2 * c.hidden : c.hidden, d, { bias: c.bias.mlp, ...eightBit }),
      fc2: source.linear(n.fc2, d, c.hidden, { bias: c.bias.mlp, ...eightBit, gain: share * GAIN[c.gated ? 'swiglu' : c.activation] }),
      scale2: scale(n.scale2),
    };
  }

  /** Patch grid of the trained image size. */
  get trainedGrid(): Grid {
    return gridOf(this.config.imageSize, this.config.patch);
  }

  get hasClassToken(): boolean {
    return this.classToken !== undefined;
  }

  /** Number of tokens before the patches: class token and registers. */
  get prefix(): number {
    return (this.classToken ? 1 : 0) + this.config.registers;
  }

  /** Patch grid of pixels [B,H,W,3] or [B,3,H,W]. */
  gridOf(pixels: Tensor): Grid {
    const size = (pixels.dtype === 'uint8' ? pixels.shape.slice(1, 3) : pixels.shape.slice(2, 4)) as [number, number];
    const grid = gridOf(size, this.config.patch);
    if (grid.rows > 0 && grid.cols > 0) return grid;
    throw UniFlowError.expected('BAD_INPUT', 'image size', `at least one patch of ${this.config.patch} pixels`, size.join('x'));
  }

  /** Queues the forward pass of pixels, uint8 [B,H,W,3] or float32 [B,3,H,W] normalised; call it inside tidy(). */
  forward(
    pixels: Tensor,
    { states: wanted = false, recompute = false, layers = 1, embedding = this.projection }: ForwardOptions = {},
  ): EncoderOutput {
    const c = this.config;
    const grid = this.gridOf(pixels);
    let h = patchEmbed(pixels, {
      projection: embedding,
      prefix: this.prefixOf(),
      position: this.position && this.positionsFor(grid),
      patch: c.patch,
      normalisation: this.normalisation,
      dtype: this.dtype,
    });
    if (this.preNorm) h = norm(h, this.preNorm, { eps: c.eps });
    const states = wanted ? [h] : [];
    const options = {
      heads: c.heads,
      eps: c.eps,
      qkEps: c.qkEps,
      rms: c.norm === 'rms',
      activation: c.activation,
      gated: c.gated,
      rotary: c.rope === undefined ? undefined : { table: this.positionsFor(grid), prefix: this.prefix },
      recompute,
    };
    let sum: Tensor | undefined;
    for (const [i, block] of this.blocks.entries()) {
      h = transformerBlock(h, block, options);
      if (wanted) states.push(h);
      if (i >= c.layers - layers) sum = sum ? add(sum, h) : h;
    }
    const last = this.finalNorm ? norm(h, this.finalNorm, { eps: c.eps }) : h;
    return { last, states, sum: layers > 1 && sum ? sum : last };
  }

  /** Class token with its position, then the registers: [T, D]. */
  private prefixOf(): Tensor | undefined {
    const cls = this.classToken;
    if (!cls) return undefined;
    if (recording(cls, this.position, this.registers)) return this.makePrefix(cls);
    this.prefixTokens ??= derived(() => this.makePrefix(cls));
    return this.prefixTokens;
  }

  private makePrefix(cls: Tensor): Tensor {
    const d = this.config.width;
    const own = this.position && reshape(sliceTokens(this.position, 0, 1), [1, d]);
    const placed = assemble(cls, { position: own });
    const all = this.registers ? assemble(this.registers, { prefix: reshape(placed, [1, d]) }) : placed;
    return reshape(all, [this.prefix, d]);
  }

  /** The position table [N, D] (or the rotary one) resized to `grid`, cached for the next image of that size. */
  private positionsFor(grid: Grid): Tensor {
    if (recording(this.position)) return this.makePositions(grid);
    const key = `${grid.rows}x${grid.cols}`;
    let table = this.grids.get(key);
    this.grids.delete(key);
    table ??= derived(() => this.makePositions(grid));
    this.grids.set(key, table);
    for (const [oldest, tensor] of this.grids) {
      if (this.grids.size <= KEPT_GRIDS) break;
      tensor.dispose();
      this.grids.delete(oldest);
    }
    return table;
  }

  private makePositions(grid: Grid): Tensor {
    const c = this.config;
    if (c.rope) return ropeTable(grid, c.width / c.heads, c.rope);
    const position = this.position as Tensor;
    const from = this.trainedGrid;
    const table = reshape(sliceTokens(position, this.classToken ? 1 : 0, position.dim(1)), [from.rows * from.cols, c.width]);
    return from.rows === grid.rows && from.cols === grid.cols ? table : resizeTable(table, from, grid, { antialias: c.antialiasPositions });
  }

  /**
   * {@link runBatches} with this encoder. If memory runs out, a cached table may have failed as well, so the tables are dropped and made again for the next
   * image.
   */
  async running(run: BatchRun): ReturnType<typeof runBatches> {
    try {
      return await runBatches(run);
    } catch (error) {
      if (error instanceof UniFlowError && error.code === 'OUT_OF_MEMORY') this.invalidate();
      throw error;
    }
  }

  /** Drops everything derived from the parameters, because they have changed or are freed. The parameters themselves belong to the model. */
  invalidate(): void {
    for (const table of this.grids.values()) table.dispose();
    this.grids.clear();
    this.prefixTokens?.dispose();
    this.prefixTokens = undefined;
  }
}
