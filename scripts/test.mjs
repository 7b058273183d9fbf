/** `npm test`: everything that it needs, the native tests, then jest; ends with one line of totals. */
import { spawnSync } from 'node:child_process';
import { readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { prepare, root } from './prepare.mjs';

prepare({ tests: true });

const native = spawnSync('ctest', ['--test-dir', 'build', '--output-on-failure'], { cwd: root, encoding: 'utf8' });
process.stdout.write(native.stdout + native.stderr);
const [, percent, failedNative, totalNative] = /(\d+)% tests passed, (\d+) tests failed out of (\d+)/.exec(native.stdout) ?? [];

/** Runs jest; what it prints goes through, its results come back. */
function jest(args, env = {}) {
  const report = join(tmpdir(), `uniflow-jest-${process.pid}.json`);
  const { status } = spawnSync(
    process.execPath,
    ['--experimental-vm-modules', '--no-warnings', 'node_modules/jest/bin/jest.js', '--json', '--outputFile', report, ...args],
    { cwd: root, stdio: ['ignore', 'ignore', 'inherit'], env: { ...process.env, ...env } },
  );
  const { numPassedTests, numFailedTests, numRuntimeErrorTestSuites } = JSON.parse(readFileSync(report, 'utf8'));
  rmSync(report);
  return { ok: status === 0, passed: numPassedTests, failed: numFailedTests + numRuntimeErrorTestSuites };
}

// The suites that hold for every device, once more with the GPU's kernels, which the emulator runs on the processor.
const onEveryDevice = ['cuda', 'distillation', 'families', 'gradients', 'trainer', 'uniflow'].map((name) => `test/${name}.test.ts`);
const emulated = { UNIFLOW_CUDA_LIBRARY: join(root, 'build', 'Release', 'libuniflow_cuda_emulated.so') };
const args = process.argv.slice(2);
const runs = [jest(args), ...(args.length === 0 ? [jest(onEveryDevice, emulated)] : [])];
const total = (key) => runs.reduce((sum, run) => sum + run[key], 0);

const failed = Number(failedNative ?? 1) + total('failed');
const passed = Number(totalNative ?? 0) - Number(failedNative ?? 0) + total('passed');
const ok = percent !== undefined && native.status === 0 && runs.every((run) => run.ok) && failed === 0 && passed > 0;
console.log(`${passed} passed, ${failed} failed`);
process.exit(ok ? 0 : 1);
