/**
 * Installs packages into an application's folder like `npm install`, without a network.
 * `node scripts/layout.mjs FOLDER`: the main package with this checkout's addon. Prints the main package's tarball.
 */
import { copyFileSync, cpSync, existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { packMain } from './pack.mjs';
import { SCOPE, thisPlatform } from './platforms.mjs';
import { root, run } from './prepare.mjs';

/** Copies the dependencies of the library's users: neither development packages nor optional peers. */
export function copyDependencies(to) {
  const { packages } = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8'));
  for (const [path, entry] of Object.entries(packages))
    if (path && !entry.dev && existsSync(join(root, path))) cpSync(join(root, path), join(to, path), { recursive: true });
}

/** @param name name of the package in the tarball. */
export function unpack(tarball, to, name) {
  const folder = join(to, 'node_modules', name);
  mkdirSync(folder, { recursive: true });
  run('tar', ['-xzf', tarball, '-C', folder, '--strip-components=1']);
}

function layOut(to) {
  copyDependencies(to);
  const tarball = packMain(to);
  unpack(tarball, to, 'uniflow-tokenizer');
  const prebuilt = join(to, 'node_modules', SCOPE, thisPlatform);
  mkdirSync(prebuilt, { recursive: true });
  copyFileSync(join(root, 'build', 'Release', 'uniflow.node'), join(prebuilt, 'uniflow.node'));
  return tarball;
}

if (import.meta.filename === process.argv[1]) console.log(layOut(resolve(process.argv[2])));
