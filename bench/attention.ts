/** Self-attention. Compute-bound, because the scores stay in the caches. */
import { native } from '../lib/native.js';
import { attentionCost, type AttentionShape } from './costs.js';
import type { Row } from './harness.js';

type Shape = Omit<AttentionShape, 'dtype'>;
const shapes: Shape[] = [
  { batch: 1, heads: 16, seq: 1025, headDim: 64 }, // ViT-L at 448 px
  { batch: 4, heads: 16, seq: 1025, headDim: 64 },
  { batch: 4, heads: 16, seq: 1024, headDim: 64 }, // the decoder's global blocks
  { batch: 1, heads: 16, seq: 4097, headDim: 64 }, // ViT-L at 896 px
  { batch: 1, heads: 12, seq: 197, headDim: 64 }, // ViT-B at 224 px
];

export const rows: Row[] = (['bfloat16', 'float32'] as const).flatMap((dtype) =>
  shapes.map(({ batch, heads, seq, headDim }) => ({
    ...{ family: 'attention', name: 'attention', shape: `${batch}x${heads}x${seq}x${headDim}`, dtype },
    cost: attentionCost({ batch, heads, seq, headDim, dtype }),
    setup: (make) => {
      const x = make.tensor([batch, seq, 3 * heads * headDim], dtype);
      return () => native.attention(x, heads);
    },
  })),
);
