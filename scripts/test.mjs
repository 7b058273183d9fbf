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

const report = join(tmpdir(), `uniflow-jest-${process.pid}.json`);
const jest = spawnSync(
  process.execPath,
  [
    '--experimental-vm-modules',
    '--no-warnings',
    'node_modules/jest/bin/jest.js',
    '--json',
    '--outputFile',
    report,
    ...process.argv.slice(2),
  ],
  {
    cwd: root,
    stdio: ['ignore', 'ignore', 'inherit'],
  },
);
const results = JSON.parse(readFileSync(report, 'utf8'));
rmSync(report);

const suitesThatDidNotRun = results.numRuntimeErrorTestSuites;
const failed = Number(failedNative ?? 1) + results.numFailedTests + suitesThatDidNotRun;
const passed = Number(totalNative ?? 0) - Number(failedNative ?? 0) + results.numPassedTests;
const ok = percent !== undefined && native.status === 0 && jest.status === 0 && failed === 0 && passed > 0;
console.log(`${passed} passed, ${failed} failed`);
process.exit(ok ? 0 : 1);
