/** Prepares a checkout: system packages, npm packages, the addon, dist/. Plain Node. */
import { spawnSync } from 'node:child_process';
import { existsSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { advice, has, installMissing } from './system.mjs';

export const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const age = (path) => (existsSync(join(root, path)) ? statSync(join(root, path)).mtimeMs : 0);

/** Runs a command in the checkout; exits if it fails. */
export function run(command, args, options = {}) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit', ...options });
  if (status === 0) return;
  console.error(error ? `${command}: ${error.message}` : `${[command, ...args].join(' ')} failed`);
  process.exit(status ?? 1);
}

/** @param wanted requirements besides the addon: `tests`, `fashionMnist`. */
export function prepare(wanted = {}) {
  const absent = installMissing(wanted);
  if (absent.length > 0) {
    console.error(`\n${advice(absent)}\n`);
    process.exit(1);
  }
  // not `npm ci`, which rejects a lock file if another platform's optional package is missing in the registry
  if (age('node_modules/.package-lock.json') < age('package-lock.json'))
    run('npm', ['install', '--no-save', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error']);
  // the tests compile the GPU kernels even on machines without a GPU
  run(process.execPath, [
    'scripts/build.mjs',
    ...(wanted.tests ? ['-DUNIFLOW_TESTS=ON', `-DUNIFLOW_CUDA=${has('nvcc') ? 'ON' : 'AUTO'}`] : []),
  ]);
  run('npx', ['tsc', '-p', 'tsconfig.json']);
}
