/** The log of a training run: one JSON object per line, appended at once. */
import { appendFileSync, fstatSync, ftruncateSync } from 'node:fs';
import { open, writeFile, type FileHandle } from 'node:fs/promises';
import { checkInteger, checkOptions, describe } from '../check.js';
import { UniFlowError } from '../errors.js';
import type { LatentUse } from '../eval/latent-use.js';
import { replaceFile, unwritable } from '../io/files.js';
import type { Kept } from '../start/index.js';
import type { StepResult } from './trainer.js';

/** An event of a run. `loss`, `flow`, `distillation`, `gradNorm` and similar values may be NaN or infinite. */
export type LogEntry =
  | {
      event: 'start';
      time: string;
      config: Record<string, unknown>;
      model: { parameters: number; trained: number };
      data: { path: string; images: number; hash?: string };
      /** Capacity of the linear start, if there was one. */
      start?: Kept;
      machine: { cpu: string; threads: number; kernels: string; node: string };
    }
  /** Quality of a PCA on the validation images, see lib/eval/baseline.ts. */
  | { event: 'baseline'; psnr: number; ssim: number; channels: number; fitted: { path: string; images: number } }
  /** An image of the training or validation data that cannot be read and is skipped. */
  | { event: 'damaged'; of: 'data' | 'validation'; index: number; id: string; reason: string }
  | { event: 'resume'; time: string; step: number }
  | (StepResult & { event: 'step'; step: number; epoch: number; lr: number; imagesPerSecond: number })
  | ({ event: 'validation'; step: number; psnr: number; ssim: number } & Partial<LatentUse>)
  | { event: 'warning'; step: number; message: string }
  | { event: 'checkpoint'; step: number; path: string }
  | { event: 'end'; time: string; step: number; reason: 'done' | 'interrupted' | 'early-stop' | 'failed'; message?: string };

/** The entries of one event. */
export type LogEntryOf<Event extends LogEntry['event']> = Extract<LogEntry, { event: Event }>;

const EVENTS: readonly string[] = [
  ...(['start', 'baseline', 'damaged', 'resume', 'step', 'validation', 'warning', 'checkpoint', 'end'] satisfies LogEntry['event'][]),
];

export interface RunLogOptions {
  /**
   * For a run resumed from its checkpoint at this step: drops entries of later steps, so no step appears twice. Default: a new log; an existing file is
   * refused.
   */
  keepThrough?: number;
}

/** Appends to a run's log. */
export class RunLog {
  private constructor(
    private readonly path: string,
    private readonly file: FileHandle,
  ) {}

  /** @throws {UniFlowError} `BAD_INPUT` if the file cannot be written, exists already (without `keepThrough`), or is not a log. */
  static async open(path: string, options: RunLogOptions = {}): Promise<RunLog> {
    checkOptions(options);
    const { keepThrough } = options;
    if (keepThrough !== undefined) {
      checkInteger('keepThrough', keepThrough, 0, Number.MAX_SAFE_INTEGER);
      await dropBeyond(path, keepThrough);
    }
    const file = await open(path, keepThrough === undefined ? 'ax' : 'a').catch((error: NodeJS.ErrnoException) => {
      const reason = error.code === 'EEXIST' ? 'is there already: resume that run, or choose another folder' : error.message;
      throw new UniFlowError('BAD_INPUT', `${path}: ${reason}`, { subject: path, cause: error });
    });
    return new RunLog(path, file);
  }

  /**
   * The system has the line when this returns, so a killed process loses none.
   * @throws {UniFlowError} `BAD_INPUT` if it cannot be written (a full disk); then no part of it is.
   */
  write(entry: LogEntry): void {
    const { fd } = this.file;
    const { size } = fstatSync(fd);
    try {
      appendFileSync(fd, lineOf(entry));
    } catch (cause) {
      ftruncateSync(fd, size); // a truncated line is not an entry, and later ones would follow it
      throw unwritable(this.path, cause);
    }
  }

  /** Makes the log durable. */
  async close(): Promise<void> {
    await this.file.sync();
    await this.file.close();
  }
}

async function dropBeyond(path: string, step: number): Promise<void> {
  const entries = await readLog(path).catch((error: unknown) => {
    if (error instanceof UniFlowError && error.code === 'NOT_FOUND') return [];
    throw error;
  });
  await replaceFile(path, (file) => writeFile(file, entriesThrough(entries, step).map(lineOf).values()));
}

/** The entries up to a step. */
export function entriesThrough(entries: readonly LogEntry[], step: number): LogEntry[] {
  return entries.filter((entry) => !('step' in entry) || entry.step <= step);
}

/**
 * Reads the entries of a log. A last line truncated by a kill or a full disk is ignored.
 *
 * @throws {UniFlowError} `NOT_FOUND`, or `BAD_INPUT` naming the line that is not an entry.
 */
export async function readLog(path: string): Promise<LogEntry[]> {
  const file = await open(path).catch((error: NodeJS.ErrnoException) => {
    throw error.code === 'ENOENT'
      ? UniFlowError.expected('NOT_FOUND', path, 'the log of a run', 'no such file', error)
      : new UniFlowError('BAD_INPUT', `${path}: cannot be read: ${error.message}`, { subject: path, cause: error });
  });
  const entries: LogEntry[] = [];
  let torn: UniFlowError | undefined;
  let number = 0;
  for await (const line of file.readLines()) {
    if (torn) throw torn; // it was not the last line
    number++;
    const entry = parseLine(line);
    if (entry) entries.push(entry);
    else torn = UniFlowError.expected('BAD_INPUT', `${path}:${number}`, 'an entry of a training log', describe(line));
  }
  return entries;
}

// JSON has no NaN and no Infinity, so a log contains their names as strings.
const NON_FINITE = new Map<unknown, number>([NaN, Infinity, -Infinity].map((value) => [String(value), value]));

function lineOf(entry: LogEntry): string {
  const json = JSON.stringify(entry, (_, value: unknown) => (typeof value === 'number' && !Number.isFinite(value) ? String(value) : value));
  return `${json}\n`;
}

function parseLine(line: string): LogEntry | undefined {
  try {
    const value: unknown = JSON.parse(line, (_, part: unknown) => NON_FINITE.get(part) ?? part);
    const known = typeof value === 'object' && value !== null && 'event' in value && EVENTS.includes(value.event as string);
    return known ? (value as LogEntry) : undefined;
  } catch {
    return undefined;
  }
}
