/**
 * `node scripts/pack.mjs [FOLDER]`: packs the main package, which references the prebuilt ones. Publish those first:
 * scripts/pack-prebuilt.mjs, on a machine of each platform.
 */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { spawnSync } from 'node:child_process';
import { publishedManifest } from './platforms.mjs';
import { root, run } from './prepare.mjs';

/** Packs `folder`. @returns the tarball's path. */
export function npmPack(folder, to) {
  const args = ['pack', '--json', '--ignore-scripts', '--pack-destination', to];
  const { status, stdout, stderr } = spawnSync('npm', args, { cwd: folder, encoding: 'utf8', maxBuffer: 1 << 26 });
  if (status !== 0) throw new Error(`npm pack in ${folder}: ${stderr}`);
  return join(to, JSON.parse(stdout)[0].filename);
}

/** @returns the tarball's path. */
export function packMain(to) {
  mkdirSync(to, { recursive: true });
  const stage = mkdtempSync(join(tmpdir(), 'uniflow-pack-'));
  try {
    run('npx', ['tsc', '-p', 'tsconfig.json']);
    run('tar', ['-xzf', npmPack(root, stage), '-C', stage]);
    const manifest = join(stage, 'package', 'package.json');
    writeFileSync(manifest, `${JSON.stringify(publishedManifest(JSON.parse(readFileSync(manifest, 'utf8'))), null, 2)}\n`);
    return npmPack(join(stage, 'package'), to);
  } finally {
    rmSync(stage, { recursive: true });
  }
}

if (import.meta.filename === process.argv[1]) console.log(packMain(resolve(process.argv[2] ?? join(root, 'build', 'npm'))));
