/** npm's install step: builds the native addon, or says in one message what is missing for it. */
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { advice, missing } from './system.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const absent = missing();
if (absent.length > 0) {
  console.error(`\n${advice(absent)}\n`);
  process.exit(1);
}
const require = createRequire(import.meta.url);
const manifest = require.resolve('cmake-js/package.json');
const cmakeJs = join(dirname(manifest), require(manifest).bin['cmake-js']);
console.log('Building the native addon (about a minute; two where nvcc builds the GPU backend as well) …');
const options = process.argv.slice(2); // such as --CDUNIFLOW_TESTS=ON
for (const step of [
  ['configure', ...options],
  ['build', '--parallel', String(availableParallelism())],
]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [cmakeJs, ...step], { cwd: root, encoding: 'utf8', maxBuffer: 1 << 28 });
  if (status === 0) continue;
  console.error(stdout + stderr);
  console.error('\nThe native addon of uniflow-tokenizer could not be built; the first error above says why.\n');
  process.exit(1);
}
