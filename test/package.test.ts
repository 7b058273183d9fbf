import { expect, test } from '@jest/globals';
import { execFile } from 'node:child_process';
import { readdir } from 'node:fs/promises';
import { join, relative } from 'node:path';
import { promisify } from 'node:util';

const root = join(import.meta.dirname, '..');

/** Of the package as it would be published. */
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
  const wanted = [...native, ...(await sources('bindings')), ...(await sources('models/default')), 'CMakeLists.txt', 'scripts/install.mjs'];
  expect(wanted.filter((path) => !files.includes(path))).toEqual([]);
  expect(files.filter((path) => /(^|\/)test\//.test(path))).toEqual([]);
});
