/** Installs the compared packages on first use, because the project itself does not need them. */
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';

const require = createRequire(import.meta.url);

/**
 * Loads a package of bench/peers/package.json, installing all of them if it is missing. If that fails, prints the reason and returns
 * undefined.
 */
export function loadPeer<T>(name: string, say: (line: string) => void): T | undefined {
  try {
    return require(name) as T;
  } catch {
    say(`\nInstalling ${name} into bench/peers ...`);
  }
  try {
    install();
    return require(name) as T;
  } catch (failure) {
    say(`${name} cannot be had, so it is not compared with: ${(failure as Error).message.split('\n')[0] ?? ''}`);
    return undefined;
  }
}

/** Install scripts are skipped: onnxruntime-node's script only fetches GPU libraries, and the package includes those of the CPU. */
function install(): void {
  const npm = ['install', '--prefix', import.meta.dirname, '--ignore-scripts', '--no-package-lock', '--no-audit', '--no-fund'];
  const { status, stderr, error } = spawnSync('npm', npm, { encoding: 'utf8' });
  if (status !== 0) throw error ?? new Error(stderr.split('\n').find((line) => line.startsWith('npm error')) ?? 'npm failed');
}
