/**
 * System requirements of the build and the tests, and how to install them. Plain Node, because it runs before anything is installed. As a
 * command, it prints the missing requirements of the build.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, realpathSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const includeDirs = [
  '/usr/include',
  '/usr/local/include',
  '/opt/homebrew/include',
  ...(process.env.CPATH ?? '').split(':').filter(Boolean),
];
const runs = (command, ...args) => spawnSync(command, args, { stdio: 'ignore' }).status === 0;
export const has = (command) => runs(command, '--version');
const header = (path) => includeDirs.some((dir) => existsSync(`${dir}/${path}`));

/**
 * A Python with NumPy, or undefined. Prefers the system's Python, which distribution packages install for and which another one in the path
 * may hide.
 */
export const pythonWithNumpy = () => ['/usr/bin/python3', 'python3'].find((python) => runs(python, '-c', 'import numpy'));

/** A Python with Pillow, found the same way. */
export const pythonWithPillow = () => ['/usr/bin/python3', 'python3'].find((python) => runs(python, '-c', 'import PIL'));

/** Package names by platform. */
const needs = [
  { what: 'a C++20 compiler', apt: 'g++', dnf: 'gcc-c++', brew: 'gcc', there: () => ['c++', 'g++', 'clang++'].some(has) },
  { what: 'CMake', apt: 'cmake', dnf: 'cmake', brew: 'cmake', there: () => has('cmake') },
  { what: 'make or Ninja', apt: 'make', dnf: 'make', brew: 'make', there: () => has('make') || has('ninja') },
];
/** Additional requirements of some commands. */
const needsOf = {
  tests: [
    { what: 'libjpeg-turbo', apt: 'libjpeg-dev', dnf: 'libjpeg-turbo-devel', brew: 'jpeg-turbo', there: () => header('jpeglib.h') },
    {
      what: 'nlohmann/json',
      apt: 'nlohmann-json3-dev',
      dnf: 'json-devel',
      brew: 'nlohmann-json',
      there: () => header('nlohmann/json.hpp'),
    },
    { what: 'Chromium', apt: 'chromium', dnf: 'chromium', brew: 'chromium', there: () => has('chromium') },
    { what: 'Redis', apt: 'redis-server', dnf: 'redis', brew: 'redis', there: () => has('redis-server') },
    { what: 'NumPy', apt: 'python3-numpy', dnf: 'python3-numpy', brew: 'numpy', there: () => pythonWithNumpy() !== undefined },
    { what: 'Pillow', apt: 'python3-pil', dnf: 'python3-pillow', brew: 'pillow', there: () => pythonWithPillow() !== undefined },
  ],
  // elsewhere, download the four files from the publisher and pass --data
  fashionMnist: [{ what: 'Fashion-MNIST', apt: 'dataset-fashion-mnist', there: () => existsSync('/usr/share/datasets/fashion-mnist') }],
};

/** @param wanted true for each name of {@link needsOf} that is required. */
export const missing = (wanted = {}) =>
  [needs, ...Object.keys(needsOf).map((name) => (wanted[name] ? needsOf[name] : []))].flat().filter((n) => !n.there());

/** One message that names the missing requirements and the command that installs them. */
export function advice(absent) {
  const names = (manager) => absent.map((n) => n[manager] ?? `(${n.what}: by hand)`).join(' ');
  return `uniflow-tokenizer needs ${absent.map((n) => n.what).join(', ')}. Install with:
  Debian/Ubuntu:  sudo apt-get install -y ${names('apt')}
  Fedora:         sudo dnf install -y ${names('dnf')}
  macOS:          brew install ${names('brew')}`;
}

/** Installs missing requirements if permitted (Debian as root, or with passwordless sudo); returns those still missing. */
export function installMissing(options) {
  const absent = missing(options);
  if (absent.length === 0 || !has('apt-get')) return absent;
  const root = process.getuid?.() === 0;
  if (!root && spawnSync('sudo', ['-n', 'true'], { stdio: 'ignore' }).status !== 0) return absent;
  const packages = absent.map((n) => n.apt);
  console.log(`Installing ${packages.join(', ')} (apt-get)`);
  const apt = ['env', 'DEBIAN_FRONTEND=noninteractive', 'apt-get', '-qq', '-y'];
  const [command, ...fixed] = root ? apt : ['sudo', ...apt];
  for (const args of [['update'], ['install', '--no-install-recommends', ...packages]])
    execFileSync(command, [...fixed, ...args], { stdio: ['ignore', 'ignore', 'inherit'] });
  return missing(options);
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const absent = missing();
  if (absent.length > 0) console.log(advice(absent));
}
