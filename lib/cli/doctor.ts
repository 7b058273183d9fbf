/**
 * `uniflow doctor`: checks the installation and says how to fix problems. It must run even if nothing else does, so possibly broken modules
 * are imported only by their own check.
 */
import { access, constants } from 'node:fs/promises';
import { arch, availableParallelism, cpus, freemem, platform, release, totalmem } from 'node:os';
import { dirname } from 'node:path';
import { pathExists } from '../io/files.js';
import type { ReportOptions } from './options.js';
import { printJson } from './output.js';

interface Finding {
  name: string;
  ok: boolean;
  detail: string;
  /** How to fix the problem, if there is one. */
  advice?: string;
}

const OLDEST_NODE = [20, 19] as const;
/** sharp's format names, with the file extensions. */
const FORMATS = { jpeg: 'jpeg', png: 'png', webp: 'webp', heif: 'avif', tiff: 'tiff', gif: 'gif' } as const;

export async function doctor(options: ReportOptions): Promise<void> {
  const checks: [string, () => Omit<Finding, 'name'> | Promise<Omit<Finding, 'name'>>][] = [
    ['Node.js', node],
    ['system', system],
    ['memory', memory],
    ['native addon', addon],
    ['kernels', kernels],
    ['threads', threads],
    ['devices', deviceList],
    ['images (sharp)', images],
    ['hub cache', hubCache],
    ['self-test', selfTest],
  ];
  const findings: Finding[] = [];
  for (const [name, check] of checks) {
    const found = await Promise.resolve().then(check).catch(failure);
    const known = !found.ok && findings.find(({ ok, detail }) => !ok && detail === found.detail);
    findings.push(known ? { name, ok: false, detail: `as ${known.name}` } : { name, ...found });
  }
  const works = findings.at(-1)?.ok === true;
  if (!works) process.exitCode = 1;
  if (options.json) printJson({ works, findings });
  else process.stdout.write(report(findings, works));
}

function failure(error: unknown): Omit<Finding, 'name'> {
  const [detail, ...advice] = (error instanceof Error ? error.message : String(error)).split('\n');
  return { ok: false, detail: detail as string, ...(advice.length > 0 ? { advice: advice.join('\n') } : {}) };
}

function report(findings: readonly Finding[], works: boolean): string {
  const indent = (text: string): string => text.split('\n').join(`\n${' '.repeat(22)}`);
  const lines = findings.map(
    ({ name, ok, detail, advice }) => `${ok ? '✓' : '✗'} ${name.padEnd(20)}${indent(detail)}${advice ? indent(`\n${advice}`) : ''}`,
  );
  return `${lines.join('\n')}\n\n${works ? 'Encoding works.' : 'Encoding does not work: see ✗ above.'}\n`;
}

function node(): Omit<Finding, 'name'> {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
  const ok = major > OLDEST_NODE[0] || (major === OLDEST_NODE[0] && minor >= OLDEST_NODE[1]);
  return {
    ok,
    detail: `${process.version}, ABI ${process.versions.modules}`,
    ...(ok ? {} : { advice: `Install Node.js ${OLDEST_NODE.join('.')} or newer.` }),
  };
}

function system(): Omit<Finding, 'name'> {
  const ok = ['linux', 'darwin'].includes(platform());
  const detail = `${platform()} ${release()}, ${arch()}, ${cpus()[0]?.model.trim() ?? 'unknown CPU'}`;
  return { ok, detail, ...(ok ? {} : { advice: 'Only Linux and macOS are supported; on Windows, use WSL.' }) };
}

function memory(): Omit<Finding, 'name'> {
  const gb = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`;
  const limit = process.constrainedMemory();
  const limited = limit > 0 && limit < totalmem() ? `, of which this process may use ${gb(limit)}` : '';
  return { ok: true, detail: `${gb(totalmem())}${limited}, ${gb(freemem())} free` };
}

async function addon(): Promise<Omit<Finding, 'name'>> {
  const { addonPath } = await import('../native.js');
  return { ok: true, detail: addonPath };
}

async function kernels(): Promise<Omit<Finding, 'name'>> {
  const { cpuInfo } = await import('../device.js');
  const { kernels: level, nativeBfloat16 } = cpuInfo();
  return { ok: true, detail: `${level}; bfloat16 products ${nativeBfloat16 ? 'in hardware' : 'as float32, at its speed'}` };
}

async function threads(): Promise<Omit<Finding, 'name'>> {
  const { cpuInfo } = await import('../device.js');
  const [count, cores] = [cpuInfo().threads, availableParallelism()];
  const detail = `${count}, on ${cores} ${cores === 1 ? 'core' : 'cores'}`;
  if (count <= cores) return { ok: true, detail };
  return {
    ok: false,
    detail,
    advice: `More threads than cores wait for each other: set UNIFLOW_THREADS=${cores}, or pass --threads ${cores}.`,
  };
}

async function deviceList(): Promise<Omit<Finding, 'name'>> {
  const { devices } = await import('../device.js');
  const found = devices();
  return {
    ok: found.some(({ available }) => available),
    detail: found.map(({ name, available, description }) => `${name}${available ? '' : ' (not available)'}: ${description}`).join('\n'),
  };
}

async function images(): Promise<Omit<Finding, 'name'>> {
  const { default: sharp } = await import('sharp');
  const formats = Object.entries(FORMATS) as [keyof typeof FORMATS, string][];
  const missing = formats.filter(([format]) => !sharp.format[format]?.input.buffer).map(([, name]) => name);
  const detail = `${sharp.versions.sharp ?? 'unknown version'}, libvips ${sharp.versions.vips}`;
  if (missing.length === 0) return { ok: true, detail: `${detail}: ${Object.values(FORMATS).join(', ')}` };
  return {
    ok: false,
    detail: `${detail}: cannot read ${missing.join(', ')}`,
    advice: 'Install the prebuilt sharp again: npm install --force sharp',
  };
}

/** The cache is created at the first download, so the nearest existing folder must be writable. */
async function hubCache(): Promise<Omit<Finding, 'name'>> {
  const { getHFHubCachePath } = await import('@huggingface/hub');
  const path = getHFHubCachePath();
  const offline = process.env['HF_HUB_OFFLINE'] ? ' (HF_HUB_OFFLINE is set: nothing is downloaded)' : '';
  const existing = await nearestExisting(path);
  const writable = await access(existing, constants.W_OK).then(
    () => true,
    () => false,
  );
  const detail = `${path}${existing === path ? '' : ' (made at the first download)'}${offline}`;
  return { ok: writable, detail, ...(writable ? {} : { advice: `${existing} cannot be written: set HF_HUB_CACHE to a folder that can.` }) };
}

async function nearestExisting(path: string): Promise<string> {
  return dirname(path) === path || (await pathExists(path)) ? path : nearestExisting(dirname(path));
}

/** Encodes a small image with a small random model. */
async function selfTest(): Promise<Omit<Finding, 'name'>> {
  const [{ UniFlow }, { default: sharp }] = await Promise.all([import('../uniflow.js'), import('sharp')]);
  const image = await sharp({ create: { width: 64, height: 48, channels: 3, background: '#4080c0' } })
    .png()
    .toBuffer();
  const started = performance.now();
  const uniflow = UniFlow.random('nano');
  try {
    const { latents } = await uniflow.encode(image);
    const data = latents.data as unknown as Float32Array;
    const ok = data.every(Number.isFinite) && data.some((value) => value !== 0);
    const detail = `a random model encoded an image to latents [${latents.shape.join(', ')}] in ${Math.round(performance.now() - started)} ms`;
    return ok
      ? { ok, detail }
      : { ok, detail: `${detail}, but they are not numbers`, advice: 'This is a bug: please report it with this output.' };
  } finally {
    await uniflow.dispose();
  }
}
