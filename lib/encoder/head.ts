/**
 * The pooling head that an encoder was trained with. Its tensors are loaded only when {@link VisionEncoder.embed} asks for it, because tokens do not depend on
 * them; `save` writes them as they are in the checkpoint.
 */
import type { Placement } from '../device.js';
import { CheckpointSource, type Checkpoint } from '../io/checkpoint.js';
import { native } from '../native.js';
import { attention, linear, norm, sliceTokens, type Linear } from '../ops.js';
import { keep, tensorOf, tidy, uncancellable, type Tensor } from '../tensor.js';
import type { EncoderConfig, Family } from './config.js';

interface Head {
  /** The encoder's last hidden state [B,S,D] → [B,1,E]. */
  apply: (tokens: Tensor) => Tensor;
  /** Frees what is derived from the parameters. */
  dispose?: () => void;
}

/** The tensor that shows that a checkpoint has the family's head, and how the head is read from `source`, and for CLIP from the larger model. */
interface HeadKind {
  marker: string;
  make: (config: EncoderConfig, source: CheckpointSource, whole: Whole) => Head;
}

/** The checkpoint around the vision tower. */
interface Whole {
  checkpoint: Checkpoint;
  open: (under: string) => CheckpointSource;
}

const kinds: Partial<Record<Family, HeadKind>> = {
  siglip: { marker: 'head.probe', make: attentionPool },
  clip: { marker: 'post_layernorm.weight', make: projectedClassToken },
};

const ANY_OTHER = /(?:)/;
const unset = { value: 0 };

export class PoolingHead {
  private loading: Promise<Head> | undefined;
  private readonly sources: CheckpointSource[] = [];

  private constructor(
    private readonly checkpoint: Checkpoint,
    private readonly config: EncoderConfig,
    private readonly placement: Placement,
    private readonly under: string,
  ) {}

  /** The head of the vision tower whose names begin with `under`; undefined if the checkpoint has none. */
  static of(checkpoint: Checkpoint, config: EncoderConfig, placement: Placement, under: string): PoolingHead | undefined {
    const kind = kinds[config.family];
    return kind && checkpoint.tensors.has(under + kind.marker) ? new PoolingHead(checkpoint, config, placement, under) : undefined;
  }

  /** @throws UniFlowError `BAD_CHECKPOINT` listing the head's missing and misshapen tensors. */
  load(): Promise<Head> {
    return (this.loading ??= this.read());
  }

  private async read(): Promise<Head> {
    const open = (under: string): CheckpointSource => {
      const source = new CheckpointSource(this.checkpoint, this.placement, under);
      this.sources.push(source);
      return source;
    };
    const { make } = kinds[this.config.family] as HeadKind;
    const head = make(this.config, open(this.under), { checkpoint: this.checkpoint, open });
    for (const source of this.sources) await source.guard(() => source.finish(ANY_OTHER));
    return head;
  }

  async dispose(): Promise<void> {
    (await this.loading?.catch(() => undefined))?.dispose?.();
    for (const { tensor } of this.sources.flatMap(({ parameters }) => parameters)) tensor.dispose();
  }
}

/** SigLIP: a learnt token, the probe, attends to all tokens; an MLP with a residual follows. */
function attentionPool({ width: d, hidden, heads, activation, eps }: EncoderConfig, source: CheckpointSource): Head {
  const weights = source.plain('head.attention.in_proj_weight', [3 * d, d], unset);
  const biases = source.plain('head.attention.in_proj_bias', [3 * d], unset);
  const probe = source.plain('head.probe', [1, 1, d], unset, [1, d]);
  const proj = source.linear('head.attention.out_proj', d, d);
  const layerNorm = source.norm('head.layernorm', d, true);
  const fc1 = source.linear('head.mlp.fc1', hidden, d);
  const fc2 = source.linear('head.mlp.fc2', d, hidden);
  let qkv: Required<Linear> | undefined;
  return {
    apply: (tokens) => {
      qkv ??= probing(weights, biases, probe, source.dtype);
      const pooled = linear(sliceTokens(attention(linear(tokens, qkv), heads), 0, 1), proj);
      return linear(linear(norm(pooled, layerNorm, { eps }), fc1, { activation }), fc2, { residual: pooled });
    },
    dispose: () => {
      qkv?.weight.dispose();
      qkv?.bias?.dispose();
    },
  };
}

/**
 * The projection [3D,D] of tokens to keys and values, and to the probe's query, which is the bias of rows of zeros. Our kernel is self-attention: with one query
 * for all tokens, each row of its result is the probe's. In all that costs less than half a layer.
 */
function probing(weights: Tensor, biases: Tensor, probe: Tensor, dtype: 'float32' | 'bfloat16'): Required<Linear> {
  const d = probe.dim(1);
  const part = (all: Tensor, i: number): Tensor => all.slice(i * d, (i + 1) * d);
  const qkv = uncancellable(() =>
    tidy(() => {
      const query = linear(probe, { weight: part(weights, 0), bias: part(biases, 0) }).reshape([d]);
      const [k, v] = [1, 2].map((i) => part(weights, i).reshape([d * d]).handle);
      const weight = tensorOf(native.concat([undefined, k, v])).reshape([3 * d, d]);
      return {
        weight: tensorOf(native.packLinear(weight.handle, dtype)),
        bias: tensorOf(native.concat([query, part(biases, 1), part(biases, 2)].map(({ handle }) => handle))),
      };
    }),
  );
  keep(qkv.weight);
  keep(qkv.bias);
  return qkv;
}

/** CLIP: a norm of the class token and, if the checkpoint is of a model that has one, the projection to the space shared with text. */
function projectedClassToken({ width, eps }: EncoderConfig, source: CheckpointSource, { checkpoint, open }: Whole): Head {
  const postNorm = source.norm('post_layernorm', width, true);
  const under = checkpoint.prefixOf('visual_projection.weight');
  const dimensions = under === undefined ? 0 : (checkpoint.tensors.get(`${under}visual_projection.weight`)?.shape[0] ?? 0);
  const projection = under === undefined ? undefined : open(under).linear('visual_projection', dimensions, width, { bias: false });
  return {
    apply: (tokens) => {
      const token = norm(sliceTokens(tokens, 0, 1), postNorm, { eps });
      return projection ? linear(token, projection) : token;
    },
  };
}
