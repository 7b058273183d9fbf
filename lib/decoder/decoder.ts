/** The decoder: latents up to the model's width, global transformer blocks, then the patch-wise pixel flow. */
import { UniFlowError } from '../errors.js';
import { transformerBlock, type Block } from '../encoder/transformer.js';
import { native, type NativeFlowHead, type NativeLayer, type NativeNormalisation } from '../native.js';
import type { ParameterSource } from '../parameters.js';
import { assemble, linear, resizeTable, tensorOf, type Grid, type Linear, type Tensor } from '../tensor.js';
import type { timeGrid } from './schedule.js';

export interface DecoderConfig {
  /** D */
  width: number;
  /** Z */
  latentChannels: number;
  globalBlocks: number;
  flowBlocks: number;
  /** Width of the global blocks' MLP. */
  hidden: number;
  patch: number;
  /** The grid that the position tables were trained for. */
  grid: Grid;
}

const HEADS = 16; // always, whatever the encoder has
const EPS = 1e-5;
const TIME_CHANNELS = 256;

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
  private readonly globalPositions: Tensor; // [N, D]
  private readonly flowPositions: Tensor; // [N, D]
  private readonly blocks: Block[];
  readonly head: NativeFlowHead;

  constructor(
    readonly config: DecoderConfig,
    source: ParameterSource,
    private readonly normalisation: NativeNormalisation,
  ) {
    const d = config.width;
    if (d % HEADS !== 0) throw UniFlowError.expected('UNSUPPORTED', 'hidden_size', `a multiple of the decoder's ${HEADS} heads`, String(d));
    this.up1 = source.linear('chal_unproj.c_fc', d, config.latentChannels);
    this.up2 = source.linear('chal_unproj.c_proj', d, d);
    const patches = config.grid.rows * config.grid.cols;
    const table = (name: string): Tensor => source.plain(name, [1, patches, d], { std: 0.02 }, [patches, d]);
    this.globalPositions = table('global_block_pos_embed');
    this.flowPositions = table('decoder_pos_embed');
    this.blocks = Array.from({ length: config.globalBlocks }, (_, i) => {
      const n = `global_blocks.${i}`;
      return {
        norm1: source.norm(`${n}.norm1`, d, true),
        qkv: source.linear(`${n}.attn.qkv`, 3 * d, d),
        proj: source.linear(`${n}.attn.proj`, d, d),
        norm2: source.norm(`${n}.norm2`, d, true),
        fc1: source.linear(`${n}.mlp.fc1`, config.hidden, d),
        fc2: source.linear(`${n}.mlp.fc2`, d, config.hidden),
      };
    });
    this.head = flowHead(source, config);
  }

  /** Latents [B,N,Z] → condition of each patch, with global context [B,N,D]. */
  condition(latents: Tensor, grid: Grid): Tensor {
    let h = linear(linear(latents, this.up1, { activation: 'gelu' }), this.up2);
    h = assemble(h, { position: this.resized(this.globalPositions, grid) });
    for (const block of this.blocks) h = transformerBlock(h, block, { heads: HEADS, eps: EPS, activation: 'gelu' });
    return assemble(h, { position: this.resized(this.flowPositions, grid) });
  }

  /** Integrates the flow of every patch: [B,N,D] → pixels, uint8 [B,H,W,3] or float32 [B,3,H,W]. */
  integrate(condition: Tensor, grid: Grid, options: FlowOptions): Tensor {
    return tensorOf(
      native.flowIntegrate(this.head, condition.handle, {
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

  /** Velocity of each patch at its own time: x [M,P], t [M], condition [M,D] → [M,P]. */
  velocity(x: Tensor, t: Tensor, condition: Tensor): Tensor {
    return tensorOf(native.flowVelocity(this.head, x.handle, t.handle, condition.handle));
  }

  private resized(table: Tensor, grid: Grid): Tensor {
    const from = this.config.grid;
    return from.rows === grid.rows && from.cols === grid.cols ? table : resizeTable(table, from, grid);
  }
}

function flowHead(source: ParameterSource, config: DecoderConfig): NativeFlowHead {
  const d = config.width;
  const p = 3 * config.patch * config.patch;
  const n = 'flow_head.net';
  const layer = (name: string, out: number, inputs: number): NativeLayer => {
    const { weight, bias } = source.linear(`${n}.${name}`, out, inputs);
    return { weight: weight.handle, bias: bias?.handle };
  };
  return {
    time1: layer('time_embed.mlp.0', d, TIME_CHANNELS),
    time2: layer('time_embed.mlp.2', d, d),
    condition: layer('cond_embed', d, d),
    input: layer('input_proj', d, p),
    blocks: Array.from({ length: config.flowBlocks }, (_, i) => {
      const block = `res_blocks.${i}`;
      const ln = source.norm(`${n}.${block}.in_ln`, d, true);
      return {
        normWeight: (ln.weight as Tensor).handle,
        normBias: (ln.bias as Tensor).handle,
        fc1: layer(`${block}.mlp.0`, d, d),
        fc2: layer(`${block}.mlp.2`, d, d),
        modulation: layer(`${block}.adaLN_modulation.1`, 3 * d, d),
      };
    }),
    finalModulation: layer('final_layer.adaLN_modulation.1', 2 * d, d),
    output: layer('final_layer.linear', p, d),
  };
}

