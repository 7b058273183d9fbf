/** Parameter names of each family, and the layout of its tokens. */
import type { EncoderConfig, Family } from './config.js';

interface LayerNames {
  norm1: string;
  /** One stacked matrix, or separate q, k and v. */
  qkv: string | readonly [string, string, string];
  qNorm?: string;
  kNorm?: string;
  proj: string;
  scale1?: string;
  norm2: string;
  /** The MLP's first layer; several names are stacked (gate, up). */
  fc1: string | readonly string[];
  fc2: string;
  scale2?: string;
}

interface FamilyNames {
  patch: string;
  /** Whether the patch projection has a bias. */
  patchBias: boolean;
  classToken?: { name: string; rank: 1 | 3 };
  /** Whether the class token is trained to represent the image. InternVL drops it. */
  classTokenIsImage?: true;
  registers?: string;
  /** Position table; its first row is for the class token, if there is one. */
  position?: { name: string; rank: 2 | 3 };
  preNorm?: string;
  finalNorm?: string;
  layer(i: number, config: EncoderConfig): LayerNames;
  /** Tensors that a checkpoint of this family may contain but that do not affect its hidden states. */
  unused: RegExp;
}

/** CLIP and SigLIP. */
function contrastiveLayer(i: number): LayerNames {
  const n = `encoder.layers.${i}`;
  return {
    norm1: `${n}.layer_norm1`,
    qkv: [`${n}.self_attn.q_proj`, `${n}.self_attn.k_proj`, `${n}.self_attn.v_proj`],
    proj: `${n}.self_attn.out_proj`,
    norm2: `${n}.layer_norm2`,
    fc1: `${n}.mlp.fc1`,
    fc2: `${n}.mlp.fc2`,
  };
}

export const families: Record<Family, FamilyNames> = {
  internvit: {
    patch: 'embeddings.patch_embedding',
    patchBias: true,
    classToken: { name: 'embeddings.class_embedding', rank: 3 },
    position: { name: 'embeddings.position_embedding', rank: 3 },
    layer: (i) => {
      const n = `encoder.layers.${i}`;
      return {
        norm1: `${n}.norm1`,
        qkv: `${n}.attn.qkv`,
        qNorm: `${n}.attn.q_norm`,
        kNorm: `${n}.attn.k_norm`,
        proj: `${n}.attn.proj`,
        scale1: `${n}.ls1`,
        norm2: `${n}.norm2`,
        fc1: `${n}.mlp.fc1`,
        fc2: `${n}.mlp.fc2`,
        scale2: `${n}.ls2`,
      };
    },
    unused: /^$/,
  },
  internvl: {
    patch: 'embeddings.patch_embeddings.projection',
    patchBias: true,
    classToken: { name: 'embeddings.cls_token', rank: 3 },
    position: { name: 'embeddings.position_embeddings', rank: 3 },
    finalNorm: 'layernorm',
    layer: (i) => {
      const n = `encoder.layer.${i}`;
      return {
        norm1: `${n}.layernorm_before`,
        qkv: [`${n}.attention.q_proj`, `${n}.attention.k_proj`, `${n}.attention.v_proj`],
        qNorm: `${n}.attention.q_norm`,
        kNorm: `${n}.attention.k_norm`,
        proj: `${n}.attention.projection_layer`,
        scale1: `${n}.lambda_1`,
        norm2: `${n}.layernorm_after`,
        fc1: `${n}.mlp.fc1`,
        fc2: `${n}.mlp.fc2`,
        scale2: `${n}.lambda_2`,
      };
    },
    unused: /^(embeddings\.mask_token|layernorm\.)/,
  },
  dinov2: {
    patch: 'embeddings.patch_embeddings.projection',
    patchBias: true,
    classToken: { name: 'embeddings.cls_token', rank: 3 },
    classTokenIsImage: true,
    registers: 'embeddings.register_tokens',
    position: { name: 'embeddings.position_embeddings', rank: 3 },
    finalNorm: 'layernorm',
    layer: (i, config) => {
      const n = `encoder.layer.${i}`;
      const a = `${n}.attention.attention`;
      return {
        norm1: `${n}.norm1`,
        qkv: [`${a}.query`, `${a}.key`, `${a}.value`],
        proj: `${n}.attention.output.dense`,
        scale1: `${n}.layer_scale1.lambda1`,
        norm2: `${n}.norm2`,
        fc1: config.gated ? `${n}.mlp.weights_in` : `${n}.mlp.fc1`,
        fc2: config.gated ? `${n}.mlp.weights_out` : `${n}.mlp.fc2`,
        scale2: `${n}.layer_scale2.lambda1`,
      };
    },
    unused: /^embeddings\.mask_token$/,
  },
  dinov3: {
    patch: 'embeddings.patch_embeddings',
    patchBias: true,
    classToken: { name: 'embeddings.cls_token', rank: 3 },
    classTokenIsImage: true,
    registers: 'embeddings.register_tokens',
    finalNorm: 'norm',
    layer: (i, config) => {
      const n = `layer.${i}`;
      return {
        norm1: `${n}.norm1`,
        qkv: [`${n}.attention.q_proj`, `${n}.attention.k_proj`, `${n}.attention.v_proj`],
        proj: `${n}.attention.o_proj`,
        scale1: `${n}.layer_scale1.lambda1`,
        norm2: `${n}.norm2`,
        fc1: config.gated ? [`${n}.mlp.gate_proj`, `${n}.mlp.up_proj`] : `${n}.mlp.up_proj`,
        fc2: `${n}.mlp.down_proj`,
        scale2: `${n}.layer_scale2.lambda1`,
      };
    },
    unused: /^(embeddings\.mask_token|rope_embeddings\.)/,
  },
  siglip: {
    patch: 'embeddings.patch_embedding',
    patchBias: true,
    position: { name: 'embeddings.position_embedding.weight', rank: 2 },
    finalNorm: 'post_layernorm',
    layer: contrastiveLayer,
    unused: /^(head\.|embeddings\.position_ids)/,
  },
  clip: {
    patch: 'embeddings.patch_embedding',
    patchBias: false,
    classToken: { name: 'embeddings.class_embedding', rank: 1 },
    classTokenIsImage: true,
    position: { name: 'embeddings.position_embedding.weight', rank: 2 },
    preNorm: 'pre_layrnorm', // the spelling of the published names
    layer: contrastiveLayer,
    // HF's last_hidden_state is taken before post_layernorm, which is applied only to the pooled token
    unused: /^(post_layernorm\.|embeddings\.position_ids)/,
  },
};

/** Prefixes of the vision tower in a checkpoint of a larger model. */
export const towerPrefixes: readonly string[] = ['', 'vision_model.', 'vision_tower.', 'model.vision_tower.', 'model.vision_model.'];
