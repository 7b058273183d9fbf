/** Writing files and folders, with the longest and most unusual names that the file system allows. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileNames } from '../lib/cli/inputs.js';
import { makeFolder, replaceFile } from '../lib/io/files.js';
import { openSource } from '../lib/shards/index.js';
import { FolderOutput } from '../lib/shards/output.js';
import type { Skipped } from '../lib/sources/item.js';
import { failure } from './support.js';

let dir: string;
beforeAll(async () => void (dir = await mkdtemp(join(tmpdir(), 'uniflow-files-'))));
afterAll(() => rm(dir, { recursive: true, force: true }));

describe('a name of up to 255 bytes', () => {
  test.each([214, 215, 255])('can be written: %i', async (length) => {
    const name = 'n'.repeat(length);
    await replaceFile(join(dir, name), (file) => file.writeFile('one'));
    expect(await new FolderOutput(dir).create(`${'c'.repeat(length)}`, [Buffer.from('two')])).toBe(true);
    expect(await readFile(join(dir, name), 'utf8')).toBe('one');
  });

  test('can be of any characters: one is not cut into pieces', async () => {
    await replaceFile(join(dir, '画'.repeat(85)), (file) => file.writeFile('three'));
    expect(await readFile(join(dir, '画'.repeat(85)), 'utf8')).toBe('three');
  });

  test('is the limit: a longer one is refused by name', async () => {
    const path = join(dir, 'n'.repeat(256));
    expect((await failure(replaceFile(path, (file) => file.writeFile('')))).message).toMatch(new RegExp(`^${path} cannot be written: `));
    expect((await readdir(dir)).filter((name) => name.endsWith('.tmp'))).toEqual([]);
  });
});

describe('the name of a result', () => {
  test('is of the path of a URL, without its query', () => {
    expect(fileNames([`https://example.org/a/cat.jpg?signature=${'x'.repeat(400)}`, 'https://example.org/b/cat.png'], 'png')).toEqual([
      'cat.png',
      'cat-2.png',
    ]);
  });

  test('is cut where it would be too long, and numbered', () => {
    const names = fileNames([`${'a'.repeat(252)}.x`, `${'a'.repeat(251)}.jpg`], 'webp');
    expect(names.map((name) => Buffer.byteLength(name) <= 255)).toEqual([true, true]);
    expect(new Set(names).size).toBe(2);
  });
});

test('a file whose name is not UTF-8 is passed over by name, and the others are read', async () => {
  const folder = join(dir, 'latin1');
  await mkdir(folder);
  await writeFile(Buffer.from(join(folder, 'caf\xe9.png'), 'latin1'), 'an image');
  await writeFile(join(folder, 'tea.png'), 'an image');
  const skipped: Skipped[] = [];
  const ids: string[] = [];
  for await (const { id } of openSource(folder).items((skip) => skipped.push(skip))) ids.push(id);
  expect(ids).toEqual(['tea.png']);
  expect(skipped).toEqual([{ path: join(folder, 'caf\uFFFD.png'), reason: 'its name is not UTF-8: rename it', lost: true }]);
});

describe('a folder', () => {
  test('is made with those above it, and may be there', async () => {
    await makeFolder(join(dir, 'a', 'b', 'c'));
    await makeFolder(join(dir, 'a', 'b', 'c'));
    expect(await readdir(join(dir, 'a', 'b'))).toEqual(['c']);
  });

  test.each(['/proc/x/y/z', '/dev/null/x'])('that cannot be made is an error that names it: %s', async (path) => {
    const error = await failure(makeFolder(path));
    expect(error).toMatchObject({ code: 'BAD_INPUT', subject: path });
    expect(error.message).toMatch(`${path} cannot be written: `);
  });
});
