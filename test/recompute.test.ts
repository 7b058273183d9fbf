/** Activation recomputation: the same gradients with less memory. */
import { describe, expect, test } from '@jest/globals';
import { presets } from '../lib/config.js';
import { memoryStats, resetPeakMemory, setThreads } from '../lib/device.js';
import { distillationLoss } from '../lib/losses/distillation.js';
import { flowLoss } from '../lib/losses/flow.js';
import { native, type FloatType, type TensorHandle } from '../lib/native.js';
import { reshape } from '../lib/ops.js';
import { Tape, unrecorded } from '../lib/tape.js';
import { Tensor, tensorOf, tidy } from '../lib/tensor.js';
import { UniFlow } from '../lib/uniflow.js';
import { awaken } from './support.js';

const [BATCH, SIZE, PATCHES, TOKENS, WIDTH, VALUES] = [32, 56, 16, 17, 64, 588];

/** A random model with unpacked parameters, as in training. */
function trainable(layers: number, dtype: FloatType, seed = 0): UniFlow {
  const uniflow = awaken(UniFlow.random({ ...presets.nano, num_hidden_layers: layers }, { dtype, seed }));
  for (const { tensor } of uniflow.parameters) if (tensor.packed) tensor.assign(native.copyParameter(tensor.handle, dtype));
  return uniflow;
}

setThreads(1); // the operations are too small for more threads

const random = (shape: number[]): Tensor => tensorOf(native.randomParameter(shape, 'float32', false, 5, 0, 1));

/** One forward and backward pass with both losses; the gradients of `parameters`. */
function gradients(uniflow: UniFlow, teacher: UniFlow, parameters: Tensor[], recompute: boolean): Tensor[] {
  const { encoder, decoder, dtype } = uniflow;
  return tidy(() => {
    const pixels = random([BATCH, 3, SIZE, SIZE]);
    const tape = new Tape(parameters);
    const [flow, distillation] = tape.record(() => {
      const { last, states } = encoder.forward(pixels, { states: true, recompute });
      const wanted = unrecorded(() => teacher.encoder.forward(pixels, { states: true }).states);
      const condition = decoder.condition(uniflow.toLatents(last), encoder.gridOf(pixels), { recompute });
      const rows = BATCH * PATCHES;
      const time = tensorOf(native.uniform(1, new Uint32Array(BATCH), PATCHES)).reshape([rows]);
      const pair = [random([rows, VALUES]), random([rows, VALUES])] as const;
      return [
        flowLoss(decoder.head, ...pair, time, reshape(condition, [rows, WIDTH]), dtype, { recompute }),
        distillationLoss(states.slice(1), wanted.slice(1), { skip: 1 }).loss,
      ] as const;
    });
    const found = tape.backward([
      { loss: flow, scale: 1 },
      { loss: distillation, scale: 0.5 },
    ]);
    return parameters.map((p) => found.get(p) as Tensor);
  });
}

describe.each(['float32', 'bfloat16'] as const)('%s', (dtype) => {
  test('the gradients are the same to the last bit', async () => {
    const [student, teacher] = [trainable(3, dtype), trainable(3, dtype, 1)];
    const parameters = student.parameters.map((p) => p.tensor);
    const read = (recompute: boolean) => Promise.all(gradients(student, teacher, parameters, recompute).map((g) => g.read()));
    const [kept, again] = [await read(false), await read(true)];
    for (const [i, { parts }] of student.parameters.entries()) {
      const [a, b] = [kept[i]!.data, again[i]!.data].map((data) => Buffer.from(data.buffer)) as [Buffer, Buffer];
      expect(`${parts[0]!.name} ${a.equals(b)}`).toBe(`${parts[0]!.name} true`);
      expect(a.some((byte) => byte !== 0)).toBe(true);
    }
    await Promise.all([student.dispose(), teacher.dispose()]);
  });
});

test('memory grows with the depth by the outputs of the blocks alone', async () => {
  /**
   * Peak bytes of encoders with the given number of layers. Only vectors are trained, because gradients of matrices are not activations.
   */
  const peak = async (layers: number, recompute: boolean): Promise<number> => {
    const uniflow = trainable(layers, 'float32');
    const vectors = uniflow.parameters.map((p) => p.tensor).filter((t) => t.shape.length === 1);
    await native.synchronize();
    resetPeakMemory();
    const before = memoryStats().host.active;
    const handles: TensorHandle[] = gradients(uniflow, uniflow, vectors, recompute).map((g) => g.handle);
    await native.synchronize(handles);
    const bytes = memoryStats().host.peak - before;
    for (const handle of handles) handle.dispose();
    await uniflow.dispose();
    return bytes;
  };
  /** The least of three: a tensor lives until JavaScript disposes of it, which is late when other programs hold the cores. */
  const least = async (layers: number, recompute: boolean): Promise<number> => {
    let bytes = Infinity;
    for (let round = 0; round < 3; round++) bytes = Math.min(bytes, await peak(layers, recompute));
    return bytes;
  };
  const [kept4, kept12] = [await least(4, false), await least(12, false)];
  const [again4, again12] = [await least(4, true), await least(12, true)];
  const mebibytes = [kept4, kept12, again4, again12].map((bytes) => (bytes / 2 ** 20).toFixed(1));
  console.log('MiB at the peak with 4 and 12 layers: %s and %s; with recomputation %s and %s', ...mebibytes);
  // The teacher is the student here, and the distillation keeps its states: two outputs per layer.
  const outputs = 8 * 2 * BATCH * TOKENS * WIDTH * 4;
  const block = (kept12 - kept4 - outputs) / 8;
  expect(again12 - again4).toBeLessThan(outputs + block);
  expect(again12).toBeLessThan(kept12 / 2);
});
