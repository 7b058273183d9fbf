/** The log of a training run, and its report as rendered by Chromium. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { appendFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import type { Browser, Page } from 'puppeteer-core';
import { decodeImage } from '../lib/images/decode.js';
import { readLog, RunLog, type LogEntry, type LogEntryOf } from '../lib/train/log.js';
import { writeReport, type Report } from '../lib/train/report.js';
import { launchBrowser, watchedPage } from './browser.js';
import { photos } from './support.js';

const folder = mkdtempSync(join(tmpdir(), 'uniflow-report-'));
afterAll(() => rmSync(folder, { recursive: true }));

const start: LogEntry = {
  event: 'start',
  time: '2026-01-02T10:00:00.000Z',
  config: { name: '</script><script>window.pwned=1</script>', regime: '<img src=x onerror="window.pwned=1">', lr: 1e-4 },
  model: { parameters: 34_123_456, trained: 31_000_000 },
  data: { path: '/data/photos & more', images: 1000 },
  machine: { cpu: 'a CPU', threads: 2, kernels: 'avx2', node: process.version },
};
const layers = 5;
const step = (step: number, changes: Partial<LogEntryOf<'step'>> = {}): LogEntryOf<'step'> => ({
  event: 'step',
  step,
  epoch: 0,
  loss: 1 / step + 0.01,
  flow: 1 / step,
  distillation: 0.01,
  alpha: Array.from({ length: layers }, (_, layer) => (layer + 1) / (step + 10)),
  weight: Array.from({ length: layers }, (_, layer) => (layer + 1) / 15),
  gradNorm: 2 / step,
  lr: 1e-4,
  imagesPerSecond: 30 + (step % 5),
  skipped: false,
  ...changes,
});
const skipped = (at: number): LogEntry => step(at, { loss: NaN, flow: NaN, gradNorm: Infinity, skipped: true });
const validation = (step: number): LogEntry => ({
  ...{ event: 'validation', step, psnr: 20 + step / 10, ssim: 0.5 + step / 100 },
  ...{ effectiveRank: 3 + step / 100, channelsInUse: 0.25 },
});
const baseline: LogEntry = { event: 'baseline', psnr: 26.5, ssim: 0.95, channels: 16, fitted: { path: '/data/photos', images: 512 } };
const damaged: LogEntry = { event: 'damaged', of: 'data', index: 7, id: 'cats/<b>7.jpg', reason: 'the image is damaged or incomplete' };
const warning: LogEntry = { event: 'warning', step: 20, message: 'PSNR 22.00 dB is below the baseline' };
const end = (step: number): LogEntry => ({ event: 'end', time: '2026-01-02T11:30:00.000Z', step, reason: 'done' });
const steps = (count: number): LogEntry[] => Array.from({ length: count }, (_, i) => step(i + 1));

describe('RunLog', () => {
  async function written(name: string, entries: readonly LogEntry[]): Promise<string> {
    const path = join(folder, name);
    const log = await RunLog.open(path);
    for (const entry of entries) log.write(entry);
    await log.close();
    return path;
  }

  test('what is written is read again, numbers that are not finite too', async () => {
    const entries = [start, step(1), skipped(2), validation(2), end(2)];
    expect(await readLog(await written('whole', entries))).toEqual(entries);
  });

  test('an entry is in the file as soon as write returns', async () => {
    const path = join(folder, 'at-once');
    const log = await RunLog.open(path);
    log.write(start);
    expect(await readLog(path)).toEqual([start]);
    await log.close();
  });

  test('a last line that was cut short is left out, and gone after the run was resumed', async () => {
    const path = await written('torn', [start, step(1), step(2)]);
    writeFileSync(path, readFileSync(path).subarray(0, -7));
    expect(await readLog(path)).toEqual([start, step(1)]);
    const log = await RunLog.open(path, { keepThrough: 1 });
    log.write(step(2, { lr: 2 }));
    await log.close();
    expect(await readLog(path)).toEqual([start, step(1), step(2, { lr: 2 })]);
  });

  test.each(['{"event":"st', 'null', '{"event":"other"}', ''])('any other line that is no entry is an error: %j', async (line) => {
    const path = await written(`bad-${line.length}`, [start]);
    appendFileSync(path, `${line}\n${JSON.stringify(step(1))}\n`);
    await expect(readLog(path)).rejects.toMatchObject({ code: 'BAD_INPUT', subject: `${path}:2` });
  });

  test('keepThrough drops what came after that step', async () => {
    const resume: LogEntry = { event: 'resume', time: '2026-01-02T12:00:00.000Z', step: 2 };
    const checkpoint = (step: number): LogEntry => ({ event: 'checkpoint', step, path: `step-${step}` });
    const path = await written('resumed', [start, step(1), step(2), checkpoint(2), step(3), validation(3), end(3)]);
    const log = await RunLog.open(path, { keepThrough: 2 });
    log.write(resume);
    log.write(step(3));
    await log.close();
    expect(await readLog(path)).toEqual([start, step(1), step(2), checkpoint(2), resume, step(3)]);
  });

  test('the log of another run is not added to, and one that is missing is named', async () => {
    const path = await written('there', [start]);
    await expect(RunLog.open(path)).rejects.toMatchObject({ code: 'BAD_INPUT', subject: path });
    await expect(readLog(`${path}-not`)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    await expect(RunLog.open(path, { keepThrough: -1 })).rejects.toMatchObject({ code: 'BAD_INPUT', subject: 'keepThrough' });
  });
});

describe('writeReport', () => {
  let browser: Browser;
  beforeAll(async () => {
    browser = await launchBrowser();
  });
  afterAll(() => browser?.close());

  /** Opens the report in a browser, and collects its errors and requests. */
  async function opened(report: Partial<Report>, scheme = 'light'): Promise<{ page: Page; complaints: string[]; requests: string[] }> {
    const path = join(folder, 'report.html');
    await writeReport(path, { title: 'A run', log: [], rows: [], ...report });
    const { page, complaints, requests } = await watchedPage(browser, scheme);
    await page.goto(pathToFileURL(path).href);
    await page.evaluate('new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))'); // charts draw on animation frames
    return { page, complaints, requests: requests.filter((url) => url !== pathToFileURL(path).href && !url.startsWith('data:')) };
  }

  const chartIds = (page: Page): Promise<string[]> => page.$$eval('.charts figure', (figures) => figures.map((figure: any) => figure.id));

  /** The number of coloured pixels of each chart: lines and marks are coloured, axes and grid are grey. */
  const colouredPixels = (page: Page): Promise<number[]> =>
    page.$$eval('.charts canvas', (canvases) =>
      canvases.map((canvas: any) => {
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let coloured = 0;
        for (let i = 0; i < data.length; i += 4) {
          const rgb = [data[i], data[i + 1], data[i + 2]];
          if (data[i + 3] > 0 && Math.max(...rgb) - Math.min(...rgb) > 60) coloured++;
        }
        return coloured;
      }),
    );

  const legend = (page: Page, chart: string): Promise<string[]> =>
    page.$$eval(`#${chart} .u-series:not(.raw) .u-label`, (labels) => labels.slice(1).map((label: any) => label.textContent));

  const log = [
    start,
    baseline,
    damaged,
    ...steps(20),
    validation(20),
    warning,
    skipped(21),
    ...steps(40).slice(21),
    validation(40),
    end(40),
  ];

  test.each(['light', 'dark'])('every chart is drawn (%s), without an error and without a request', async (scheme) => {
    const { page, complaints, requests } = await opened({ log }, scheme);
    expect(await chartIds(page)).toEqual([
      'loss',
      'gradient',
      'psnr',
      'ssim',
      'effectiveRank',
      'channelsInUse',
      'alpha',
      'weight',
      'lr',
      'speed',
    ]);
    const pixels = await colouredPixels(page);
    expect(pixels).toHaveLength(10);
    for (const coloured of pixels) expect(coloured).toBeGreaterThan(200);
    expect(complaints).toEqual([]);
    expect(requests).toEqual([]);
  });

  test('α and w have a line for each layer, the losses one for each term', async () => {
    const { page } = await opened({ log });
    const numbers = Array.from({ length: layers }, (_, layer) => String(layer + 1));
    expect(await legend(page, 'alpha')).toEqual(numbers);
    expect(await legend(page, 'weight')).toEqual(numbers);
    expect(await legend(page, 'loss')).toEqual(['total', 'flow', 'distillation']);
    const colours = await page.$$eval('#alpha .u-marker', (markers) => markers.slice(1).map((marker: any) => marker.style.background));
    expect(new Set(colours).size).toBe(layers);
  });

  test('says what the run was, and runs nothing of what its config says', async () => {
    const { page, complaints } = await opened({ title: '</title><script>window.pwned=1</script>', log });
    const text: string = await page.$eval('body', (body: any) => body.textContent);
    for (const part of ['34.12M parameters, 31M trained', '/data/photos & more, 1,000 images', '40, in epoch 0, 1 skipped', '1 h 30 min'])
      expect(text).toContain(part);
    expect(text).toContain('PSNR 24.00 dB, SSIM 0.9000, effective rank 3.4, 25 % of the channels in use at step 40');
    expect(text).toContain('PCA of 16 coefficients a patch, fitted to 512 images of /data/photos: PSNR 26.50 dB, SSIM 0.9500');
    expect(text).toContain('PSNR 22.00 dB is below the baseline');
    expect(text).toContain('1 image skipped: cats/<b>7.jpg');
    expect(text).toContain('</script><script>window.pwned=1</script>');
    expect(await page.evaluate('window.pwned')).toBeUndefined();
    expect(complaints).toEqual([]);
  });

  test('the PSNR and SSIM charts have the baseline as a line across, where the log has one', async () => {
    const data = async (entries: LogEntry[]): Promise<{ id: string; series: { label: string; values: number[] }[] }[]> =>
      (await opened({ log: entries })).page.$eval('#data', (data: any) => JSON.parse(data.textContent));
    const [psnr, ssim] = (await data(log)).filter(({ id }) => ['psnr', 'ssim'].includes(id));
    expect(psnr!.series).toMatchObject([{ values: [22, 24] }, { label: 'PCA', values: [26.5, 26.5] }]);
    expect(ssim!.series).toMatchObject([{ values: [0.7, 0.9] }, { label: 'PCA', values: [0.95, 0.95] }]);
    const without = await data(log.filter((entry) => entry !== baseline));
    expect(without.find(({ id }) => id === 'psnr')!.series).toHaveLength(1);
  });

  test('the images of each row are in the file, with their PSNR', async () => {
    const original = await decodeImage(join(photos, 'fig.jpg'));
    const reconstructions = [1, 2, 4, 10].map((steps) => ({ steps, image: original, psnr: 20 + steps }));
    const { page, complaints } = await opened({
      log,
      rows: [
        { original, reconstructions },
        { original, reconstructions },
      ],
    });
    const images = await page.$$eval('img', (images) => images.map((image: any) => [image.naturalWidth, image.clientWidth]));
    expect(images).toHaveLength(10);
    for (const [natural, shown] of images) {
      expect(natural).toBeGreaterThan(0);
      expect(shown).toBeLessThanOrEqual(224);
    }
    const captions = await page.$$eval('.images > div:first-child figcaption', (all) => all.map((caption: any) => caption.textContent));
    expect(captions).toEqual(['Original', '1 step · 21.00 dB', '2 steps · 22.00 dB', '4 steps · 24.00 dB', '10 steps · 30.00 dB']);
    expect(complaints).toEqual([]);
  });

  test('a run without distillation and validation has no charts of them', async () => {
    const plain = steps(10).map((entry) => ({ ...entry, distillation: 0, alpha: [], weight: [] }) as LogEntry);
    const { page } = await opened({ log: [start, ...plain] });
    expect(await chartIds(page)).toEqual(['loss', 'gradient', 'lr', 'speed']);
    expect(await legend(page, 'loss')).toEqual(['total', 'flow']);
  });

  test('an empty log gives a page that says so', async () => {
    const { page, complaints } = await opened({ log: [] });
    expect(await page.$eval('body', (body: any) => body.textContent)).toContain('The log of this run is empty.');
    expect(await page.$('canvas')).toBeNull();
    expect(complaints).toEqual([]);
  });

  test('of a long log each chart has about 2000 points, and the one spike among them', async () => {
    const spike = step(54_321, { gradNorm: 1234 });
    const { page } = await opened({
      log: steps(100_000).map((entry) => ((entry as LogEntryOf<'step'>).step === spike.step ? spike : entry)),
    });
    const charts: { id: string; steps: number[]; series: { values: number[] }[] }[] = await page.$eval('#data', (data: any) =>
      JSON.parse(data.textContent),
    );
    for (const { steps } of charts) expect(steps.length).toBeLessThanOrEqual(2001);
    const gradient = charts.find(({ id }) => id === 'gradient')!;
    expect(gradient.series[0]!.values[gradient.steps.indexOf(spike.step)]).toBe(1234);
    expect(gradient.steps.at(-1)).toBe(100_000);
  });

  test('fits a phone, and the charts follow the width', async () => {
    const { page } = await opened({ log });
    const widths = [];
    for (const width of [390, 1280]) {
      await page.setViewport({ width, height: 800 });
      await page.waitForFunction('document.querySelector("#loss canvas").clientWidth === document.querySelector("#loss").clientWidth');
      widths.push(await page.evaluate('document.documentElement.scrollWidth'));
    }
    expect(widths).toEqual([390, 1280]);
  });
});
