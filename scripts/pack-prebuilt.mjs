/** `node scripts/pack-prebuilt.mjs [FOLDER]`: packs the prebuilt package for this platform. */
import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { npmPack } from './pack.mjs';
import { platforms, prebuiltManifest, thisPlatform } from './platforms.mjs';
import { root, run } from './prepare.mjs';

/** Libraries that are part of every system with this C library. */
const SYSTEM = /^(libc|libm|libdl|libpthread|librt|ld-linux[-\w]*|ld-musl-\w+|libc\.musl-\w+)\.so/;

/** @returns the tarball's path. */
export function packPrebuilt(to) {
  if (!platforms[thisPlatform]) throw new Error(`${thisPlatform} has no prebuilt package: ${Object.keys(platforms).join(', ')}`);
  run(process.execPath, ['scripts/build.mjs', '--target', 'uniflow_prebuilt']);
  const addon = join(root, 'build', 'prebuilt', 'uniflow.node');
  if (process.platform === 'linux') inspect(addon);
  mkdirSync(to, { recursive: true });
  const stage = mkdtempSync(join(tmpdir(), 'uniflow-pack-'));
  try {
    const main = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
    writeFileSync(join(stage, 'package.json'), `${JSON.stringify(prebuiltManifest(thisPlatform, main), null, 2)}\n`);
    copyFileSync(join(root, 'LICENSE'), join(stage, 'LICENSE'));
    copyFileSync(addon, join(stage, 'uniflow.node'));
    const tarball = npmPack(stage, to);
    const mb = (path) => `${(statSync(path).size / 1e6).toFixed(1)} MB`;
    console.log(`${tarball}: ${mb(tarball)}, unpacked ${mb(addon)}`);
    return tarball;
  } finally {
    rmSync(stage, { recursive: true });
  }
}

/** Prints the addon's system requirements; rejects libraries other than the C library's, and an executable stack. */
function inspect(addon) {
  const objdump = (...args) => {
    const { status, stdout, stderr } = spawnSync('objdump', [...args, addon], { encoding: 'utf8', maxBuffer: 1 << 26 });
    if (status !== 0) throw new Error(`objdump: ${stderr}`);
    return stdout;
  };
  const headers = objdump('-p');
  const libraries = [...headers.matchAll(/NEEDED\s+(\S+)/g)].map(([, name]) => name);
  const foreign = libraries.filter((name) => !SYSTEM.test(name));
  if (foreign.length > 0) throw new Error(`${addon} needs ${foreign.join(', ')}, which not every system has`);
  if (/STACK[^\n]*\n[^\n]*flags rwx/.test(headers)) throw new Error(`${addon} asks for an executable stack`);
  const symbols = [...objdump('-T').matchAll(/\(?GLIBC_(\d+)\.(\d+)(?:\.\d+)?\)?\s+(\S+)/g)];
  const newest = Math.max(0, ...symbols.map(([, , minor]) => Number(minor)));
  const names = [...new Set(symbols.filter(([, , minor]) => Number(minor) > 28).map(([, , minor, name]) => `${name} (2.${minor})`))];
  console.log(`It needs ${libraries.join(', ')}; glibc 2.${newest}.`);
  if (names.length > 0)
    console.log(`Newer than glibc 2.28, because this machine's is: ${names.join(', ')}. Build on an older system to run on older ones.`);
}

if (import.meta.filename === process.argv[1]) packPrebuilt(resolve(process.argv[2] ?? join(root, 'build', 'npm')));
