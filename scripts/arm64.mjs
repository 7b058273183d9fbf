/**
 * `node scripts/arm64.mjs`: compiles the native tests of the CPU kernels for arm64 and runs them in QEMU. Not part of CI, because it takes
 * long. Requires, on Debian: apt install g++-aarch64-linux-gnu qemu-user-static
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
