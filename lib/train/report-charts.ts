/** The charts of a run's report: the numbers of its log over the steps, thinned out to fit on a page. */
import { shareOfCodes } from '../eval/code-use.js';
import type { LogEntry, LogEntryOf } from './log.js';

/** One line of a chart. */
export interface Series {
  label: string;
  /** Name of a colour in the page's style sheet, or relative depth of the layer, from 0 to 1. */
  colour: string | number;
  /** Drawn faintly and omitted from the legend; the next series is its average. */
  raw?: boolean;
  /** `null`: no value at that step. */
  values: (number | null)[];
}

export interface Chart {
  id: string;
  title: string;
  note?: string;
  /** Logarithmic axis: only values above 0 are drawn. */
  log?: boolean;
  /** Steps to mark. */
  marks?: number[];
  /** Ascending. */
  steps: number[];
  series: Series[];
}

type Column<T> = Omit<Series, 'values'> & { of: (entry: T) => number | undefined };
type ChartOptions = Pick<Chart, 'log' | 'note' | 'marks'>;
type Step = LogEntryOf<'step'>;

const MAX_POINTS = 2000;
const TERMS: readonly Column<Step>[] = [
  { label: 'total', colour: 'ink', of: (s) => s.loss },
  { label: 'flow', colour: 'blue', of: (s) => s.flow },
  { label: 'distillation', colour: 'orange', of: (s) => s.distillation },
];

/** The charts for which the log has entries. */
export function chartsOf(log: readonly LogEntry[]): Chart[] {
  const steps = log.filter((entry) => entry.event === 'step');
  const validations = log.filter((entry) => entry.event === 'validation');
  const layers = steps.reduce((most, s) => Math.max(most, s.alpha.length), 0);
  const terms = layers > 0 ? TERMS : TERMS.slice(0, 2);
  return [
    noisyChart('loss', 'Loss', steps, terms, { log: true }),
    chart('gradient', 'Gradient norm', steps, [{ label: 'norm', colour: 'blue', of: (s) => s.gradNorm }], {
      log: true,
      ...skippedMarks(steps),
    }),
    qualityChart('psnr', 'Validation PSNR', 'dB', log),
    qualityChart('ssim', 'Validation SSIM', 'SSIM', log),
    measuredChart('effectiveRank', 'Effective rank of the latents', 'rank', validations, (v) => v.effectiveRank),
    measuredChart('channelsInUse', 'Share of the channels in use', 'share', validations, (v) => v.channelsInUse),
    measuredChart('codesUsed', 'Share of the codes used', 'share', validations, (v) => v.codes && shareOfCodes(v.codes)),
    layerChart('alpha', 'Misalignment α of each layer', steps, layers, (s) => s.alpha),
    layerChart('weight', 'Distillation weight w of each layer', steps, layers, (s) => s.weight),
    chart('lr', 'Learning rate', steps, [{ label: 'rate', colour: 'blue', of: (s) => s.lr }]),
    noisyChart('speed', 'Images per second', steps, [{ label: 'images/s', colour: 'blue', of: (s) => s.imagesPerSecond }]),
  ].filter(({ steps, series }) => steps.length > 0 && series.length > 0);
}

/** A measure of the validations, with the baseline's value as a horizontal line. */
function qualityChart(id: 'psnr' | 'ssim', title: string, label: string, log: readonly LogEntry[]): Chart {
  const validations = log.filter((entry) => entry.event === 'validation');
  const baseline = log.find((entry) => entry.event === 'baseline');
  const own: Column<LogEntryOf<'validation'>> = { label, colour: 'blue', of: (v) => v[id] };
  if (!baseline) return chart(id, title, validations, [own]);
  const note = `PCA: ${baseline.channels} coefficients a patch, as many as the latents have channels.`;
  return chart(id, title, validations, [own, { label: 'PCA', colour: 'orange', of: () => baseline[id] }], { note });
}

/** A measure that some runs' validations lack. */
function measuredChart(
  id: string,
  title: string,
  label: string,
  validations: readonly LogEntryOf<'validation'>[],
  of: (validation: LogEntryOf<'validation'>) => number | undefined,
): Chart {
  const measured = validations.filter((v) => of(v) !== undefined);
  return chart(id, title, measured, [{ label, colour: 'blue', of }]);
}

/** All values, and their moving average. */
function noisyChart(
  id: string,
  title: string,
  steps: readonly Step[],
  columns: readonly Column<Step>[],
  options: ChartOptions = {},
): Chart {
  const averages = columns.map(({ of }) => movingAverage(steps.map(of)));
  const points = steps.map((step, i) => ({
    step: step.step,
    values: columns.map(({ of }) => of(step)),
    averages: averages.map((a) => a[i]),
  }));
  const both = columns.flatMap(({ label, colour }, i): Column<(typeof points)[number]>[] => [
    { label, colour, raw: true, of: (p) => p.values[i] },
    { label, colour, of: (p) => p.averages[i] },
  ]);
  return chart(id, title, points, both, options);
}

function skippedMarks(steps: readonly Step[]): ChartOptions {
  const skipped = steps.filter((s) => s.skipped);
  if (skipped.length === 0) return { note: 'Before clipping.' };
  return {
    note: `Before clipping. Red: ${skipped.length} skipped ${skipped.length === 1 ? 'step' : 'steps'}.`,
    marks: thin(skipped, (s) => s.step).map((s) => s.step),
  };
}

function layerChart(id: string, title: string, steps: readonly Step[], layers: number, of: (s: Step) => number[]): Chart {
  const columns = Array.from({ length: layers }, (_, layer) => ({
    label: String(layer + 1),
    colour: layers > 1 ? layer / (layers - 1) : 1,
    of: (s: Step) => of(s)[layer],
  }));
  return chart(id, title, steps, columns, { note: 'One line a layer, numbered from the image on.' });
}

function chart<T extends { step: number }>(
  id: string,
  title: string,
  entries: readonly T[],
  columns: readonly Column<T>[],
  options: ChartOptions = {},
): Chart {
  const drawn = columns[0] ? thin(entries, columns[0].of) : [];
  const series = columns.map(({ of, ...rest }) => ({ ...rest, values: drawn.map((entry) => drawable(of(entry), options.log)) }));
  return { id, title, ...options, steps: drawn.map((entry) => entry.step), series };
}

/** Rounds to five digits: more than a screen shows, and saves a third of the page's bytes. */
function drawable(value: number | undefined, log = false): number | null {
  return value !== undefined && Number.isFinite(value) && !(log && value <= 0) ? Number(value.toPrecision(5)) : null;
}

/** Thins out to about 2000 entries: from every interval the ones where `of` is lowest and highest, so no spike is lost, and the last entry. */
function thin<T extends { step: number }>(entries: readonly T[], of: (entry: T) => number | undefined): T[] {
  if (entries.length <= MAX_POINTS) return [...entries];
  const stretch = Math.ceil(entries.length / (MAX_POINTS / 2));
  const kept = new Set<T>();
  for (let start = 0; start < entries.length; start += stretch) {
    const all = entries.slice(start, start + stretch);
    const finite = all.filter((entry) => Number.isFinite(of(entry)));
    const extreme = (sign: 1 | -1): T => finite.reduce((a, b) => (sign * (of(b)! - of(a)!) > 0 ? b : a), finite[0] ?? all[0]!);
    for (const entry of [extreme(-1), extreme(1)].sort((a, b) => a.step - b.step)) kept.add(entry);
  }
  return [...kept.add(entries.at(-1)!)];
}

/** Exponential moving average over a fiftieth of the values; non-finite values are skipped. */
export function movingAverage(values: readonly (number | undefined)[]): number[] {
  const span = 1 + values.length / 50;
  let count = 0;
  let average = NaN;
  return values.map((value) => {
    if (value === undefined || !Number.isFinite(value)) return average;
    count++;
    average = count === 1 ? value : average + (value - average) / Math.min(count, span);
    return average;
  });
}
