/** Frozen features with classes: the input of the linear probe and the nearest neighbours. */
import type { NdArray } from 'ndarray';
import { UniFlowError } from '../errors.js';

export interface LabelledFeatures {
  /** float32 [N,D] */
  features: NdArray;
  /** [N], starting at 0. */
  labels: Int32Array;
}

/** @returns the number of classes in both sets together. */
export function checkLabelled(train: LabelledFeatures, test: LabelledFeatures): { classes: number } {
  const width = train.features?.shape?.[1];
  for (const [name, { features, labels }] of Object.entries({ train, test })) {
    const shape = features?.shape ?? [];
    if (shape.length !== 2 || shape[0] === 0 || shape[1] !== width)
      throw UniFlowError.expected('BAD_INPUT', `${name}.features`, `an ndarray [N, ${width ?? 'D'}]`, `[${shape.join(', ')}]`);
    if (Object.prototype.toString.call(labels) !== '[object Int32Array]' || labels.length !== shape[0] || labels.some((l) => l < 0))
      throw UniFlowError.expected('BAD_INPUT', `${name}.labels`, `an Int32Array of ${shape[0]} classes from 0`, `${labels?.length} labels`);
  }
  const last = (labels: Int32Array): number => labels.reduce((most, l) => Math.max(most, l), 0);
  return { classes: 1 + Math.max(last(train.labels), last(test.labels)) };
}
