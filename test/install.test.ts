/** The package in an application's folder: installed packages, optional packages, and ways to import it. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { build } from 'esbuild';
import { execFile } from 'node:child_process';
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { FEATURES, installCommand, optional } from '../lib/optional.js';
import { failure, photos, root } from './support.js';

const run = promisify(execFile);
/** Entry points of the package besides the main one. */
const SUBPATHS = ['train', 'serve', 'queue', 'shards', 'eval'];
/** Maximum number of installed packages besides this one and its addon. */
const MOST_PACKAGES = 50;

let app: string;
let tarball: string;
let manifest: Record<'dependencies' | 'devDependencies' | 'peerDependencies', Record<string, string>> & {
  peerDependenciesMeta: Record<string, { optional: boolean }>;
};

beforeAll(async () => {
  app = await mkdtemp(join(tmpdir(), 'uniflow-install-'));
  const { stdout } = await run(process.execPath, ['scripts/layout.mjs', app], { cwd: root });
  tarball = stdout.trim().split('\n').at(-1) as string;
  await cp(join(photos, 'mountains.jpg'), join(app, 'photo.jpg'));
  manifest = JSON.parse(await readFile(join(root, 'package.json'), 'utf8'));
}, 600_000);

afterAll(() => rm(app, { recursive: true }));

/** Runs a program in the application. @returns its output. */
async function execute(name: string, source: string): Promise<string> {
  await writeFile(join(app, name), source);
  return (await run(process.execPath, ['--no-warnings', name, 'photo.jpg'], { cwd: app })).stdout.trim();
}

const ENCODE = `
const uniflow = await UniFlow.load();
const { latents } = await uniflow.encode([process.argv[2]]);
await uniflow.dispose();
console.log(latents.shape[0]);
`;

describe('an install without optional packages', () => {
  test(`brings at most ${MOST_PACKAGES} packages, and none that a feature alone needs`, async () => {
    const packages = (await packagesIn(join(app, 'node_modules'))).filter((name) => !name.includes('uniflow-tokenizer'));
    expect(packages.length).toBeLessThanOrEqual(MOST_PACKAGES);
    expect(packages.filter((name) => name in manifest.peerDependencies)).toEqual([]);
  });

  test('encodes', async () => {
    expect(await execute('encode.mjs', `import { UniFlow } from 'uniflow-tokenizer'; ${ENCODE}`)).toBe('1');
  });

  test.each([
    ['serve', ['serve', '--port', '0']],
    ['queue', ['worker', '--queue', 'redis://127.0.0.1:1']],
    ['queue', ['encode', 'photo.jpg', '--out', 'latents/', '--queue', 'redis://127.0.0.1:1']],
    ['parquet', ['encode', 'photo.jpg', '--out', 'latents/', '--format', 'parquet']],
    ['parquet', ['encode', 'images.parquet', '--out', 'latents/']],
    ['parquet', ['train', '--init', 'tiny', '--regime', 'finetune', '--data', 'images.parquet', '--steps', '1', '--out', 'run']],
  ] as const)('says what to install for %s: uniflow %j', async (feature, args) => {
    await writeFile(join(app, 'images.parquet'), 'PAR1');
    const main = join('node_modules', 'uniflow-tokenizer', 'dist', 'cli', 'main.js');
    const { code, stderr } = await run(process.execPath, [main, ...args], { cwd: app }).then(
      () => ({ code: 0, stderr: '' }),
      (error: { code: number; stderr: string }) => error,
    );
    expect(stderr).toContain(`Install them with: ${installCommand(feature)}`);
    expect(code).toBe(1);
  });

  test('says what to install for an output on S3', async () => {
    const program = `import { openOutput } from 'uniflow-tokenizer'; await openOutput('s3://bucket/x').catch(({ code, message }) => console.log(code, message));`;
    expect(await execute('s3.mjs', program)).toContain(
      `UNSUPPORTED an output on S3 needs packages that are not installed, such as @aws-sdk/client-s3.`,
    );
  });
});

describe('the package is imported', () => {
  test.each(SUBPATHS)('as uniflow-tokenizer/%s, which has nothing that the main entry has not', async (subpath) => {
    const program = `
      import * as main from 'uniflow-tokenizer';
      import * as part from 'uniflow-tokenizer/${subpath}';
      console.log(Object.entries(part).every(([name, value]) => main[name] === value), Object.keys(part).length > 0);`;
    expect(await execute(`${subpath}.mjs`, program)).toBe('true true');
  });

  test('by require()', async () => {
    const program = `const { UniFlow } = require('uniflow-tokenizer'); (async () => { ${ENCODE} })();`;
    expect(await execute('encode.cjs', program)).toBe('1');
  });

  test.each(['esm', 'cjs'] as const)('from a bundle of esbuild, as %s', async (format) => {
    await writeFile(join(app, 'source.ts'), `import { UniFlow } from 'uniflow-tokenizer'; (async () => { ${ENCODE} })();`);
    const { outputFiles } = await build({
      entryPoints: [join(app, 'source.ts')],
      bundle: true,
      platform: 'node',
      format,
      external: ['uniflow-tokenizer'],
      write: false,
    });
    expect(await execute(`bundle.${format === 'esm' ? 'mjs' : 'cjs'}`, outputFiles[0]!.text)).toBe('1');
  });

  test('with types that need none of the optional packages', async () => {
    for (const name of ['@types/node', 'undici-types'])
      await cp(join(root, 'node_modules', name), join(app, 'node_modules', name), { recursive: true });
    const names = ['', ...SUBPATHS.map((subpath) => `/${subpath}`)];
    const source = names.map((name, i) => `import * as part${i} from 'uniflow-tokenizer${name}';\nvoid part${i};\n`).join('');
    const files = ['types.mts', 'types.cts'];
    for (const file of files) await writeFile(join(app, file), source);
    const options = ['--noEmit', '--strict', '--module', 'nodenext', '--target', 'es2022', '--lib', 'es2023,esnext.disposable'];
    const { stdout } = await run(process.execPath, [join(root, 'node_modules', 'typescript', 'bin', 'tsc'), ...options, ...files], {
      cwd: app,
    }).catch((error: { stdout: string }) => error);
    expect(stdout.split('\n').filter((line) => line.includes('uniflow-tokenizer'))).toEqual([]);
  }, 300_000);
});

describe('the published package', () => {
  test('has exports and types as npm users expect: publint and attw find nothing', async () => {
    const tool = (name: string, args: string[]): Promise<unknown> =>
      run(join(root, 'node_modules', '.bin', name), args, { cwd: root }).catch((error: { stdout: string; stderr: string }) => {
        throw new Error(error.stdout + error.stderr);
      });
    await tool('publint', ['run', tarball, '--strict']);
    await tool('attw', [tarball, '--profile', 'esm-only', '--no-emoji', '--format', 'ascii']);
  }, 300_000);

  test('has every package of a feature as an optional peer, tested in the same versions', () => {
    const packages = [...new Set(Object.values(FEATURES).flatMap((feature) => [...feature.packages]))].sort();
    expect(Object.keys(manifest.peerDependencies).sort()).toEqual(packages);
    expect(manifest.peerDependenciesMeta).toEqual(Object.fromEntries(packages.map((name) => [name, { optional: true }])));
    expect(manifest.devDependencies).toMatchObject(manifest.peerDependencies);
    expect(packages.filter((name) => name in manifest.dependencies)).toEqual([]);
  });
});

test('an import that fails for another reason is not taken for a package that is not installed', async () => {
  const broken = Object.assign(new Error("Cannot find package 'avvio' imported from fastify"), { code: 'ERR_MODULE_NOT_FOUND' });
  await expect(optional('serve', () => Promise.reject(broken))).rejects.toBe(broken);
  const missing = Object.assign(new Error("Cannot find package 'fastify' imported from server.js"), { code: 'ERR_MODULE_NOT_FOUND' });
  expect(await failure(optional('serve', () => Promise.reject(missing)))).toMatchObject({
    ...{ code: 'UNSUPPORTED', subject: 'fastify', expected: `fastify ${manifest.peerDependencies['fastify']}`, actual: 'not installed' },
    cause: missing,
  });
});

/** Names of the packages in a node_modules folder, including nested ones. */
async function packagesIn(folder: string): Promise<string[]> {
  const found: string[] = [];
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
    const path = join(entry.parentPath, entry.name);
    const name = /(?:^|\/)node_modules\/((?:@[^/]+\/)?[^/@.][^/]*)$/.exec(path.slice(folder.length - 'node_modules'.length))?.[1];
    if (entry.isDirectory() && name !== undefined) found.push(name);
  }
  return found;
}
