/**
 * `node scripts/test-prebuilt.mjs [--this-node]`: packs the main and the prebuilt package, unpacks both beside their dependencies in an
 * empty folder, and encodes a photograph there without a compiler, install scripts or a network. Uses this Node.js and, unless --this-node
 * is given, also Node.js 22, 24 and Bun, whose binaries come from npm and are cached in build/runtimes.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { copyDependencies, unpack } from './layout.mjs';
import { packMain } from './pack.mjs';
import { packPrebuilt } from './pack-prebuilt.mjs';
import { SCOPE, thisPlatform } from './platforms.mjs';
import { root, run } from './prepare.mjs';

/** npm packages that contain only a binary. */
const RUNTIMES = [
  { name: 'Node.js 22', spec: `node-${process.platform}-${process.arch}@22`, binary: 'bin/node' },
  { name: 'Node.js 24', spec: `node-${process.platform}-${process.arch}@24`, binary: 'bin/node' },
  { name: 'Bun', spec: `@oven/bun-${process.platform}-${process.arch === 'arm64' ? 'aarch64' : process.arch}@1`, binary: 'bin/bun' },
];

const PROGRAM = `
import { createHash } from 'node:crypto';
import { UniFlow } from 'uniflow-tokenizer';
const uniflow = await UniFlow.load();
const { latents } = await uniflow.encode([process.argv[2]]);
await uniflow.dispose();
console.log(latents.shape.join('x'), createHash('sha256').update(latents.data).digest('hex'));
`;

const folder = mkdtempSync(join(tmpdir(), 'uniflow-prebuilt-'));
try {
  install(folder);
  writeFileSync(join(folder, 'encode.mjs'), PROGRAM);
  const expected = encode(process.execPath, join(folder, 'encode.mjs'));
  console.log(`Node.js ${process.versions.node}: ${expected}`);
  if (!/^1x\d+x\d+ [0-9a-f]{64}$/.test(expected)) throw new Error('no latents');
  for (const runtime of process.argv.includes('--this-node') ? [] : RUNTIMES) {
    const binary = fetched(runtime);
    if (!binary) continue;
    const found = encode(binary, join(folder, 'encode.mjs'));
    if (found !== expected) throw new Error(`${runtime.name} gives ${found}`);
    console.log(`${runtime.name}: the same`);
  }
} finally {
  rmSync(folder, { recursive: true });
}

/** Installs both packages and the main one's dependencies. */
function install(to) {
  copyDependencies(to);
  unpack(packMain(to), to, 'uniflow-tokenizer');
  unpack(packPrebuilt(to), to, `${SCOPE}/${thisPlatform}`);
}

/** Output of the program, run without a PATH and, if the system permits, without a network. */
function encode(binary, program) {
  const command = [binary, program, join(root, 'examples', 'photos', 'mountains.jpg')];
  const offline = ['unshare', '--net', '--map-root-user'];
  const alone = spawnSync(offline[0], [...offline.slice(1), 'true']).status === 0 ? offline : [];
  const [first, ...args] = [...alone, ...command];
  const env = { HOME: folder, PATH: join(folder, 'nothing') };
  const path = first === binary ? first : spawnSync('which', [first], { encoding: 'utf8' }).stdout.trim();
  const { status, stdout, stderr } = spawnSync(path, args, { cwd: folder, env, encoding: 'utf8' });
  if (status !== 0) throw new Error(`${binary} ends with ${status}:\n${stderr}`);
  return stdout.trim();
}

/** The runtime's binary; if npm has none for this platform, prints the reason and returns undefined. */
function fetched({ name, spec, binary }) {
  const to = join(root, 'build', 'runtimes', spec.replaceAll('/', '+'));
  const path = join(to, 'package', binary);
  if (existsSync(path)) return path;
  mkdirSync(to, { recursive: true });
  const { status, stdout, stderr } = spawnSync('npm', ['pack', '--json', spec, '--pack-destination', to], { encoding: 'utf8' });
  if (status !== 0) {
    console.log(`${name}: not run, as npm cannot get ${spec}: ${stderr.split('\n')[0]}`);
    return undefined;
  }
  const { filename } = JSON.parse(stdout)[0];
  run('tar', ['-xzf', join(to, filename.replace('@', '').replace('/', '-')), '-C', to]);
  rmSync(join(to, filename));
  return path;
}
