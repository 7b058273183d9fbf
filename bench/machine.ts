/** Describes the machine of a run, without which the figures mean nothing. */
import { execFileSync } from 'node:child_process';
import { availableParallelism, cpus, totalmem } from 'node:os';
import { cpuInfo, devices } from '../lib/device.js';

export interface Machine {
  /** Device of the rows, and its description. */
  device: string;
  description: string;
  cpu: string;
  cores: number;
  memoryGiB: number;
  /** Threads that the kernels use. */
  threads: number;
  kernels: string;
  node: string;
  platform: string;
  date: string;
  /** Commit of the checkout, with + if files have been modified; undefined outside of git. */
  commit: string | undefined;
}

export function machine(device = 'cpu'): Machine {
  const { kernels, threads } = cpuInfo();
  return {
    device,
    description: devices().find(({ name }) => name === device)?.description ?? 'unknown',
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: availableParallelism(),
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    ...{ threads, kernels },
    node: process.version,
    platform: `${process.platform} ${process.arch}`,
    date: new Date().toISOString(),
    commit: commit(),
  };
}

function commit(): string | undefined {
  const git = (...args: string[]): string =>
    execFileSync('git', args, { cwd: import.meta.dirname, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
  try {
    return git('rev-parse', 'HEAD') + (git('status', '--porcelain') === '' ? '' : '+');
  } catch {
    return undefined;
  }
}
