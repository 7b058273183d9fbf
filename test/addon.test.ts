/** Lookup of the addon, errors if it is missing, and the environment variables that affect it. */
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { mkdir, rm, symlink, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { platformName } from '../lib/addon.js';
import { cpuInfo } from '../lib/device.js';
import { Compiled } from './fixtures/child.js';
import { root } from './support.js';

const built = join(root, 'build', 'Release', 'uniflow.node');
const nowhere = { XDG_CACHE_HOME: '/nonexistent' };

/** Prints the path of the loaded addon, or the error. */
const LOAD = `
  const { addonPath } = await import(process.cwd() + '/dist/native.js').catch((error) => ({ addonPath: error.code + ': ' + error.message }));
  print(addonPath);`;

describe('the addon', () => {
  let compiled: Compiled;
  beforeEach(async () => {
    compiled = await Compiled.library();
    await rm(join(compiled.dir, 'build')); // a link to this checkout's build
  });
  afterEach(() => compiled.remove());

  async function load(env: NodeJS.ProcessEnv): Promise<string> {
    const { printed, stderr } = await compiled.run(LOAD, { env });
    expect(stderr).toBe('');
    return printed[0] as string;
  }

  async function put(path: string): Promise<string> {
    await mkdir(dirname(path), { recursive: true });
    await symlink(built, path);
    return path;
  }

  test('loads from the package when it was compiled there', async () => {
    const path = await put(join(compiled.dir, 'build', 'Release', 'uniflow.node'));
    expect(await load(nowhere)).toBe(path);
  });

  test('loads from the cache when the package has none', async () => {
    const cache = join(compiled.dir, 'cache');
    await writeFile(join(compiled.dir, 'package.json'), '{ "type": "module", "version": "7.8.9" }');
    const path = await put(join(cache, 'uniflow-tokenizer', '7.8.9', platformName, 'Release', 'uniflow.node'));
    expect(await load({ XDG_CACHE_HOME: cache })).toBe(path);
  });

  test('loads the prebuilt one when none was compiled, or the compiled one does not load', async () => {
    await put(join(compiled.dir, 'dist', 'node_modules', '@uniflow-tokenizer', platformName, 'uniflow.node'));
    expect(await load(nowhere)).toBe(built); // Node resolves links of packages
    await mkdir(join(compiled.dir, 'build', 'Release'), { recursive: true });
    await writeFile(join(compiled.dir, 'build', 'Release', 'uniflow.node'), 'for another system');
    expect(await load(nowhere)).toBe(built);
  });

  test('reports every location tried, and the commands to run, when there is none', async () => {
    const message = await load(nowhere);
    expect(message).toContain('UNSUPPORTED: The native addon cannot be loaded. Tried:');
    expect(message).toContain(`- ${join(compiled.dir, 'build', 'Release', 'uniflow.node')}: not there`);
    expect(message).toContain('- /nonexistent/uniflow-tokenizer/');
    expect(message).toContain(`- @uniflow-tokenizer/${platformName}: not installed`);
    expect(message).toContain(`This is ${platformName}, Node.js ${process.version}`);
    expect(message).toContain('npm install --include=optional uniflow-tokenizer');
    expect(message).toContain('npx uniflow build (all that this needs is here)');
  });

  test('reports what the system lacks for compiling it', async () => {
    const message = await load({ ...nowhere, PATH: '/nonexistent' });
    expect(message).toMatch(/npx uniflow build\n\s+uniflow-tokenizer needs a C\+\+20 compiler, CMake, make or Ninja/);
    expect(message).toContain('apt-get install -y g++ cmake make');
  });

  test('reports the platforms of the prebuilt packages that are installed instead', async () => {
    await mkdir(join(compiled.dir, 'dist', 'node_modules', '@uniflow-tokenizer', 'sunos-sparc'), { recursive: true });
    expect(await load(nowhere)).toContain('installed for sunos-sparc: node_modules that were copied from another system');
  });

  test('says why an existing file does not load', async () => {
    await mkdir(join(compiled.dir, 'build', 'Release'), { recursive: true });
    await writeFile(join(compiled.dir, 'build', 'Release', 'uniflow.node'), 'for another system');
    expect(await load(nowhere)).toMatch(/uniflow\.node: .*(file too short|invalid ELF header|not a mach-o file)/);
  });
});

describe('the environment', () => {
  const USE = `
    const { cpuInfo } = await library();
    try {
      const { kernels, threads } = cpuInfo();
      print({ kernels, threads });
    } catch ({ code, message }) {
      print({ code, message });
    }`;
  let compiled: Compiled;
  beforeEach(async () => {
    compiled = await Compiled.library();
  });
  afterEach(() => compiled.remove());
  const use = async (env: NodeJS.ProcessEnv): Promise<unknown> => {
    const { printed, stderr } = await compiled.run(USE, { env });
    expect(stderr).toBe('');
    return printed[0];
  };

  test('chooses the instruction set of the kernels from those of this machine', async () => {
    for (const set of cpuInfo().instructionSets) expect(await use({ UNIFLOW_ISA: set })).toMatchObject({ kernels: set });
    expect(await use({ UNIFLOW_ISA: '' })).toMatchObject({ kernels: cpuInfo().instructionSets[0] });
  });

  test('rejects an instruction set that this machine lacks, and lists the available ones', async () => {
    expect(await use({ UNIFLOW_ISA: 'avx1024' })).toEqual({
      code: 'BAD_INPUT',
      message: `UNIFLOW_ISA: expected an instruction set of this machine (${cpuInfo().instructionSets.join(', ')}), but got avx1024`,
    });
  });

  test('sets the number of threads, UNIFLOW_THREADS before OMP_NUM_THREADS', async () => {
    expect(await use({ UNIFLOW_THREADS: '3', OMP_NUM_THREADS: '2' })).toMatchObject({ threads: 3 });
    expect(await use({ UNIFLOW_THREADS: '', OMP_NUM_THREADS: '2' })).toMatchObject({ threads: 2 });
    expect(await use({ UNIFLOW_THREADS: 'many' })).toEqual({
      code: 'BAD_INPUT',
      message: 'UNIFLOW_THREADS: expected a number of threads from 1 to 1024, but got many',
    });
  });
});
