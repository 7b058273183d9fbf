/**
 * The minimum cost of the operations, computed from their shapes: floating-point operations (a multiply-add counts as two), and bytes moved
 * to and from memory, each operand once. Formulas as in native/ops/*.h.
 *
 * Softmax, activations, norms and biases do not count as FLOPs if matrix products dominate.
 */
import { decoderFlops, encoderFlops, projectionFlops } from '../lib/cli/cost.js';
import type { UniFlowConfig } from '../lib/config.js';
import type { FloatType } from '../lib/native.js';

/** The roofline bound of an operation is the longer of the two times; omit a cost that does not matter. */
export interface Cost {
  flops?: number;
  bytes?: number;
}

export const sizeOf = (dtype: FloatType | 'int8'): number => ({ int8: 1, bfloat16: 2, float32: 4 })[dtype];

export interface LinearShape {
  rows: number;
  inputs: number;
  outputs: number;
  /** Dtype of the activations. */
  dtype: FloatType;
  /** Dtype of the weight, if it differs. */
  weight?: FloatType | 'int8';
  residual?: boolean;
}

/** Reads x, the residual, weight and bias, and writes the output. The vectors (bias, scale) are float32; one is counted for both. */
export function linearCost({ rows, inputs, outputs, dtype, weight = dtype, residual = false }: LinearShape): Required<Cost> {
  const elements = rows * inputs + rows * outputs * (residual ? 2 : 1);
  return { flops: 2 * rows * inputs * outputs, bytes: elements * sizeOf(dtype) + outputs * inputs * sizeOf(weight) + 4 * outputs };
}

export interface AttentionShape {
  batch: number;
  heads: number;
  seq: number;
  headDim: number;
  dtype: FloatType;
}

/** Two products of 2*S*S*E each per head; reads q, k and v, and writes one matrix of the same size. */
export function attentionCost({ batch, heads, seq, headDim, dtype }: AttentionShape): Required<Cost> {
  const width = heads * headDim;
  return { flops: 4 * batch * seq * seq * width, bytes: 4 * batch * seq * width * sizeOf(dtype) };
}

export interface FlowShape {
  patches: number;
  width: number;
  patch: number;
  blocks: number;
  steps: number;
  guided: boolean;
  dtype: FloatType;
}

/**
 * With guidance, a second pass runs with a zero condition. Its modulations (3*D*D per block, 2*D*D at the end) are the same for all patches
 * of a step, so the bound does not count them per patch.
 */
export function flowCost({ patches, width: d, patch, blocks, steps, guided, dtype }: FlowShape): Required<Cost> {
  const p = 3 * patch * patch;
  const modulations = 3 * blocks * d * d + 2 * d * d;
  const pass = 2 * p * d + 2 * blocks * d * d; // input and output, fc1 and fc2
  const step = guided ? 2 * pass + modulations : pass + modulations;
  const weights = 256 * d + 2 * d * d + pass + modulations; // plus time and condition
  return {
    flops: 2 * patches * (steps * step + d * d),
    bytes: (weights + patches * d) * sizeOf(dtype) + patches * p, // reads conditions, writes uint8 pixels
  };
}

/** Encoding images to latents. */
export function encodeCost({ encoder, decoder }: UniFlowConfig, images: number): { flops: number } {
  return { flops: images * (encoderFlops(encoder) + projectionFlops(decoder)) };
}

/** Decoding latents to images, without guidance. */
export function decodeCost({ decoder }: UniFlowConfig, images: number, steps: number): { flops: number } {
  return { flops: images * decoderFlops(decoder, steps) };
}

/**
 * A training step: the forward passes of student and decoder, backward passes of twice that cost (one product for the gradient of each
 * operand), and the teacher's forward pass. Each patch has its own time, so the time embedding is counted per patch.
 */
export function trainingCost(config: UniFlowConfig, images: number): { flops: number } {
  const { width, grid } = config.decoder;
  const times = 2 * images * grid.rows * grid.cols * width * (256 + width);
  const forward = encodeCost(config, images).flops + decodeCost(config, images, 1).flops + times;
  return { flops: 3 * forward + images * encoderFlops(config.encoder) };
}
