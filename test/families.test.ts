/** Every encoder family against Hugging Face's own hidden states. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import type { NdArray } from 'ndarray';
import { join } from 'node:path';
import { VisionEncoder } from '../lib/index.js';
import { golden, readTensors, relativeL2, tolerances } from './support.js';

const families = ['clip', 'dinov2', 'dinov2-registers', 'dinov2-swiglu', 'dinov3', 'internvl', 'siglip'];
const dtypes = ['float32', 'bfloat16'] as const;

describe.each(families)('%s', (family) => {
  let expected: Record<string, NdArray<Float32Array>>;
  beforeAll(async () => {
    expected = await readTensors(join(golden(family), 'golden.safetensors'));
  });

  describe.each(dtypes)('%s', (dtype) => {
    let encoder: VisionEncoder;
    beforeAll(async () => {
      encoder = await VisionEncoder.load(golden(family), { dtype });
    });
    afterAll(() => encoder.dispose());

    test('has every hidden state and the last one', async () => {
      const out = await encoder.encode({ pixels: expected['pixels'] as NdArray }, { hiddenStates: true });
      const states = Object.keys(expected).filter((name) => /^hidden\.\d+$/.test(name));
      expect(out.hiddenStates).toHaveLength(states.length);
      states.forEach((name, i) => expect(relativeL2(out.hiddenStates![i]!, expected[name]!)).toBeLessThan(tolerances[dtype]));
      expect(relativeL2(out.lastHiddenState, expected['last_hidden_state']!)).toBeLessThan(tolerances[dtype]);
    });

    test('takes another, non-square size', async () => {
      if (!expected['pixels_rect']) return; // Hugging Face's implementation rejects other sizes
      const out = await encoder.encode({ pixels: expected['pixels_rect'] });
      expect(relativeL2(out.lastHiddenState, expected['last_hidden_state_rect']!)).toBeLessThan(tolerances[dtype]);
    });
  });
});
