/** Shared by the tests: fixtures, golden tensors, and the tolerances for comparing with them. */
import { expect } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { spawn, type ChildProcess } from 'node:child_process';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { checkDevice } from '../lib/device.js';
import { UniFlowError } from '../lib/errors.js';
import { native } from '../lib/native.js';
import { assignParameter } from '../lib/parameters.js';
import { onDevice } from '../lib/tensor.js';
import type { UniFlow } from '../lib/uniflow.js';

export const root = join(dirname(fileURLToPath(import.meta.url)), '..');
export const fixtures = join(dirname(fileURLToPath(import.meta.url)), 'fixtures');
export const golden = (name: string): string => join(fixtures, 'golden', name);
export const photos = join(root, 'examples', 'photos');

/** Default device of models: the first working GPU, else the CPU. */
export const device = checkDevice({}).device;

/** Creates tensors on that device. */
export const here = <T>(fn: () => T): T => onDevice(device, fn);

/**
 * Replaces the zero-initialised layers of a random model by weights with standard deviation 0.02, so that its velocity depends on
 * everything.
 */
export function awaken(uniflow: UniFlow): UniFlow {
  uniflow.parameters.forEach((parameter, i) => {
    const { tensor, parts, matrix } = parameter;
    if (!matrix || !/adaLN_modulation|final_layer\.linear/.test(parts[0]?.name ?? '')) return;
    onDevice(uniflow.device, () => {
      const value = native.randomParameter(tensor.shape, 'float32', false, 7, i, 0.02);
      assignParameter(parameter, value, uniflow.dtype);
      value.dispose();
    });
  });
  return uniflow;
}

/** Relative L2 error against the golden values. */
export const tolerances = {
  float32: 2e-4,
  decode: 1e-3,
  bfloat16: 2e-2,
  /** The same image alone and inside a batch, float32. */
  batch: 1e-6,
} as const;

/** Every tensor of a safetensors file as float32. */
export async function readTensors(path: string): Promise<Record<string, NdArray<Float32Array>>> {
  const { handle, tensors } = native.openSafetensors(path);
  const out: Record<string, NdArray<Float32Array>> = {};
  for (const [name, { shape }] of Object.entries(tensors)) {
    const tensor = native.loadParameter([{ file: handle, name }], shape, 'float32', false);
    const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
    await tensor.read(data);
    tensor.dispose();
    out[name] = ndarray(data, shape);
  }
  return out;
}

/** ‖a − b‖ / ‖b‖ in float64. */
export function relativeL2(actual: NdArray, expected: NdArray): number {
  expect(actual.shape).toEqual(expected.shape);
  const [a, b] = [actual.data, expected.data] as unknown as [Float32Array, Float32Array];
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < a.length; i++) {
    difference += (a[i]! - b[i]!) ** 2;
    norm += b[i]! ** 2;
  }
  return Math.sqrt(difference / norm);
}

/** Output and exit code of a command; the code is null if a signal ended it. */
export interface CommandRun {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Starts `uniflow` with these arguments in a separate process. */
export function startCommand(args: readonly string[], env: NodeJS.ProcessEnv = {}): { child: ChildProcess; ended: Promise<CommandRun> } {
  const child = spawn(process.execPath, ['--import', 'tsx', join('lib', 'cli', 'main.ts'), ...args], {
    cwd: root,
    env: { ...process.env, UNIFLOW_DEBUG: '', NODE_OPTIONS: '', ...env },
  });
  const run: CommandRun = { code: null, stdout: '', stderr: '' };
  child.stdout.on('data', (text) => (run.stdout += String(text)));
  child.stderr.on('data', (text) => (run.stderr += String(text)));
  return { child, ended: new Promise((resolve) => child.on('close', (code) => resolve({ ...run, code }))) };
}

/** Returns the UniFlowError that `work` rejects with. */
export async function failure(work: Promise<unknown>): Promise<UniFlowError> {
  const error: unknown = await work.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(UniFlowError);
  return error as UniFlowError;
}
