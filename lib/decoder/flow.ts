/** The pixel flow head: its parameters, and its velocity field as separate operations, which training can differentiate. */
import { native, type FloatType, type NativeFlowHead, type NativeLayer } from '../native.js';
import { activate, add, cast, linear, norm, scaleAdd, split, type Linear, type Norm } from '../ops.js';
import { GAIN, type ParameterSource } from '../parameters.js';
import { recompute } from '../tape.js';
import { tensorOf, type Tensor } from '../tensor.js';

const TIME_CHANNELS = 256;
const EPS = 1e-6;

export interface FlowBlock {
  norm: Norm;
  fc1: Linear;
  fc2: Linear;
  modulation: Linear; // [3D, D]: shift, scale, gate
}

export interface FlowHead {
  time1: Linear; // [D, 256]
  time2: Linear;
  condition: Linear;
  input: Linear; // [D, P]
  blocks: FlowBlock[];
  finalModulation: Linear; // [2D, D]: shift, scale
  output: Linear; // [P, D]
}

/**
 * Checkpoint names `flow_head.net.*`. D is the width, P = 3 * patch². A random head's modulations and last layer are zero (Peebles and Xie 2023, "Scalable
 * Diffusion Models with Transformers"), so its blocks are the identity and its velocity is zero.
 */
export function makeFlowHead(source: ParameterSource, d: number, p: number, blocks: number): FlowHead {
  return source.within('flow_head.net.', () => ({
    // sines and cosines have a mean square of one half
    time1: source.linear('time_embed.mlp.0', d, TIME_CHANNELS, { gain: 2 }),
    time2: source.linear('time_embed.mlp.2', d, d, { gain: GAIN.silu }),
    condition: source.linear('cond_embed', d, d),
    input: source.linear('input_proj', d, p),
    blocks: Array.from({ length: blocks }, (_, i) => ({
      norm: source.norm(`res_blocks.${i}.in_ln`, d, true),
      fc1: source.linear(`res_blocks.${i}.mlp.0`, d, d, { quantizable: true }),
      fc2: source.linear(`res_blocks.${i}.mlp.2`, d, d, { quantizable: true, gain: GAIN.silu }),
      modulation: source.linear(`res_blocks.${i}.adaLN_modulation.1`, 3 * d, d, { quantizable: true, gain: 0 }),
    })),
    finalModulation: source.linear('final_layer.adaLN_modulation.1', 2 * d, d, { gain: 0 }),
    output: source.linear('final_layer.linear', p, d, { gain: 0 }),
  }));
}

/** h + gate * mlp(norm(h) * (1 + scale) + shift), the three modulations from y. */
function flowBlock(h: Tensor, y: Tensor, block: FlowBlock): Tensor {
  const [shift, scale, gate] = split(linear(y, block.modulation), 3) as [Tensor, Tensor, Tensor];
  const u = norm(h, block.norm, { eps: EPS, shift, scale });
  return scaleAdd(h, linear(linear(u, block.fc1, { activation: 'silu' }), block.fc2), { gate });
}

/**
 * Velocity of each patch at its own time, from noise (t = 0) to data (t = 1); the formula is in native/ops/flow.h.
 * @param x float32 [M,P]. @param t float32 [M]. @param c condition [M,D]. @returns float32 [M,P].
 * @param options.recompute in training, recomputes each block in the backward pass instead of keeping its intermediate values.
 */
export function velocity(head: FlowHead, x: Tensor, t: Tensor, c: Tensor, dtype: FloatType, { recompute: again = false } = {}): Tensor {
  const waves = cast(tensorOf(native.timestepEmbedding(t.handle)), dtype);
  const time = linear(linear(waves, head.time1, { activation: 'silu' }), head.time2);
  const y = activate(add(time, linear(c, head.condition)), 'silu');
  let h = linear(cast(x, dtype), head.input);
  for (const block of head.blocks) {
    h = again ? recompute((h, y) => flowBlock(h, y, block), [h, y]) : flowBlock(h, y, block);
  }
  const [shift, scale] = split(linear(y, head.finalModulation), 2) as [Tensor, Tensor];
  return cast(linear(norm(h, {}, { eps: EPS, shift, scale }), head.output), 'float32');
}

/** The head in the form that the fused native integrator takes. */
export function nativeFlowHead(head: FlowHead): NativeFlowHead {
  const layer = ({ weight, bias }: Linear): NativeLayer => ({ weight: weight.handle, bias: bias?.handle });
  return {
    time1: layer(head.time1),
    time2: layer(head.time2),
    condition: layer(head.condition),
    input: layer(head.input),
    blocks: head.blocks.map((block) => ({
      normWeight: (block.norm.weight as Tensor).handle,
      normBias: (block.norm.bias as Tensor).handle,
      fc1: layer(block.fc1),
      fc2: layer(block.fc2),
      modulation: layer(block.modulation),
    })),
    finalModulation: layer(head.finalModulation),
    output: layer(head.output),
  };
}
