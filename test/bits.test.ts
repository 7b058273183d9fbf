/** The result for an image depends only on the image and the weights, not on its batch or the number of threads, to the last bit. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { setThreads } from '../lib/device.js';
import { type FloatType } from '../lib/native.js';
import { Trainer } from '../lib/train/trainer.js';
import { UniFlow } from '../lib/uniflow.js';
import { golden } from './support.js';

const [IMAGES, SIDE, SEED] = [32, 56, 7];
const BATCHES = [1, 2, 3, 7, 32];

/** Normalised pixels [count,3,SIDE,SIDE] of images `first`, `first + 1`, … of a fixed set. */
function pixels(first: number, count: number): NdArray<Float32Array> {
  const size = 3 * SIDE * SIDE;
  const data = Float32Array.from(
    { length: count * size },
    (_, i) => Math.sin((first * size + i) * 0.37) + Math.cos((first * size + i) * 0.011),
  );
  return ndarray(data, [count, 3, SIDE, SIDE]);
}

function bytes(array: NdArray): Buffer {
  const { buffer, byteOffset, byteLength } = array.data as unknown as Uint8Array;
  return Buffer.from(buffer, byteOffset, byteLength);
}

/** The bytes of image `i` of a batch [B,…]. */
function bytesOf(batch: NdArray, i: number): Buffer {
  const all = bytes(batch);
  const size = all.length / batch.shape[0]!;
  return all.subarray(i * size, (i + 1) * size);
}

describe.each(['float32', 'bfloat16'] as const)('%s', (dtype: FloatType) => {
  let uniflow: UniFlow;
  beforeAll(async () => void (uniflow = await UniFlow.load(golden('uniflow-tiny'), { device: 'cpu', dtype })));
  afterAll(async () => {
    await uniflow.dispose();
    setThreads(2);
  });

  /** All results for images [first, first + count). */
  async function outputs(first: number, count: number): Promise<Record<string, NdArray>> {
    const encoded = await uniflow.encode({ pixels: pixels(first, count) }, { tokens: true, hiddenStates: true });
    const decoded = await uniflow.decode(encoded.latents, { grid: encoded.grid, steps: 2, noise: noise(first, count) });
    const states = Object.fromEntries(encoded.hiddenStates!.map((state, i) => [`hidden state ${i}`, state]));
    return { latents: encoded.latents, tokens: encoded.tokens!, ...states, decoded };
  }

  /** Noise tied to the image, because the default noise depends on the position in the batch. [count,N,P] */
  function noise(first: number, count: number): NdArray<Float32Array> {
    const { patch } = uniflow.config;
    const [patches, values] = [(SIDE / patch) ** 2, 3 * patch ** 2];
    const data = Float32Array.from({ length: count * patches * values }, (_, i) => Math.sin((first * patches * values + i) * 1.7));
    return ndarray(data, [count, patches, values]);
  }

  test.each([1, 2])('gives an image the same bits alone and in batches of 2, 3, 7 and 32 when run with %i threads', async (threads) => {
    setThreads(2);
    const all = await outputs(0, IMAGES);
    setThreads(threads);
    for (const batch of BATCHES) {
      const first = IMAGES - batch; // moves the last image to another position in the batch
      const part = await outputs(first, batch);
      for (const [name, array] of Object.entries(part)) {
        const same = Array.from({ length: batch }, (_, i) => bytesOf(array, i).equals(bytesOf(all[name]!, first + i)));
        expect({ name, batch, same }).toEqual({ name, batch, same: same.map(() => true) });
      }
    }
  });

  test('gives the same gradients with 1 and 2 threads', async () => {
    const gradients = async (threads: number): Promise<Map<string, NdArray>> => {
      setThreads(threads);
      const [student, teacher] = [await UniFlow.load(golden('uniflow-tiny'), { device: 'cpu', dtype }), uniflow];
      const trainer = new Trainer(student, { teacher, optimizer: { lr: 0 }, lambdaDistillation: 0.5, seed: SEED });
      await trainer.step({ pixels: pixels(0, 5) });
      const found = await trainer.gradients();
      trainer.dispose();
      await student.dispose();
      return found;
    };
    const [one, two] = [await gradients(1), await gradients(2)];
    expect(one.size).toBeGreaterThan(20);
    for (const [name, gradient] of one) expect([name, bytes(gradient).equals(bytes(two.get(name)!))]).toEqual([name, true]);
  });
});
