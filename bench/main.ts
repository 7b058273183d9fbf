/** `npm run bench`: times every kernel family and the whole tokenizer, compared with the machine's peak. See bench/README.md. */
import { Command, InvalidArgumentError } from 'commander';
import { writeFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { checkDevice, measurePeak, type DeviceOptions } from '../lib/device.js';
import { useDevice } from '../lib/tensor.js';
import { rows as attention } from './attention.js';
import { rows as batch } from './batch.js';
import { rows as data } from './data.js';
import { rows as elementwise } from './elementwise.js';
import { rows as flow } from './flow.js';
import { QUICK, THOROUGH, tryRow, type Effort, type Failure, type Peaks, type Result, type Row } from './harness.js';
import { rows as linear } from './linear.js';
import { machine } from './machine.js';
import { rows as norm } from './norm.js';
import { rows as patch } from './patch.js';
import { comparePeers } from './peers/compare.js';
import { rows as quality } from './quality.js';
import { rows as random } from './random.js';
import { rows as resample } from './resample.js';
import { failedRow, machineLines, peakLine, tableHead, tableRow } from './table.js';
import { rows as tokenizer } from './tokenizer.js';
import { rows as training } from './training.js';

const families = [linear, attention, norm, patch, flow, elementwise, random, resample, quality, data, batch, tokenizer, training];

/** A larger difference between the peaks at the beginning and the end indicates that other programs were running. */
const MAX_DRIFT = 0.1;

/** Milliseconds for JavaScript threads to collect the gigabytes left by the reference libraries. */
const COLLECTING = 10_000;

interface Options {
  json?: string | true;
  filter?: RegExp;
  quick?: true;
  peers?: true;
  device: DeviceOptions['device'];
}

function toRegExp(text: string): RegExp {
  try {
    return new RegExp(text, 'i');
  } catch (error) {
    throw new InvalidArgumentError((error as Error).message);
  }
}

const options = new Command('npm run bench --')
  .description('Times every kernel family and the whole tokenizer against what this machine can do.')
  .option('--json [file]', 'write everything as JSON to a file, or to stdout (the table then goes to stderr)')
  .option('--filter <regex>', "only rows whose 'family operation shape dtype' matches", toRegExp)
  .option('--quick', 'a few samples only')
  .option('--device <name>', 'auto, cpu, cuda or cuda:N', 'auto')
  .option('--peers', 'ONNX Runtime and transformers.js side by side (installs them into bench/peers)')
  .parse()
  .opts<Options>();
const say = options.json === true ? console.error : console.log;

const wanted = (row: Pick<Row, 'family' | 'name' | 'shape' | 'dtype'>): boolean =>
  options.filter?.test(`${row.family} ${row.name} ${row.shape} ${row.dtype}`) ?? true;

async function measureRows(effort: Effort, peaks: Peaks): Promise<(Result | Failure)[]> {
  const rows = families.flat().filter(wanted);
  const results: (Result | Failure)[] = [];
  if (rows.length > 0) say(`\n${tableHead}`);
  for (const row of rows) {
    const result = await tryRow(row, effort, peaks);
    say('failed' in result ? failedRow(result) : tableRow(result));
    results.push(result);
  }
  return results;
}

/** The largest relative change of a peak. */
function driftOf(before: Peaks, after: Peaks): number {
  return Math.max(...(['bfloat16', 'float32', 'copy'] as const).map((name) => Math.abs(after[name] / before[name] - 1)));
}

const { device } = checkDevice({ device: options.device });
useDevice(device);
const where = machine(device);
const before = await measurePeak(device);
const effort = options.quick ? QUICK : THOROUGH;
say(`${machineLines(where)}\n${peakLine('before', before)}`);
const results = await measureRows(effort, before);
const peers = options.peers ? await comparePeers(effort, wanted, say) : [];
if (peers.length > 0) await sleep(COLLECTING);
const after = await measurePeak(device);
const drift = driftOf(before, after);
say(`\n${peakLine('after', after)}; drift ${(100 * drift).toFixed(1)} %`);
if (drift > MAX_DRIFT)
  say('WARNING: the peaks moved by more than 10 %: something else ran on this machine, and the figures are not to be trusted.');
if (results.some((result) => 'failed' in result)) process.exitCode = 1;

const report = { machine: where, peaks: { before, after, drift }, effort, rows: results, peers };
const json = JSON.stringify(report, undefined, 2);
if (options.json === true) console.log(json);
else if (options.json !== undefined) await writeFile(options.json, `${json}\n`);
