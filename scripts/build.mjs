/**
 * Compiles the native addon, or reports all missing tools in one message: `node scripts/build.mjs [--folder FOLDER] [--target NAME] [CMake
 * options, such as -DUNIFLOW_TESTS=ON]`. Plain Node, because it runs in the package (`uniflow build`) as well as in a checkout.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { advice, has, missing } from './system.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const args = process.argv.slice(2);
const firstOption = args.findIndex((argument) => argument.startsWith('-D'));
const split = firstOption < 0 ? args.length : firstOption;
const { values } = parseArgs({
  args: args.slice(0, split),
  options: { folder: { type: 'string', default: join(root, 'build') }, target: { type: 'string', default: 'all' } },
});
const folder = resolve(values.folder);

const absent = missing();
if (absent.length > 0) fail(advice(absent));

const require = createRequire(import.meta.url);
const includes = [dirname(require.resolve('node-addon-api/package.json')), require('node-api-headers').include_dir];
const cache = join(folder, 'CMakeCache.txt');
// CMake refuses a build folder created by another copy of the sources
if (existsSync(cache) && !readFileSync(cache, 'utf8').includes(`CMAKE_HOME_DIRECTORY:INTERNAL=${root}\n`))
  for (const name of ['CMakeCache.txt', 'CMakeFiles']) rmSync(join(folder, name), { recursive: true, force: true });
console.log(`Building the native addon in ${folder} …`);
run([
  ...['-S', root, '-B', folder, '-DCMAKE_BUILD_TYPE=Release', `-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=${join(folder, 'Release')}`],
  ...[`-DUNIFLOW_NODE_INCLUDE=${includes.join(';')}`, ...args.slice(split)],
  ...(!existsSync(cache) && has('ninja') ? ['-G', 'Ninja'] : []),
]);
// on a terminal, the build tool shows its progress; elsewhere only failures are printed
run(
  ['--build', folder, '--target', values.target, '--parallel', String(availableParallelism())],
  process.stdout.isTTY ? 'inherit' : 'pipe',
);

function run(options, stdio = 'pipe') {
  const { status, stdout, stderr } = spawnSync('cmake', options, { stdio, encoding: 'utf8', maxBuffer: 1 << 28 });
  for (const line of (stdout ?? '').matchAll(/^-- ((JPEG files|GPU backend): .*)$/gm)) console.log(line[1]);
  if (status === 0) return;
  fail(`${stdout ?? ''}${stderr ?? ''}\nThe native addon of uniflow-tokenizer could not be built; the first error above says why.`);
}

function fail(message) {
  console.error(`\n${message}\n`);
  process.exit(1);
}
