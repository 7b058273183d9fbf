/**
 * The flow head's linear start: velocity (x̂ − x) / (1 − t), straight from any x to the image x̂ given by the latents. So any number of Euler steps,
 * including one, gives the same image. In the principal directions r_k of patches, M of them:
 *
 *   input_proj        h = Q (x − μ) + constants, Q = the directions, turned
 *   first block       h −= Q (x̂ − μ): shift = z, scale = −1, gate = 1
 *   last layer        −σ Qᵀ LN(h) (1 + s(t)), s(t) = t / (1 − t) from the time embedding
 *
 * LN, which has no parameters, subtracts the mean of h and divides by its deviation σ, which differs from patch to patch. Neither may affect the noise. A
 * reflection makes Q orthogonal to (1, …, 1), and constants ±C in the spare channels make up nearly all of σ. Without a block, the last layer's own shift
 * carries x̂, and the velocity is x̂ − x at all times, which is right for one step.
 */
import { Matrix } from 'ml-matrix';
import type { UniFlowConfig } from '../config.js';
import type { PrincipalComponents } from '../eval/pca.js';
import type { Kept } from './capacity.js';
import { Units, type LinearMap } from './units.js';
import type { Weights } from './weights.js';

const HEAD = 'flow_head.net';
/** Share of the codec's own error that the variation of σ between patches may add (0.1 dB). */
const TOLERANCE = 0.02;
/** Upper bound of the constants' energy over the energy of all else. */
const MOST_CONSTANT = 1024;
/** Number of hinges of s(t): a geometric series of times. */
const HINGES = 16;
/** Sharpness of a hinge, relative to the distance to the next. */
const SHARPNESS = 10;
/** Index of the wave sin t in the timestep embedding, sin(1000 t · 10000^(−96/128)), after 128 cosines. */
const SINE = 128 + 96;

/** The condition's first channels are the latents. */
export async function startFlow(
  weights: Weights,
  config: UniFlowConfig,
  components: PrincipalComponents,
  { channels, noise }: Kept,
): Promise<void> {
  const { width, flowBlocks } = config.decoder;
  const codec = flowBlocks > 0;
  const units = new Units(width, channels + 1); // of y = silu(time + condition): s(t), then the latents
  await weights.edit(`${HEAD}.cond_embed`, (layer) => units.enter(layer, behindTime(Matrix.eye(channels, width))));
  await startTime(weights, units);

  const carrier = reflected(width, noise); // [D,M]
  const directions = carrier.mmul(components.directions.subMatrix(0, components.mean.length - 1, 0, noise - 1).transpose()); // Q [D,P]
  const mean = directions.mmul(Matrix.columnVector(components.mean)).to1DArray();
  const image = carrier.subMatrix(0, width - 1, 0, channels - 1); // −Q (x̂ − μ) of the latents [D,K]
  image.mulRowVector(Array.from({ length: channels }, (_, k) => -Math.sqrt(components.variances[k] as number)));
  const energy = noise + (codec ? image.norm('frobenius') ** 2 : 0);
  const residual = components.variances.subarray(channels).reduce((a, b) => a + b, 0);
  const { constants, deviation } = constantChannels(width, noise, { energy, residual });
  await weights.edit(`${HEAD}.input_proj`, ({ weight, bias }) => {
    weight.setSubMatrix(directions, 0, 0);
    constants.forEach((c, i) => bias.set(0, i, c - (mean[i] as number)));
  });
  await weights.edit(`${HEAD}.final_layer.linear`, ({ weight, bias }) => {
    weight.setSubMatrix(directions.transpose().mul(-deviation), 0, 0);
    bias.mul(0);
  });
  const last = `${HEAD}.final_layer.adaLN_modulation.1`;
  if (!codec) return weights.edit(last, (layer) => units.leave(layer, ofLatents(Matrix.div(image, deviation))));
  await weights.edit(last, (layer) => units.leave(layer, ofTime(width, channels), width));
  await startBlock(weights, units, image);
}

/** The first block adds `image` [D,K] applied to the latents. */
async function startBlock(weights: Weights, units: Units, image: Matrix): Promise<void> {
  const { rows: width, columns: channels } = image;
  const block = `${HEAD}.res_blocks.0`;
  const inner = new Units(width, channels);
  await weights.edit(`${block}.adaLN_modulation.1`, (layer) => {
    units.leave(layer, ofLatents(Matrix.eye(width, channels)));
    for (let i = 0; i < width; i++) {
      layer.bias.set(0, width + i, -1); // scale
      layer.bias.set(0, 2 * width + i, 1); // gate
    }
  });
  await weights.edit(`${block}.mlp.0`, (layer) =>
    inner.enter(layer, { weight: Matrix.eye(channels, width), bias: new Float64Array(channels) }),
  );
  await weights.edit(`${block}.mlp.2`, (layer) => inner.leave(layer, image));
}

/** Maps into and out of the units of y, where s(t) comes before the latents. */
const behindTime = (latents: Matrix): LinearMap => ({
  weight: Matrix.zeros(latents.rows + 1, latents.columns).setSubMatrix(latents, 1, 0),
  bias: new Float64Array(latents.rows + 1),
});
const ofLatents = (map: Matrix): Matrix => Matrix.zeros(map.rows, map.columns + 1).setSubMatrix(map, 0, 1);
const ofTime = (rows: number, channels: number): Matrix => Matrix.zeros(rows, channels + 1).setSubMatrix(Matrix.ones(rows, 1), 0, 0);

/**
 * Puts s(t) = t / (1 − t) in the first channel of `units`, and nothing that depends on time in the others. s is approximated linearly between times at which
 * 1 − t has fallen by a fourth root of 2, up to 15/16, and continues linearly from there. Over u = sin t, one of the embedding's waves, this is a sum of
 * hinges. Each is a unit silu(k (u − u_j)) / k, sharp compared to the distance to the next.
 */
async function startTime(weights: Weights, units: Units): Promise<void> {
  const knots = Array.from({ length: HINGES + 1 }, (_, j) => 1 - 2 ** (-j / 4));
  const [u, s] = [knots.map(Math.sin), knots.map((t) => t / (1 - t))] as [number[], number[]];
  const between = (list: number[], j: number): number => (list[j + 1] as number) - (list[j] as number);
  const hinges = Array.from({ length: HINGES }, (_, j) => {
    const slope = between(s, j) / between(u, j) - (j === 0 ? 0 : between(s, j - 1) / between(u, j - 1));
    return { at: u[j] as number, sharpness: SHARPNESS / between(u, j), slope };
  });
  await weights.edit(`${HEAD}.time_embed.mlp.0`, ({ weight, bias }) => {
    hinges.forEach(({ at, sharpness }, j) => {
      weight.setRow(
        j,
        Array.from({ length: weight.columns }, (_, i) => (i === SINE ? sharpness : 0)),
      );
      bias.set(0, j, -sharpness * at);
    });
  });
  const atZero = hinges.reduce((sum, h) => sum + (h.slope / h.sharpness) * silu(-h.sharpness * h.at), 0);
  await weights.edit(`${HEAD}.time_embed.mlp.2`, ({ weight, bias }) => {
    const curve = Array.from({ length: weight.columns }, (_, j) => (hinges[j] ? hinges[j].slope / hinges[j].sharpness : 0));
    units.clear({ weight, bias });
    units.enterFirst({ weight, bias }, curve, -atZero);
  });
}

const silu = (x: number): number => x / (1 + Math.exp(-x));

/** [D,M] with orthonormal columns, each orthogonal to (1, …, 1): a reflection of the first M + 1 axes that maps the last of them to (1, …, 1). */
function reflected(width: number, columns: number): Matrix {
  const n = columns + 1;
  const v = Matrix.ones(n, 1).mul(1 / Math.sqrt(n));
  v.set(columns, 0, v.get(columns, 0) - 1);
  const reflection = Matrix.sub(Matrix.eye(n), v.mmul(v.transpose()).mul(2 / v.dot(v)));
  const out = Matrix.zeros(width, columns);
  return out.setSubMatrix(reflection.subMatrix(0, columns, 0, columns - 1), 0, 0);
}

/**
 * ±C in the channels not used by the noise, and the deviation σ of all channels; `energy` E is that of the other channels. |h|² varies between patches by
 * about E. So with constants of energy κE, σ varies by 1 / 2κ of itself, and the error of a patch grows by E / 4κ², which should be {@link TOLERANCE} of the
 * residual. Larger constants would only enlarge the last layer's weights, which contain σ.
 */
function constantChannels(
  width: number,
  noise: number,
  { energy, residual }: { energy: number; residual: number },
): { constants: number[]; deviation: number } {
  const kappa = Math.min(MOST_CONSTANT, Math.sqrt(energy / (4 * TOLERANCE * residual)));
  const spare = (width - noise - 1) & ~1; // equally many of each sign
  const value = Math.ceil(Math.sqrt((kappa * energy) / spare)); // whole numbers are exact in bfloat16, up to 256
  const constants = Array.from({ length: width }, (_, i) => (i <= noise || i > noise + spare ? 0 : i % 2 === 0 ? value : -value));
  return { constants, deviation: Math.sqrt((energy + spare * value ** 2) / width) };
}
