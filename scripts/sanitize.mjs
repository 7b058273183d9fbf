/** Runs the native tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a separate build folder. */
import { availableParallelism } from 'node:os';
import { run } from './prepare.mjs';

const folder = 'build-sanitize';
run('cmake', ['-S', '.', '-B', folder, '-DUNIFLOW_TESTS=ON', '-DUNIFLOW_CUDA=OFF', '-DUNIFLOW_SANITIZE=address,undefined'], {
  stdio: ['ignore', 'ignore', 'inherit'],
});
run('cmake', ['--build', folder, '--parallel', String(availableParallelism())], { stdio: ['ignore', 'ignore', 'inherit'] });
// devices, streams and the thread team are never freed
run('ctest', ['--test-dir', folder, '--output-on-failure'], { env: { ...process.env, ASAN_OPTIONS: 'detect_leaks=0' } });
