/** The packages that are compared with: of no use to the project itself, so they are installed when they are first asked for. */
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';

const require = createRequire(import.meta.url);

/** Loads a package of bench/peers/package.json, installing them all where it is not there; undefined, and says why, where it cannot be had. */
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

/** Install scripts are left out: onnxruntime-node's only fetches GPU libraries, and the CPU's are in the package. */
function install(): void {
  const npm = ['install', '--prefix', import.meta.dirname, '--ignore-scripts', '--no-package-lock', '--no-audit', '--no-fund'];
  const { status, stderr, error } = spawnSync('npm', npm, { encoding: 'utf8' });
  if (status !== 0) throw error ?? new Error(stderr.split('\n').find((line) => line.startsWith('npm error')) ?? 'npm failed');
}
