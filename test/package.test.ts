import { expect, test } from '@jest/globals';
import { execFile } from 'node:child_process';
import { readdir, readFile } from 'node:fs/promises';
import { join, relative } from 'node:path';
import { promisify } from 'node:util';
import { platformName } from '../lib/addon.js';
import { prebuiltManifest, publishedManifest } from '../scripts/platforms.mjs';

const root = join(import.meta.dirname, '..');

/** The files of the package as published. */
async function packed(): Promise<string[]> {
  const { stdout } = await promisify(execFile)('npm', ['pack', '--dry-run', '--json', '--ignore-scripts'], {
    cwd: root,
    maxBuffer: 1 << 24,
  });
  const [{ files }] = JSON.parse(stdout) as [{ files: { path: string }[] }];
  return files.map(({ path }) => path);
}

async function sources(folder: string): Promise<string[]> {
  const entries = await readdir(join(root, folder), { recursive: true, withFileTypes: true });
  return entries.filter((entry) => entry.isFile()).map((entry) => relative(root, join(entry.parentPath, entry.name)));
}

test('the package has all that its addon is built from, and no tests', async () => {
  const files = await packed();
  const native = (await sources('native')).filter((path) => !path.startsWith('native/test/'));
  const scripts = ['CMakeLists.txt', 'scripts/build.mjs', 'scripts/system.mjs'];
  const wanted = [...native, ...(await sources('bindings')), ...(await sources('models/default')), ...scripts];
  expect(wanted.filter((path) => !files.includes(path))).toEqual([]);
  expect(files).toContain('lib/serve/page.html'); // is read from there
  expect(files.filter((path) => /(^|\/)test\//.test(path))).toEqual([]);
});

test('the package has no install script, and names the prebuilt packages when it is published', async () => {
  const main = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { version: string; scripts: Record<string, string> };
  expect(Object.keys(main.scripts).filter((name) => /install/.test(name))).toEqual([]);
  const published = publishedManifest(main);
  expect(published.optionalDependencies[`@uniflow-tokenizer/${platformName}`]).toBe(main.version);
  for (const name of Object.keys(published.optionalDependencies)) {
    const prebuilt = prebuiltManifest(name.replace('@uniflow-tokenizer/', ''), main);
    expect(prebuilt).toMatchObject({ name, version: main.version, files: ['uniflow.node'] });
    expect(prebuilt).not.toHaveProperty('scripts');
    expect([prebuilt.os, prebuilt.cpu].every((list) => list.length === 1)).toBe(true);
  }
});

// Slow: links the prebuilt addon and packs both packages.
test('both packages, unpacked where there is no compiler, network or install script, encode a photograph', async () => {
  const { stdout } = await promisify(execFile)(process.execPath, ['scripts/test-prebuilt.mjs', '--this-node'], { cwd: root });
  expect(stdout).toMatch(/1x\d+x\d+ [0-9a-f]{64}/);
}, 600_000);
