/**
 * `npm test`: prepares the checkout, runs the native tests and jest, and ends with one line of totals. Numerical code is tested with the
 * kernels of every instruction set of this machine, and the GPU kernels in the emulator. With arguments, which are passed to jest, jest
 * runs once.
 */
import { spawnSync } from 'node:child_process';
import { readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { prepare, root } from './prepare.mjs';

/** Native tests that run no CPU kernels. */
const WITHOUT_KERNELS = 'allocator|cuda_emulated|emulator|gpu_session|jpeg|resample|safetensors|stream|team';
/** Numerical suites, which run for every instruction set. */
const NUMBERS = ['bits', 'distillation', 'families', 'gradients', 'recompute', 'trainer', 'uniflow'];
/** Suites of whole runs, which take minutes; they run for the best instruction set, and for AVX2, the most common one. */
const RUNS = ['batch', 'reproduction', 'train'];
/** Suites that run on every device. */
const DEVICES = ['cuda', 'distillation', 'families', 'gradients', 'trainer', 'uniflow'];

prepare({ tests: true });
const { instructionSets } = createRequire(import.meta.url)(join(root, 'build', 'Release', 'uniflow.node')).cpuInfo();
const [best, ...others] = instructionSets;
const emulated = { UNIFLOW_CUDA_LIBRARY: join(root, 'build', 'Release', 'libuniflow_cuda_emulated.so') };

const args = process.argv.slice(2);
const totals = [ctest(best), ...(args.length > 0 ? [jest(best, args)] : everything())];
const sum = (key) => totals.reduce((total, run) => total + run[key], 0);
for (const { what, passed, failed, seconds } of totals) console.log(`${what}: ${passed} passed, ${failed} failed, ${seconds.toFixed(0)} s`);
if (!instructionSets.includes('avx2'))
  console.log('Kernels of other instruction sets than these were not tested: this machine cannot run them.');
console.log(`${sum('passed')} passed, ${sum('failed')} failed`);
process.exit(totals.every(({ ok }) => ok) ? 0 : 1);

function everything() {
  return [
    ...others.map((set) => ctest(set, ['-E', `^(${WITHOUT_KERNELS})_test$`])),
    jest(best),
    jest('cuda, emulated', suites(DEVICES), emulated),
    ...others.map((set) => jest(set, suites([...NUMBERS, ...(set === 'avx2' ? RUNS : [])]), { UNIFLOW_ISA: set })),
  ];
}

function suites(names) {
  return names.map((name) => `test/${name}.test.ts`);
}

function ctest(set, options = []) {
  const begin = Date.now();
  const env = { ...process.env, UNIFLOW_ISA: set };
  const { status, stdout, stderr } = spawnSync('ctest', ['--test-dir', 'build', '--output-on-failure', ...options], {
    cwd: root,
    encoding: 'utf8',
    env,
  });
  process.stdout.write(stdout + stderr);
  const [, failed, total] = /tests passed, (\d+) tests failed out of (\d+)/.exec(stdout)?.map(Number) ?? [0, 1, 1];
  return { what: `ctest, ${set}`, ok: status === 0 && total > 0, passed: total - failed, failed, seconds: (Date.now() - begin) / 1000 };
}

/** Runs jest, passing its output through, and returns its results. */
function jest(what, options = [], env = {}) {
  const begin = Date.now();
  const report = join(tmpdir(), `uniflow-jest-${process.pid}.json`);
  const { status } = spawnSync(
    process.execPath,
    ['--experimental-vm-modules', '--no-warnings', 'node_modules/jest/bin/jest.js', '--json', '--outputFile', report, ...options],
    { cwd: root, stdio: ['ignore', 'ignore', 'inherit'], env: { ...process.env, ...env } },
  );
  const { numPassedTests, numFailedTests, numRuntimeErrorTestSuites } = JSON.parse(readFileSync(report, 'utf8'));
  rmSync(report);
  const failed = numFailedTests + numRuntimeErrorTestSuites;
  const ok = status === 0 && failed === 0 && numPassedTests > 0;
  return { what: `jest, ${what}`, ok, passed: numPassedTests, failed, seconds: (Date.now() - begin) / 1000 };
}
