/**
 * A UniFlow model whose weights are computed instead of trained, so that it really reconstructs: every patch's latent is its
 * low discrete cosine frequencies (as in JPEG), and the flow leads from any noise straight to the pixels they stand for.
 *
 * It shows what each part does, gives the quickstart something to see, and tests the whole pipeline: its reconstruction of a
 * photograph is known in closed form. It understands nothing; a trained checkpoint replaces it.
 *
 *   npx tsx examples/dct.ts DIR
 */
import { mkdir, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const PATCH = 14;
const P = 3 * PATCH * PATCH; // pixels of a patch
const D = 768; // width: room for P pixels, and for the latents twice
const SIZE = 224;
const N = (SIZE / PATCH) ** 2;
const MEAN = [0.485, 0.456, 0.406];
const STD = [0.229, 0.224, 0.225];
/** Kept frequencies: of brightness, and of each of the two colour differences. */
const KEPT = [96, 16, 16] as const;
const Z = KEPT[0] + KEPT[1] + KEPT[2];

/** Orthonormal opponent colours: brightness, yellow-blue, red-green. */
const COLOURS = [
  [1 / Math.sqrt(3), 1 / Math.sqrt(3), 1 / Math.sqrt(3)],
  [1 / Math.sqrt(6), 1 / Math.sqrt(6), -2 / Math.sqrt(6)],
  [1 / Math.sqrt(2), -1 / Math.sqrt(2), 0],
] as const;

/** [Z][P]: the patch patterns, orthonormal over (channel, row, column) in units of 0-1 pixels. */
function basis(): number[][] {
  const wave = (k: number, x: number): number => Math.sqrt((k === 0 ? 1 : 2) / PATCH) * Math.cos((Math.PI * (x + 0.5) * k) / PATCH);
  const frequencies = Array.from({ length: PATCH * PATCH }, (_, i) => [Math.floor(i / PATCH), i % PATCH] as const);
  frequencies.sort(([a, b], [c, d]) => Math.hypot(a, b) - Math.hypot(c, d));
  return KEPT.flatMap((kept, colour) =>
    frequencies.slice(0, kept).map(([u, v]) =>
      Array.from({ length: P }, (_, i) => {
        const channel = Math.floor(i / (PATCH * PATCH));
        return COLOURS[colour]![channel]! * wave(u, Math.floor(i / PATCH) % PATCH) * wave(v, i % PATCH);
      }),
    ),
  );
}

type Tensors = Map<string, { shape: number[]; data: Float32Array }>;

function weights(): Tensors {
  const tensors: Tensors = new Map();
  const zeros = (name: string, ...shape: number[]): Float32Array => {
    const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
    tensors.set(name, { shape, data });
    return data;
  };
  const matrix = (name: string, out: number, inputs: number): Float32Array => {
    zeros(`${name}.bias`, out);
    return zeros(`${name}.weight`, out, inputs);
  };
  const bias = (name: string): Float32Array => tensors.get(`${name}.bias`)!.data;
  const patterns = basis();

  // Encoder: the patch embedding measures each pattern in the patch; the one transformer layer is switched off (LayerScale 0).
  zeros('embeddings.class_embedding', 1, 1, D);
  zeros('embeddings.position_embedding', 1, N + 1, D);
  const embed = zeros('embeddings.patch_embedding.weight', D, 3, PATCH, PATCH);
  const centre = zeros('embeddings.patch_embedding.bias', D);
  patterns.forEach((pattern, z) =>
    pattern.forEach((value, i) => {
      const channel = Math.floor(i / (PATCH * PATCH));
      embed[z * P + i] = value * STD[channel]!; // pixels come normalised: x = 0.5 + (std * x̂ + mean - 0.5)
      centre[z] = centre[z]! + value * (MEAN[channel]! - 0.5);
    }),
  );
  const layer = 'encoder.layers.0';
  for (const norm of ['norm1', 'norm2']) {
    zeros(`${layer}.${norm}.weight`, D);
    zeros(`${layer}.${norm}.bias`, D);
  }
  matrix(`${layer}.attn.qkv`, 3 * D, D);
  matrix(`${layer}.attn.proj`, D, D);
  matrix(`${layer}.mlp.fc1`, 16, D);
  matrix(`${layer}.mlp.fc2`, D, 16);
  zeros(`${layer}.ls1`, D);
  zeros(`${layer}.ls2`, D);

  // Projections: gelu(a) - gelu(-a) = a, so a value and its opposite go through the activation unharmed.
  passThrough(matrix, 'chal_proj.c_fc', 'chal_proj.c_proj');
  passThrough(matrix, 'chal_unproj.c_fc', 'chal_unproj.c_proj');
  zeros('global_block_pos_embed', 1, N, D);
  zeros('decoder_pos_embed', 1, N, D);

  // Flow: y = silu(±z), so y₊ - y₋ = z, which becomes the shift behind the last norm.
  const n = 'flow_head.net';
  matrix(`${n}.time_embed.mlp.0`, D, 256);
  matrix(`${n}.time_embed.mlp.2`, D, D);
  const condition = matrix(`${n}.cond_embed`, D, D);
  const modulation = matrix(`${n}.final_layer.adaLN_modulation.1`, 2 * D, D);
  for (let z = 0; z < Z; z++) {
    condition[z * D + z] = 1;
    condition[(Z + z) * D + z] = -1;
    modulation[(P + z) * D + z] = 1;
    modulation[(P + z) * D + Z + z] = -1;
  }
  // The norm would divide the noise by its own deviation; large constants beside it make the divisor one and the same.
  const input = matrix(`${n}.input_proj`, D, P);
  const constant = 30;
  const spare = D - P;
  for (let i = 0; i < P; i++) input[i * P + i] = 1; // [D, P]: row i, column i
  for (let i = 0; i < spare; i++) bias(`${n}.input_proj`)[P + i] = i % 2 ? -constant : constant;
  const deviation = Math.sqrt((P + spare * constant ** 2) / D);

  // v = pixels(z) - noise: with one step from t = 0, noise + v is the picture.
  const output = matrix(`${n}.final_layer.linear`, P, D);
  for (let i = 0; i < P; i++) {
    const channel = Math.floor(i / (PATCH * PATCH));
    output[i * D + i] = -deviation;
    let constants = 0;
    for (let z = 0; z < Z; z++) {
      const weight = patterns[z]![i]! / STD[channel]!;
      output[i * D + P + z] = weight;
      constants += (weight * (z % 2 ? -constant : constant)) / deviation; // the normalised constants lie under the shift
    }
    bias(`${n}.final_layer.linear`)[i] = (0.5 - MEAN[channel]!) / STD[channel]! - constants;
  }
  return tensors;
}

/** Two layers around a GELU that give their first Z inputs back. */
function passThrough(matrix: (name: string, out: number, inputs: number) => Float32Array, first: string, second: string): void {
  const down = first.startsWith('chal_proj');
  const inputs = down ? D : Z;
  const outputs = down ? Z : D;
  const a = matrix(first, D, inputs);
  const b = matrix(second, outputs, D);
  for (let z = 0; z < Z; z++) {
    a[z * inputs + z] = 1;
    a[(Z + z) * inputs + z] = -1;
    b[z * D + z] = 1;
    b[z * D + Z + z] = -1;
  }
}

const config = {
  model_type: 'uniflow',
  hidden_act: 'gelu',
  hidden_size: D,
  vit_hidden_size: D,
  intermediate_size: 16,
  num_attention_heads: 12,
  num_hidden_layers: 1,
  num_channels: 3,
  image_size: SIZE,
  patch_size: PATCH,
  layer_norm_eps: 1e-6,
  norm_type: 'layer_norm',
  qk_normalization: false,
  qkv_bias: true,
  use_chal_proj: true,
  latent_ch: Z,
  use_global_blocks: false,
  global_blocks_depth: 0,
  decoder_type: 'mlp',
  num_decoder_layers: 0,
  num_sampling_steps: '1',
};

/** Writes the model folder. */
export async function writeDctModel(dir: string): Promise<void> {
  const tensors = weights();
  const header: Record<string, unknown> = {};
  let offset = 0;
  for (const [name, { shape, data }] of tensors) {
    header[name] = { dtype: 'F32', shape, data_offsets: [offset, offset + data.byteLength] };
    offset += data.byteLength;
  }
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  const chunks = [...tensors.values()].map(({ data }) => Buffer.from(data.buffer));
  await mkdir(dir, { recursive: true });
  await writeFile(join(dir, 'model.safetensors'), Buffer.concat([length, json, ...chunks]));
  await writeFile(join(dir, 'config.json'), JSON.stringify(config, null, 2) + '\n');
}

if (process.argv[1] && resolve(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const dir = process.argv[2];
  if (!dir) throw new Error('usage: npx tsx examples/dct.ts DIR');
  await writeDctModel(dir);
  console.log(`wrote ${dir}`);
}
