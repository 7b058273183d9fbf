/** The benchmarks run and count correctly; their speed is not tested. */
import { describe, expect, test } from '@jest/globals';
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { decodeCost, encodeCost, flowCost, linearCost } from '../bench/costs.js';
import { QUICK, tryRow, type Failure } from '../bench/harness.js';
import { dinoV2Graph, forms } from '../bench/peers/dinov2.js';
import { onnxModel, type FloatArray } from '../bench/peers/onnx.js';
import { failedRow } from '../bench/table.js';
import { parseUniFlowConfig, presets } from '../lib/config.js';
import { VisionEncoder } from '../lib/encoder/vision-encoder.js';

const root = fileURLToPath(new URL('..', import.meta.url));
const run = promisify(execFile);

describe('bench', () => {
  test('--quick --json writes a complete report to stdout', async () => {
    const { stdout } = await run(process.execPath, ['--import', 'tsx', 'bench/main.ts', '--quick', '--filter', '^norm', '--json'], {
      cwd: root,
    });
    const report = JSON.parse(stdout) as {
      machine: object;
      peaks: Record<'before' | 'after', Record<string, number>>;
      rows: Record<string, unknown>[];
    };
    expect(report.machine).toMatchObject({ cpu: expect.any(String), node: process.version });
    for (const rate of [...Object.values(report.peaks.before), ...Object.values(report.peaks.after)]) expect(rate).toBeGreaterThan(0);
    expect(report.rows.length).toBeGreaterThan(4);
    for (const row of report.rows) {
      expect(row).toMatchObject({ family: 'norm', bound: 'memory' });
      for (const name of ['bytes', 'floorMs', 'medianMs', 'p99Ms', 'ofFloor', 'rate', 'samples']) {
        expect(row[name]).toBeGreaterThan(0);
        expect(Number.isFinite(row[name])).toBe(true);
      }
    }
  });

  test('rejects a filter that is not a regular expression', async () => {
    await expect(run(process.execPath, ['--import', 'tsx', 'bench/main.ts', '--filter', '('], { cwd: root })).rejects.toMatchObject({
      code: 1,
    });
  });

  test('reports why a row cannot run, and continues with the others', async () => {
    const peaks = { bfloat16: 1, float32: 1, int8: 1, copy: 1 };
    const broken = {
      ...({ family: 'linear', name: 'broken', shape: '1x1', dtype: 'float32', cost: { flops: 1 } } as const),
      setup: () => {
        throw new Error('this machine cannot do that');
      },
    };
    const failure = await tryRow(broken, QUICK, peaks);
    expect(failure).toEqual({ family: 'linear', name: 'broken', shape: '1x1', dtype: 'float32', failed: 'this machine cannot do that' });
    expect(failedRow(failure as Failure)).toMatch(/^linear +broken +1x1 +float32 +cannot run here: this machine cannot do that$/);
    expect(await tryRow({ ...broken, setup: () => () => Promise.resolve() }, QUICK, peaks)).toMatchObject({ medianMs: expect.any(Number) });
  });
});

describe('costs', () => {
  test('of a linear layer', () => {
    // 2 * 3 * 5 * 7 FLOPs; x 15 + weight 35 + residual 21 + output 21 elements, bias 7 floats
    expect(linearCost({ rows: 3, inputs: 5, outputs: 7, dtype: 'bfloat16', residual: true })).toEqual({ flops: 210, bytes: 92 * 2 + 28 });
  });

  test('of the flow, as native/ops/flow.h counts it', () => {
    const [patches, width, patch, blocks, steps] = [6, 64, 2, 3, 4];
    const [d2, p] = [width * width, 3 * patch * patch];
    const cost = (guided: boolean): number => flowCost({ patches, width, patch, blocks, steps, guided, dtype: 'float32' }).flops;
    expect(cost(false)).toBe(patches * (steps * 2 * (2 * p * width + blocks * 5 * d2 + 2 * d2) + 2 * d2));
    expect(cost(true) - cost(false)).toBe(patches * steps * 2 * (2 * p * width + blocks * 2 * d2));
  });

  test('of the official model', () => {
    const official = parseUniFlowConfig(presets.official);
    // Encoder: 24 blocks of 1,025 tokens, 12 D² weights each, and attention; 588 -> 1024 before, 1024 -> 1024 -> 64 after.
    const D = 1024;
    const encoder = 24 * (2 * 1025 * 12 * D * D + 4 * 1025 * 1025 * D) + 2 * 1024 * (588 * D + D * D + 64 * D);
    expect(encodeCost(official, 2).flops).toBe(2 * encoder);
    // Decoder: 64 -> 1024 -> 1024, 6 blocks of 1,024 tokens, and the flow's 12 blocks.
    const flow = 1024 * (2 * (2 * 588 * D + 12 * 5 * D * D + 2 * D * D) + 2 * D * D);
    const decoder = 2 * 1024 * (64 * D + D * D) + 6 * (2 * 1024 * 12 * D * D + 4 * 1024 * 1024 * D) + flow;
    expect(decodeCost(official, 3, 1).flops).toBe(3 * decoder);
  });
});

describe('ONNX models', () => {
  const float = (name: string): string => `0a01${name}120b0a09080112050a0308ac02`; // float32 [300]; the dimension takes two bytes
  const operatorSets = ['4204', '0a00', '1015', '4211', '0a0d636f6d2e6d6963726f736f6674', '1001'].join('');
  const hex = (model: Uint8Array): string => Buffer.from(model).toString('hex');

  test('are written byte for byte', () => {
    const node = { op: 'Add', inputs: ['x', 'x'], outputs: ['y'] };
    const model = onnxModel({ nodes: [node], inputs: { x: [300] }, outputs: { y: [300] } });
    const graph = [
      '0a10',
      '0a0178',
      '0a0178',
      '120179',
      '2203416464',
      '3a00',
      '120562656e6368',
      `5a10${float('78')}`,
      `6210${float('79')}`,
    ];
    expect(hex(model)).toBe(['080a', '3a3d', ...graph, operatorSets].join(''));
  });

  test('have attributes of all types and weights', () => {
    const node = { op: 'A', inputs: [], outputs: ['y'], domain: 'd', attributes: { i: 300, f: { float: 0.5 }, l: [1, 300] } };
    const initializers = {
      w: { data: Float32Array.of(0.5), shape: [1] },
      s: { data: BigInt64Array.of(300n), shape: [1] },
    };
    const model = onnxModel({ nodes: [node], inputs: {}, outputs: {}, initializers });
    const attributes = [
      '2a09',
      '0a0169',
      '18ac02',
      'a00102',
      '2a0b',
      '0a0166',
      '150000003f',
      'a00101',
      '2a0b',
      '0a016c',
      '4001',
      '40ac02',
      'a00107',
    ];
    const weights = ['2a0d', '0801', '1001', '420177', '4a040000003f', '2a11', '0801', '1007', '420173', '4a082c01000000000000'];
    expect(hex(model)).toBe(
      ['080a', '3a59', '0a2e', '120179', '220141', ...attributes, '3a0164', '120562656e6368', ...weights, operatorSets].join(''),
    );
  });

  test.each(forms)('of DINOv2, %s, have every weight and no value before it is made', async (form) => {
    const json = { model_type: 'dinov2', hidden_size: 8, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 2, image_size: 6 };
    await using encoder = VisionEncoder.random(json, { device: 'cpu' });
    const { config, parameters } = encoder;
    let values = 1;
    const weights = new Map<string, FloatArray>();
    for (const { name, shape } of parameters.flatMap(({ parts }) => parts)) {
      const data = new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(name.endsWith('lambda1') ? 1 : values++);
      weights.set(name, { data, shape });
    }
    const { nodes, inputs, outputs, initializers } = dinoV2Graph(config, weights, 3, form);
    expect(inputs).toEqual({ pixel_values: [3, 3, 6, 6] });
    expect(outputs).toEqual({ last_hidden_state: [3, 10, 8] });

    const made = new Set(['pixel_values', ...Object.keys(initializers!)]);
    for (const node of nodes) {
      for (const input of node.inputs) expect(made).toContain(input);
      for (const output of node.outputs) made.add(output);
    }
    expect(made).toContain('last_hidden_state');
    const used = new Set(Object.values(initializers!).map(({ data }) => data[0]));
    for (let value = 1; value < values; value++) expect(used).toContain(value);
  });
});
