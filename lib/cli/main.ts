#!/usr/bin/env node
/** The command line: exit codes, errors and signals. The commands are in commands.ts. */
import { Command, CommanderError } from 'commander';
import { constants } from 'node:os';
import { inspect } from 'node:util';
import { UniFlowError } from '../errors.js';
import { packageVersion } from '../package.js';
import { addCommands } from './commands.js';
import { printJson } from './output.js';

const FAILED = 1;
const BAD_USAGE = 2;

/** Subjects of errors that are option values: a `BAD_INPUT` about one is a usage error. */
const OPTIONS = new Set([
  'model',
  'out',
  'size',
  'batchSize',
  'device',
  'dtype',
  'float8',
  'steps',
  'schedule',
  'guidance',
  'seed',
  'grid',
  'preset',
  'revision',
  'threads',
  'config',
  'regime',
  'resume',
  'batch',
  'queue',
  'shardSize',
  'threshold',
  'cors',
]);

/** The first signal stops the work cleanly; a second one kills the process. */
function interruption(): { signal: AbortSignal; exitCode: () => number | undefined } {
  const controller = new AbortController();
  let exitCode: number | undefined;
  for (const name of ['SIGINT', 'SIGTERM'] as const) {
    process.once(name, () => {
      exitCode ??= 128 + constants.signals[name];
      controller.abort(name);
      process.once(name, () => process.exit(exitCode));
    });
  }
  return { signal: controller.signal, exitCode: () => exitCode };
}

function buildProgram(signal: AbortSignal): Command {
  const program = new Command('uniflow')
    .description('The UniFlow visual tokenizer: images to latents, and back.')
    .version(packageVersion)
    .option('--verbose', 'print where an error comes from (as UNIFLOW_DEBUG=1 does)')
    .configureHelp({ showGlobalOptions: true })
    .configureOutput({ outputError: (text, write) => write(`uniflow: ${oneLine(text.replace(/^error: /, ''))}\n`) })
    .exitOverride()
    .addHelpText(
      'after',
      `
Examples:
  $ uniflow reconstruct photos/ --out compared/
  $ uniflow encode photos/ --out latents.safetensors
  $ uniflow decode latents.safetensors --out images/
  $ uniflow train --encoder facebook/dinov2-base --data photos/ --steps 20000 --out run

Exit codes: 0 done, 1 failed (also where only some images did), 2 bad usage, 130 interrupted.
`,
    );
  addCommands(program, signal);
  return program;
}

function oneLine(text: string): string {
  return text.trim().replace(/\s*\n\s*/g, ' ');
}

/** Prints the error, with --json on standard output as well. @returns the exit code. */
function report(error: unknown, verbose: boolean): number {
  if (error instanceof CommanderError && error.exitCode === 0) return 0;
  if (process.argv.includes('--json')) printJson({ error: problemOf(error) });
  if (error instanceof CommanderError) return BAD_USAGE; // commander has printed it
  process.stderr.write(`uniflow: ${verbose ? inspect(error) : error instanceof Error ? error.message : String(error)}\n`);
  const usage = error instanceof UniFlowError && error.code === 'BAD_INPUT' && OPTIONS.has(error.subject ?? '');
  return usage ? BAD_USAGE : FAILED;
}

function problemOf(error: unknown): object {
  if (error instanceof CommanderError) return { code: 'BAD_INPUT', message: oneLine(error.message.replace(/^error: /, '')) };
  const { code, subject, expected, actual } = error as UniFlowError;
  return {
    code: error instanceof UniFlowError ? code : 'INTERNAL',
    message: error instanceof Error ? error.message : String(error),
    subject,
    expected,
    actual,
  };
}

async function main(): Promise<void> {
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(0); // the reader, for example `head`, has closed the pipe
    throw error;
  });
  const { signal, exitCode } = interruption();
  const program = buildProgram(signal);
  try {
    await program.parseAsync();
  } catch (error) {
    if (signal.aborted && process.argv.includes('--json')) printJson({ error: { code: 'ABORTED', message: 'interrupted' } });
    if (!signal.aborted) process.exitCode = report(error, program.opts()['verbose'] === true || Boolean(process.env['UNIFLOW_DEBUG']));
  }
  if (!signal.aborted) return;
  process.stderr.write('uniflow: interrupted\n');
  process.exitCode = exitCode();
}

await main();
