/**
 * `node scripts/arm64.mjs`: the native tests of the CPU's kernels, compiled for arm64 and run by QEMU. Not part of CI: it takes long. Needs, on
 * Debian: apt install g++-aarch64-linux-gnu qemu-user-static
 */
import { availableParallelism } from 'node:os';
import { run } from './prepare.mjs';

const folder = 'build-arm64';
const quiet = { stdio: ['ignore', 'ignore', 'inherit'] };
run(
  'cmake',
  [
    ...[
      '-S',
      '.',
      '-B',
      folder,
      '-DCMAKE_SYSTEM_NAME=Linux',
      '-DCMAKE_SYSTEM_PROCESSOR=aarch64',
      '-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++',
    ],
    '-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64-static;-L;/usr/aarch64-linux-gnu',
    ...['-DUNIFLOW_TESTS=ON', '-DUNIFLOW_GPU_CHECKS=OFF', '-DUNIFLOW_CUDA=OFF', '-DUNIFLOW_JPEG=OFF'],
  ],
  quiet,
);
run('cmake', ['--build', folder, '--parallel', String(availableParallelism())], quiet);
run('ctest', ['--test-dir', folder, '--output-on-failure']);
