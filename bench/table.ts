/** The report as a text table. */
import type { Failure, Peaks, Result } from './harness.js';
import type { Machine } from './machine.js';

const threeDigits = (value: number): string => (value >= 100 ? value.toFixed(0) : value.toPrecision(3));
const giga = (rate: number): string => threeDigits(rate / 1e9);
const milliseconds = (ms: number): string => (ms >= 100 ? ms.toFixed(0) : ms >= 1 ? ms.toFixed(2) : ms.toFixed(4));

/** Width (negative: left-aligned) and title of each column. */
const columns = [
  [-11, 'family'],
  [-27, 'operation'],
  [-20, 'shape'],
  [-8, 'dtype'],
  [9, 'median ms'],
  [9, 'p99 ms'],
  [13, 'achieved'],
  [9, 'floor ms'],
  [8, 'of floor'],
  [0, ''],
] as const;

function line(cells: readonly string[]): string {
  const aligned = columns.map(([width], i) => (width < 0 ? (cells[i] ?? '').padEnd(-width) : (cells[i] ?? '').padStart(width)));
  return aligned.join('  ').trimEnd();
}

export const tableHead = line(columns.map(([, title]) => title));

export function tableRow(r: Result): string {
  const rate = r.bound === 'compute' ? `${giga(r.rate)} GFLOP/s` : `${giga(r.rate)} GB/s`;
  const figures = Object.entries(r.figures).map(([name, value]) => `${threeDigits(value)} ${name}`);
  return line([
    ...[r.family, r.name, r.shape, r.dtype, milliseconds(r.medianMs), milliseconds(r.p99Ms)],
    ...[rate, milliseconds(r.floorMs), `${(100 * r.ofFloor).toFixed(0)} %`, figures.join(', ')],
  ]);
}

export function failedRow({ family, name, shape, dtype, failed }: Failure): string {
  return `${line([family, name, shape, dtype])}  cannot run here: ${failed}`;
}

export function machineLines(m: Machine): string {
  return `${m.device === 'cpu' ? '' : `${m.device}: ${m.description}; `}${m.cpu}, ${m.threads} threads of ${m.cores} cores, ${m.memoryGiB} GiB; ${m.platform}, Node.js ${m.node}
Kernels ${m.kernels}
${m.date}, commit ${m.commit ?? 'unknown'}`;
}

export function peakLine(when: string, p: Peaks): string {
  return `Peaks ${when}: bfloat16 ${giga(p.bfloat16)} GFLOP/s, float32 ${giga(p.float32)} GFLOP/s, int8 ${giga(p.int8)} GOP/s, copy ${giga(p.copy)} GB/s`;
}
