/** `uniflow build`: compiles the native addon for this machine. */
import { spawnSync } from 'node:child_process';
import { accessSync, constants } from 'node:fs';
import { join } from 'node:path';
import { buildFolders } from '../addon.js';
import { packageRoot } from '../package.js';

/** @param options CMake's, such as `-DUNIFLOW_CUDA=ON`. */
export function build(options: readonly string[]): void {
  const [inPackage, inCache] = buildFolders;
  const folder = writable(packageRoot) ? inPackage : inCache;
  const script = join(packageRoot, 'scripts', 'build.mjs');
  const { status, error } = spawnSync(process.execPath, [script, '--folder', folder, ...options], { stdio: 'inherit' });
  if (error) throw error;
  if (status !== 0) process.exitCode = 1; // the script has reported the reason
}

function writable(folder: string): boolean {
  try {
    accessSync(folder, constants.W_OK);
    return true;
  } catch {
    return false;
  }
}
