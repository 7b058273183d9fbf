/**
 * Attention that initially looks at neighbours, for rotary positions that count patches. A score made only of biases depends only on the relative position of
 * two patches. With q = a everywhere, and k = a rotated back by the angles of an offset o,
 *
 *   q_p · k_p' = a² Σ_f cos(ω_f · (p' − p − o)), largest at p' = p + o
 *
 * Half of the heads have one neighbour each and copy some of its first channels; the others start at random.
 */
import type { Matrix } from 'ml-matrix';
import type { Rope } from '../ops.js';
import type { Weights } from './weights.js';

/** (row, column), nearest first. */
const NEIGHBOURS = [
  ...[[0, -1] as const, [0, 1] as const, [-1, 0] as const, [1, 0] as const],
  ...[[-1, -1] as const, [-1, 1] as const, [1, -1] as const, [1, 1] as const],
] as const;
/** Score at the offset itself: 16 leaves the next patch less than e^−8 of the weight. */
const SHARPNESS = 16;
/** Scale of the random part of q and k, which learns what else to attend to. */
const CONTENT = 0.1;

/** `block` is the block's name, up to `.attn`. */
export async function lookAtNeighbours(weights: Weights, block: string, { heads, rope }: { heads: number; rope: Rope }): Promise<void> {
  await weights.edit(`${block}.attn.qkv`, ({ weight, bias }) => {
    const width = weight.columns;
    const size = width / heads;
    const pairs = size / 2; // (i, i + pairs): rows' frequencies, then columns'
    const a = Math.sqrt((SHARPNESS * Math.sqrt(size)) / (pairs / 2));
    for (let head = 0; head < Math.min(heads / 2, NEIGHBOURS.length); head++) {
      const offset = NEIGHBOURS[head] as readonly [number, number];
      for (let i = 0; i < size; i++) for (const part of [0, width]) weight.mulRow(part + head * size + i, CONTENT);
      for (let i = 0; i < pairs; i++) {
        const quarter = pairs / 2;
        const axis = i < quarter ? 0 : 1;
        const angle = offset[axis] * rope.theta ** (-(i % quarter) / quarter);
        const [q, k] = [head * size + i, width + head * size + i];
        bias
          .set(0, q, a)
          .set(0, k, a * Math.cos(angle))
          .set(0, k + pairs, -a * Math.sin(angle));
      }
      for (let i = 0; i < size; i++) takeChannel(weight, 2 * width + head * size + i, i);
    }
  });
}

function takeChannel(weight: Matrix, row: number, channel: number): void {
  weight.setRow(
    row,
    Array.from({ length: weight.columns }, (_, i) => (i === channel ? 1 : 0)),
  );
}
