/** The decoder: projects latents to the model's width, applies global transformer blocks, then the patch-wise pixel flow. */
import { UniFlowError } from '../errors.js';
import { transformerBlock, type Block } from '../encoder/transformer.js';
import { native, type NativeNormalisation } from '../native.js';
import { makeFlowHead, nativeFlowHead, type FlowHead } from './flow.js';
import { GAIN, type ParameterSource } from '../parameters.js';
import { assemble, linear, resizeTable, ropeTable, type Linear, type Rope } from '../ops.js';
import { tensorOf, type Grid, type Tensor } from '../tensor.js';
import type { timeGrid } from './schedule.js';

export interface DecoderConfig {
  /** D */
  width: number;
  /** Number of latent channels, Z. */
  latentChannels: number;
  globalBlocks: number;
  flowBlocks: number;
  /** Width of the global blocks' MLP. */
  hidden: number;
  patch: number;
  /** Grid for which the position tables were trained. */
  grid: Grid;
  /** Rotary positions in the global blocks instead of tables. */
  rope: Rope | undefined;
}

export const HEADS = 16; // fixed, whatever the encoder has
const EPS = 1e-5;

export interface FlowOptions {
  schedule: ReturnType<typeof timeGrid>;
  guidance: number;
  noise: Tensor | undefined; // [B,N,P]
  seed: number;
  ids: Uint32Array;
  output: 'uint8' | 'float32';
}

export class Decoder {
  private readonly up1: Linear;
  private readonly up2: Linear;
  private readonly globalPositions: Tensor | undefined; // [N, D]
  private readonly flowPositions: Tensor | undefined; // [N, D]
  private readonly blocks: Block[];
  readonly head: FlowHead;

  constructor(
    readonly config: DecoderConfig,
    source: ParameterSource,
    private readonly normalisation: NativeNormalisation,
  ) {
    const d = config.width;
    if (d % HEADS !== 0) throw UniFlowError.expected('UNSUPPORTED', 'hidden_size', `a multiple of the decoder's ${HEADS} heads`, String(d));
    this.up1 = source.linear('chal_unproj.c_fc', d, config.latentChannels);
    this.up2 = source.linear('chal_unproj.c_proj', d, d, { gain: GAIN.gelu });
    const patches = config.grid.rows * config.grid.cols;
    const table = (name: string): Tensor | undefined =>
      config.rope ? undefined : source.plain(name, [1, patches, d], { std: 0.02 }, [patches, d]);
    this.globalPositions = table('global_block_pos_embed');
    this.flowPositions = table('decoder_pos_embed');
    const share = 1 / (2 * config.globalBlocks); // as in the encoder
    const quantizable = true;
    this.blocks = Array.from({ length: config.globalBlocks }, (_, i) => {
      const n = `global_blocks.${i}`;
      return {
        norm1: source.norm(`${n}.norm1`, d, true),
        qkv: source.linear(`${n}.attn.qkv`, 3 * d, d, { quantizable }),
        proj: source.linear(`${n}.attn.proj`, d, d, { quantizable, gain: share }),
        norm2: source.norm(`${n}.norm2`, d, true),
        fc1: source.linear(`${n}.mlp.fc1`, config.hidden, d, { quantizable }),
        fc2: source.linear(`${n}.mlp.fc2`, d, config.hidden, { quantizable, gain: share * GAIN.gelu }),
      };
    });
    this.head = makeFlowHead(source, d, 3 * config.patch ** 2, config.flowBlocks);
  }

  /** Latents [B,N,Z] → condition of each patch with global context, [B,N,D]. `recompute`: as in {@link Encoder.forward}. */
  condition(latents: Tensor, grid: Grid, { recompute = false } = {}): Tensor {
    let h = linear(linear(latents, this.up1, { activation: 'gelu' }), this.up2);
    h = this.placed(h, this.globalPositions, grid);
    const { rope, width } = this.config;
    const rotary = rope && this.blocks.length > 0 ? { table: ropeTable(grid, width / HEADS, rope), prefix: 0 } : undefined;
    for (const block of this.blocks) h = transformerBlock(h, block, { heads: HEADS, eps: EPS, activation: 'gelu', rotary, recompute });
    return this.placed(h, this.flowPositions, grid);
  }

  /** Integrates the flow of every patch: [B,N,D] → pixels, uint8 [B,H,W,3] or float32 [B,3,H,W]. */
  integrate(condition: Tensor, grid: Grid, options: FlowOptions): Tensor {
    return tensorOf(
      native.flowIntegrate(nativeFlowHead(this.head), condition.handle, {
        ...options.schedule,
        guidance: options.guidance,
        noise: options.noise?.handle,
        seed: options.seed,
        ids: options.ids,
        ...grid,
        patch: this.config.patch,
        normalisation: this.normalisation,
        output: options.output,
      }),
    );
  }

  /** Adds the positions to h. */
  private placed(h: Tensor, table: Tensor | undefined, grid: Grid): Tensor {
    if (!table) return h;
    const from = this.config.grid;
    return assemble(h, { position: from.rows === grid.rows && from.cols === grid.cols ? table : resizeTable(table, from, grid) });
  }
}
