/**
 * The linear start: a model that begins as the PCA of its patches, within the published architecture.
 *
 * Paired units pass a linear map through an activation exactly (units.ts). Residual branches end in zeros, so every block is the identity. With r_k the
 * patches' principal directions, λ_k their variances and μ the mean:
 *
 *   patch embedding   h_k = s_k r_kᵀ (x − μ), as many as fit; positions in the channels that are left
 *   chal_proj         z_k = h_k / (s_k √λ_k): latents of variance 1
 *   chal_unproj       c_k = z_k
 *   flow head         velocity (x̂ − x) / (1 − t), x̂ = μ + Σ_k √λ_k z_k r_k (flow.ts)
 */
import { Matrix } from 'ml-matrix';
import type { PrincipalComponents } from '../eval/pca.js';
import { HEADS } from '../decoder/decoder.js';
import type { Rope } from '../ops.js';
import type { UniFlowConfig } from '../config.js';
import type { UniFlowModel } from '../model.js';
import { capacity } from './capacity.js';
import { startFlow } from './flow.js';
import { lookAtNeighbours } from './neighbours.js';
import { fitQuantiser, type QuantiserFit } from './quantiser.js';
import { Units, type LinearMap } from './units.js';
import { Weights } from './weights.js';

/** The codec's coefficients as a map of the encoder's tokens. */
export interface Coefficients extends LinearMap {
  /** Their standard deviations. Default: 1. */
  deviations?: Float64Array;
}

/** Power of √λ_k by which the residual stream is divided: 0 keeps the patches' own scale, 1 makes all channels equally large. */
const WHITENING = 0.5;

/** A direction with a smaller share of the first one's variance carries nothing. */
const NEGLIGIBLE = 1e-9;

/** A latent with a smaller deviation carries nothing, and would be amplified noise. */
const DEAD = 1e-3;

/** Makes a random InternViT encoder carry the patches' principal components. @returns latents as a function of its tokens. */
export async function startEncoder(uniflow: UniFlowModel, components: PrincipalComponents): Promise<LinearMap> {
  const weights = new Weights(uniflow);
  const { width, layers, heads, rope } = uniflow.config.encoder;
  const { channels } = capacity(uniflow.config);
  const carried = Math.min(width, components.variances.length);
  const scales = embeddingScales(components.variances.subarray(0, carried));
  await weights.edit('embeddings.patch_embedding', ({ weight, bias }) => {
    for (let k = 0; k < carried; k++) {
      const row = components.directions.getColumn(k).map((v) => v * (scales[k] as number));
      weight.setRow(k, row);
      bias.set(0, k, -row.reduce((sum, w, i) => sum + w * (components.mean[i] as number), 0));
    }
  });
  if (!rope) await weights.editTable('embeddings.position_embedding', (table) => clearColumns(table, carried));
  for (let i = 0; i < layers; i++) await startBlock(weights, `encoder.layers.${i}`, { heads, rope });
  const map = { weight: Matrix.zeros(channels, width), bias: new Float64Array(channels) };
  for (let k = 0; k < channels; k++) map.weight.set(k, k, inverseDeviation(components.variances, k) / (scales[k] as number));
  return map;
}

/** Turns the projection and decoder into the linear codec whose latents are `latents` of the encoder's tokens, of variance at most 1. */
export async function startDecoder(uniflow: UniFlowModel, components: PrincipalComponents, latents: Coefficients): Promise<void> {
  const weights = new Weights(uniflow);
  const { width } = uniflow.config.encoder;
  const { channels } = capacity(uniflow.config);
  const units = new Units(width, channels);
  const { down, up } = latentMaps(uniflow.config, channels, latents.deviations);

  await weights.edit('chal_proj.c_fc', (layer) => units.enter(layer, latents));
  await weights.edit('chal_proj.c_proj', (layer) => {
    units.leave(layer, down.weight);
    down.bias.forEach((b, k) => layer.bias.set(0, k, layer.bias.get(0, k) + b));
  });
  await weights.edit('chal_unproj.c_fc', (layer) => units.enter(layer, up));
  await weights.edit('chal_unproj.c_proj', (layer) => units.leave(layer, Matrix.eye(channels)));
  const { globalBlocks, rope } = uniflow.config.decoder;
  for (let i = 0; i < globalBlocks; i++) await startBlock(weights, `global_blocks.${i}`, { heads: HEADS, rope });
  if (!rope)
    for (const table of ['global_block_pos_embed', 'decoder_pos_embed']) await weights.editTable(table, (t) => clearColumns(t, channels));

  await startFlow(weights, uniflow.config, components, capacity(uniflow.config));
}

/** The codec's K coefficients to the Z latents, and back: unchanged, or fitted to the range of the codes' quantiser. */
function latentMaps(
  { latentChannels, codes }: UniFlowConfig,
  channels: number,
  deviations: Float64Array = new Float64Array(channels).fill(1),
): { down: LinearMap; up: LinearMap } {
  const down = { weight: Matrix.eye(latentChannels, channels), bias: new Float64Array(latentChannels) };
  const up = { weight: Matrix.eye(channels, latentChannels), bias: new Float64Array(channels) };
  if (!codes) return { down, up };
  const fits = codes.map(fitQuantiser);
  for (let k = 0; k < channels; k++) {
    const { gain, offset, slope, intercept } = fits[k % fits.length] as QuantiserFit;
    const deviation = deviations[k] as number;
    if (deviation < DEAD) continue;
    down.weight.set(k, k, gain / deviation);
    down.bias[k] = offset;
    up.weight.set(k, k, slope * deviation);
    up.bias[k] = intercept * deviation;
  }
  return { down, up };
}

/** Attention and MLP initially add nothing: h + 0. Their last layers learn at once, the others as soon as those have changed. */
async function startBlock(weights: Weights, block: string, { heads, rope }: { heads: number; rope: Rope | undefined }): Promise<void> {
  for (const layer of ['attn.proj', 'mlp.fc2']) weights.zero(`${block}.${layer}`);
  if (rope) await lookAtNeighbours(weights, block, { heads, rope });
}

function clearColumns(table: Matrix, count: number): void {
  for (let k = 0; k < count; k++) table.setColumn(k, new Array<number>(table.rows).fill(0));
}

/** s_k ∝ λ_k^(−WHITENING / 2), so that the mean square of all s_k h_k is 1. */
function embeddingScales(variances: Float64Array): Float64Array {
  const floor = NEGLIGIBLE * (variances[0] as number);
  const scales = variances.map((v) => Math.max(v, floor) ** (-WHITENING / 2));
  const mean = variances.reduce((sum, v, k) => sum + v * (scales[k] as number) ** 2, 0) / variances.length;
  return scales.map((s) => s / Math.sqrt(mean));
}

/** 1 / √λ_k; 0 for a direction without variance. */
export function inverseDeviation(variances: Float64Array, k: number): number {
  const variance = variances[k] as number;
  return variance > NEGLIGIBLE * (variances[0] as number) ? 1 / Math.sqrt(variance) : 0;
}
