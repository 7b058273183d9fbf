/** The pixel flow of four images at the official size: noise, all steps through the velocity field, pixels. Compute-bound. */
import { onCpu } from '../lib/device.js';
import { Decoder } from '../lib/decoder/decoder.js';
import { timeGrid } from '../lib/decoder/schedule.js';
import { parseUniFlowConfig, presets } from '../lib/config.js';
import { nativeNormalisation } from '../lib/io/preprocess.js';
import type { FloatType } from '../lib/native.js';
import { RandomSource } from '../lib/parameters.js';
import { Tensor } from '../lib/tensor.js';
import { flowCost } from './costs.js';
import type { Row } from './harness.js';

const BATCH = 4;
const config = parseUniFlowConfig(presets.official);
const { grid, width, patch, flowBlocks } = config.decoder;
const PATCHES = grid.rows * grid.cols;

function row(name: string, dtype: FloatType, { steps = 1, guidance = 1 }: { steps?: number; guidance?: number } = {}): Row {
  return {
    ...{ family: 'flow', name, shape: `${BATCH}x${PATCHES}x${width}`, dtype, images: BATCH },
    cost: flowCost({ patches: BATCH * PATCHES, width, patch, blocks: flowBlocks, steps, guided: guidance !== 1, dtype }),
    setup: (make) => {
      const source = new RandomSource(onCpu(dtype), 1);
      const decoder = new Decoder({ ...config.decoder, globalBlocks: 0 }, source, nativeNormalisation(config));
      for (const { tensor } of source.parameters) make.keep(tensor.handle);
      const condition = new Tensor(make.tensor([BATCH, PATCHES, width], dtype));
      const options = {
        schedule: timeGrid(steps),
        guidance,
        noise: undefined,
        seed: 0,
        ids: new Uint32Array(BATCH),
        output: 'uint8' as const,
      };
      return () => decoder.integrate(condition, grid, options).handle;
    },
  };
}

export const rows: Row[] = [
  row('1 step', 'bfloat16'),
  row('4 steps', 'bfloat16', { steps: 4 }),
  row('1 step guided', 'bfloat16', { guidance: 3 }),
  row('1 step', 'float32'),
];
