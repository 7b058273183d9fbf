/** The report of a training run: one self-contained HTML file. */
import type { NdArray } from 'ndarray';
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import sharp from 'sharp';
import { replaceFile } from '../io/files.js';
import type { RgbImage } from '../images/decode.js';
import { toImages } from '../images/write.js';
import type { UniFlow } from '../uniflow.js';
import type { LogEntry } from './log.js';
import { baselineText, validationText } from './log-text.js';
import { chartsOf, movingAverage } from './report-charts.js';
import { reportPage, type Fact, type Image } from './report-page.js';

/** An image, and the model's reconstructions with different numbers of Euler steps. */
export interface ReportRow {
  original: RgbImage;
  /** `psnr` in dB. */
  reconstructions: { steps: number; image: RgbImage; psnr: number }[];
}

export interface Report {
  title: string;
  log: readonly LogEntry[];
  rows: readonly ReportRow[];
}

/** Number of images in the report. */
const SHOWN = 6;
const SHOWN_STEPS = [1, 2, 4, 10] as const;

/** The first images of uint8 [n,H,W,3] with their reconstructions in an increasing number of Euler steps. */
export async function reportRows(uniflow: UniFlow, images: NdArray<Uint8Array>): Promise<ReportRow[]> {
  const pixels = images.hi(Math.min(SHOWN, images.shape[0] as number));
  const rows: ReportRow[] = toImages(pixels).map((original) => ({ original, reconstructions: [] }));
  for (const steps of SHOWN_STEPS) {
    const { images: made, perImage } = await uniflow.reconstruct({ pixels }, { steps });
    toImages(made).forEach((image: RgbImage, i) => {
      (rows[i] as ReportRow).reconstructions.push({ steps, image, psnr: perImage.psnr[i] as number });
    });
  }
  return rows;
}

/** Largest size in pixels: twice the displayed size, for dense screens. */
const IMAGE_SIZE = 448;

/** Writes the report of a run as a single HTML file that loads nothing else. It appears complete or not at all. */
export async function writeReport(path: string, { title, log, rows }: Report): Promise<void> {
  const { resolve } = createRequire(import.meta.url);
  const [script, style] = await Promise.all([
    readFile(resolve('uplot/dist/uPlot.iife.min.js'), 'utf8'),
    readFile(resolve('uplot/dist/uPlot.min.css'), 'utf8'),
  ]);
  const images = await Promise.all(rows.map(cellsOf));
  const page = reportPage({ title, facts: factsOf(log), config: configOf(log), charts: chartsOf(log), images, plot: { script, style } });
  await replaceFile(path, (file) => file.writeFile(page));
}

async function cellsOf({ original, reconstructions }: ReportRow): Promise<Image[]> {
  const cells = [
    { image: original, caption: 'Original' },
    ...reconstructions.map(({ steps, image, psnr }) => ({ image, caption: `${count(steps, 'step')} · ${psnr.toFixed(2)} dB` })),
  ];
  return Promise.all(cells.map(async ({ image, caption }) => ({ caption, url: await dataUrl(image) })));
}

async function dataUrl({ data, width, height }: RgbImage): Promise<string> {
  const webp = await sharp(data, { raw: { width, height, channels: 3 } })
    .resize({ width: IMAGE_SIZE, height: IMAGE_SIZE, fit: 'inside', withoutEnlargement: true })
    .webp({ quality: 92 })
    .toBuffer();
  return `data:image/webp;base64,${webp.toString('base64')}`;
}

function configOf(log: readonly LogEntry[]): Fact[] {
  const config = log.find((entry) => entry.event === 'start')?.config ?? {};
  return Object.entries(config).map(([name, value]) => [name, typeof value === 'string' ? value : (JSON.stringify(value) ?? 'undefined')]);
}

/** The run's settings, and how it ended. */
function factsOf(log: readonly LogEntry[]): Fact[] {
  const start = log.find((entry) => entry.event === 'start');
  const facts: (Fact | undefined)[] = [
    start && ['Model', `${compact(start.model.parameters)} parameters, ${compact(start.model.trained)} trained`],
    start && ['Data', `${start.data.path}, ${count(start.data.images, 'image')}${start.data.hash ? `, ${start.data.hash}` : ''}`],
    start && 'regime' in start.config ? ['Regime', String(start.config['regime'])] : undefined,
    stepsFact(log),
    start && ['Time', `${start.time.replace(/T(\d\d:\d\d).*Z$/, ' $1 UTC')}, ${durationOf(log)}`],
    start && [
      'Machine',
      `${start.machine.cpu}, ${count(start.machine.threads, 'thread')}, ${start.machine.kernels} kernels, Node ${start.machine.node}`,
    ],
    endFact(log),
    lossFact(log),
    baselineFact(log),
    validationFact(log),
    warningFact(log),
    damagedFact(log),
  ];
  return facts.filter((fact) => fact !== undefined);
}

function stepsFact(log: readonly LogEntry[]): Fact | undefined {
  const steps = log.filter((entry) => entry.event === 'step');
  const last = steps.at(-1);
  const skipped = steps.filter((s) => s.skipped).length;
  return last && ['Steps', `${last.step.toLocaleString('en')}, in epoch ${last.epoch}${skipped > 0 ? `, ${skipped} skipped` : ''}`];
}

function endFact(log: readonly LogEntry[]): Fact | undefined {
  if (log.length === 0) return undefined;
  const last = log.at(-1)!;
  if (last.event !== 'end') return ['End', 'none in the log: the run goes on, or was killed'];
  return ['End', `${last.reason}${last.message ? `: ${last.message}` : ''}`];
}

function lossFact(log: readonly LogEntry[]): Fact | undefined {
  const steps = log.filter((entry) => entry.event === 'step');
  const last = (term: 'loss' | 'flow' | 'distillation'): string => digits(movingAverage(steps.map((s) => s[term])).at(-1)!);
  return steps.length > 0
    ? ['Final loss', `${last('loss')} (flow ${last('flow')}, distillation ${last('distillation')}; moving averages)`]
    : undefined;
}

function validationFact(log: readonly LogEntry[]): Fact | undefined {
  const last = log.findLast((entry) => entry.event === 'validation');
  return last && ['Validation', `${validationText(last)} at step ${last.step}`];
}

function baselineFact(log: readonly LogEntry[]): Fact | undefined {
  const baseline = log.find((entry) => entry.event === 'baseline');
  return baseline && ['Baseline', baselineText(baseline)];
}

function warningFact(log: readonly LogEntry[]): Fact | undefined {
  const warning = log.find((entry) => entry.event === 'warning');
  return warning && ['Warning', warning.message];
}

/** Lists this many damaged images; the log names all of them. */
const NAMED = 20;

function damagedFact(log: readonly LogEntry[]): Fact | undefined {
  const damaged = log.filter((entry) => entry.event === 'damaged');
  const names = damaged.slice(0, NAMED).map(({ id }) => id);
  const more = damaged.length > NAMED ? ', ...' : '';
  return damaged.length > 0 ? ['Damaged', `${count(damaged.length, 'image')} skipped: ${names.join(', ')}${more}`] : undefined;
}

/** The time that the process was running. Pauses between sessions do not count, and nothing is known about the end of a killed session. */
function durationOf(log: readonly LogEntry[]): string {
  let [total, began, killed] = [0, NaN, false];
  for (const entry of log) {
    if (entry.event === 'end') {
      if (!Number.isNaN(began)) total += Date.parse(entry.time) - began;
      began = NaN;
    } else if (entry.event === 'start' || entry.event === 'resume') {
      killed ||= !Number.isNaN(began);
      began = Date.parse(entry.time);
    }
  }
  killed ||= !Number.isNaN(began);
  const minutes = Math.round(total / 60_000);
  const text = total < 60_000 ? `${Math.round(total / 1000)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return killed ? `at least ${text}` : text;
}

const digits = (value: number): string => String(Number(value.toPrecision(4)));
const compact = (value: number): string => value.toLocaleString('en', { notation: 'compact', maximumSignificantDigits: 4 });
const count = (n: number, noun: string): string => `${n.toLocaleString('en')} ${noun}${n === 1 ? '' : 's'}`;
