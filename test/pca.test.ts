/** Statistics of patches and their principal components. */
import { describe, expect, test } from '@jest/globals';
import { Matrix } from 'ml-matrix';
import ndarray from 'ndarray';
import { Moments, patchStatistics, principalComponents } from '../lib/eval/pca.js';
import { Tensor } from '../lib/tensor.js';

const values = (count: number, seed: number): Float32Array => Float32Array.from({ length: count }, (_, i) => Math.sin(seed + 1.7 * i * i));
const rows = (data: Float32Array, width: number): Tensor => Tensor.from({ data, shape: [data.length / width, width] });

/** Mean and covariance, computed by definition. */
function direct(data: Float32Array, width: number): { mean: number[]; covariance: number[] } {
  const n = data.length / width;
  const at = (r: number, c: number): number => data[r * width + c]!;
  const mean = Array.from({ length: width }, (_, c) => Array.from({ length: n }, (_, r) => at(r, c)).reduce((a, b) => a + b) / n);
  const covariance = mean.flatMap((mi, i) =>
    mean.map((mj, j) => {
      let sum = 0;
      for (let r = 0; r < n; r++) sum += (at(r, i) - mi) * (at(r, j) - mj);
      return sum / (n - 1);
    }),
  );
  return { mean, covariance };
}

const close = (actual: ArrayLike<number>, expected: ArrayLike<number>): void => {
  expect(actual.length).toBe(expected.length);
  for (let i = 0; i < actual.length; i++) expect(actual[i]).toBeCloseTo(expected[i]!, 5);
};

describe('Moments', () => {
  test('gives mean and covariance of all rows when they come in batches of any size', async () => {
    const data = values(5 * 31, 3);
    const moments = new Moments();
    for (const [begin, end] of [[0, 2], [2, 20], [20, 31]] as const) await moments.add(rows(data.subarray(5 * begin, 5 * end), 5)); // prettier-ignore
    const { count, mean, covariance } = moments.statistics();
    expect(count).toBe(31);
    close(mean, direct(data, 5).mean);
    close(covariance, direct(data, 5).covariance);
  });

  test('refuses rows of another width, and statistics of nothing', async () => {
    const moments = new Moments();
    expect(() => moments.statistics()).toThrow(expect.objectContaining({ code: 'BAD_INPUT' }));
    await moments.add(rows(values(10, 1), 5));
    await expect(moments.add(rows(values(8, 1), 4))).rejects.toThrow(expect.objectContaining({ code: 'BAD_INPUT' }));
  });
});

test('patchStatistics takes patches as (channel, row, column), normalised, from images of several sizes', async () => {
  const normalisation = { mean: Float32Array.of(0.5, 0.4, 0.3), std: Float32Array.of(0.2, 0.25, 0.5) };
  const image = (h: number, w: number, seed: number) =>
    ndarray(
      Uint8Array.from({ length: 3 * h * w }, (_, i) => (seed + 37 * i * i) % 256),
      [1, h, w, 3],
    );
  const images = [image(4, 6, 1), image(2, 4, 9)];
  const patches: number[] = [];
  for (const { data, shape } of images)
    for (let y = 0; y < shape[1]!; y += 2)
      for (let x = 0; x < shape[2]!; x += 2)
        for (let c = 0; c < 3; c++)
          for (const [dy, dx] of [
            [0, 0],
            [0, 1],
            [1, 0],
            [1, 1],
          ] as const)
            // prettier-ignore
            patches.push((data[((y + dy) * shape[2]! + x + dx) * 3 + c]! / 255 - normalisation.mean[c]!) / normalisation.std[c]!);
  const { count, mean, covariance } = await patchStatistics(images, { patch: 2, normalisation });
  expect(count).toBe(8);
  close(mean, direct(Float32Array.from(patches), 12).mean);
  close(covariance, direct(Float32Array.from(patches), 12).covariance);
});

test('principalComponents gives orthonormal eigenvectors of the covariance in descending order, and the variance left out', () => {
  const d = 6;
  const a = new Matrix(d, d).apply(function (this: Matrix, i, j) {
    this.set(i, j, Math.sin(1 + i * d + j));
  });
  const covariance = a.mmul(a.transpose());
  const statistics = { count: 10, mean: new Float64Array(d), covariance: Float64Array.from(covariance.to1DArray()) };
  const { directions, variances, residual } = principalComponents(statistics, 3);
  close(directions.transpose().mmul(directions).to1DArray(), Matrix.eye(3).to1DArray());
  close(covariance.mmul(directions).to1DArray(), directions.mmul(Matrix.diag([...variances])).to1DArray());
  expect([...variances]).toEqual([...variances].sort((x, y) => y - x));
  expect(residual).toBeCloseTo(covariance.trace() - variances.reduce((x, y) => x + y), 6);
});
