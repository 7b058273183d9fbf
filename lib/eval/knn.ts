/**
 * k-nearest-neighbour accuracy on frozen features with DINO's protocol (Caron et al. 2021, `eval_knn.py`): with cosine similarity s, the k nearest training
 * features vote for their class with weight exp(s / 0.07). If classes have equal votes, the lowest number wins.
 */
import type { NdArray } from 'ndarray';
import { checkInteger, checkNumber, checkOptions } from '../check.js';
import { native } from '../native.js';
import { linear, norm } from '../ops.js';
import { cancellable, Tensor, tensorOf, tidy } from '../tensor.js';
import { checkLabelled, type LabelledFeatures } from './labelled.js';

export interface KnnOptions {
  /** Number of neighbours that vote, limited by the size of `train`. Default 20. */
  k?: number;
  /** Default 0.07. */
  temperature?: number;
  signal?: AbortSignal | undefined;
}

export const KNN_DEFAULTS = { k: 20, temperature: 0.07 } as const;

/** Approximate number of similarities in memory at a time. */
const BLOCK = 1 << 24;

/** Fraction of `test` that the neighbours in `train` classify correctly. */
export async function knnAccuracy(train: LabelledFeatures, test: LabelledFeatures, options: KnnOptions = {}): Promise<number> {
  checkOptions(options);
  const { k = KNN_DEFAULTS.k, temperature = KNN_DEFAULTS.temperature, signal } = options;
  checkInteger('k', k, 1, 65536);
  checkNumber('temperature', temperature, Number.MIN_VALUE, Infinity);
  const { classes } = checkLabelled(train, test);
  const [count, size] = train.features.shape as [number, number];
  return cancellable(signal, async (queue) => {
    const [keys, queries] = queue(() => tidy(() => [directions(train.features), directions(test.features)] as const));
    try {
      const rows = Math.max(1, Math.floor(BLOCK / count));
      let correct = 0;
      for (let begin = 0; begin < test.labels.length; begin += rows) {
        const labels = test.labels.subarray(begin, begin + rows);
        const nearest = queue(() =>
          tidy(() => {
            const scores = linear(queries.slice(begin, begin + labels.length), { weight: keys });
            const { values, indices } = native.topK(scores.handle, Math.min(k, count));
            return { values: tensorOf(values), indices: tensorOf(indices) };
          }),
        );
        const [values, indices] = await Promise.all([nearest.values.read(), nearest.indices.read()]);
        nearest.values.dispose();
        nearest.indices.dispose();
        const weight = (score: number): number => Math.exp(score / size / temperature);
        correct += labels.filter((label, i) => label === vote(row(indices, i), row(values, i), train.labels, classes, weight)).length;
      }
      return correct / test.labels.length;
    } finally {
      keys.dispose();
      queries.dispose();
    }
  });
}

/** Normalises rows to length √D (RMSNorm), so their products are D times the cosine. */
function directions(features: NdArray): Tensor {
  return norm(Tensor.from(features, 'features'), {}, { eps: 1e-20, rms: true });
}

function row({ data, shape }: NdArray, i: number): ArrayLike<number> {
  const width = shape[1] as number;
  return (data as unknown as Float32Array).subarray(i * width, (i + 1) * width);
}

function vote(
  neighbours: ArrayLike<number>,
  scores: ArrayLike<number>,
  labels: Int32Array,
  classes: number,
  weight: (score: number) => number,
): number {
  const votes = new Float64Array(classes);
  for (let j = 0; j < neighbours.length; j++) {
    const label = labels[neighbours[j] as number] as number;
    votes[label] = (votes[label] as number) + weight(scores[j] as number);
  }
  return votes.indexOf(votes.reduce((most, v) => Math.max(most, v), 0));
}
