/** The page of the service: real servers, photographs and the bundled model, driven in Chromium. */
import { afterAll, afterEach, beforeAll, describe, expect, test } from '@jest/globals';
import { EigenvalueDecomposition, Matrix } from 'ml-matrix';
import ndarray, { type NdArray } from 'ndarray';
import { copyFile, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import type { Browser, Page } from 'puppeteer-core';
import { decodeImage, serve, UniFlow, type Encoded, type RgbImage, type ServeOptions, type Service } from '../lib/index.js';
import { ArrayFile } from '../lib/io/arrays.js';
import { launchBrowser, watchedPage } from './browser.js';
import { photos, relativeL2, tolerances } from './support.js';

const photo = join(photos, 'dandelion.jpg');

let uniflow: UniFlow;
let browser: Browser;
let service: Service; // with defaults
let encoded: Encoded; // of the photo
let dir: string;
const opened: { close(): Promise<unknown> }[] = [];

beforeAll(async () => {
  uniflow = await UniFlow.load();
  encoded = await uniflow.encode(photo, { tokens: true });
  service = await serve(uniflow, { port: 0 });
  browser = await launchBrowser();
  dir = await mkdtemp(join(tmpdir(), 'uniflow-page-'));
});
afterEach(async () => {
  for (const one of opened.splice(0)) await one.close();
});
afterAll(async () => {
  await browser?.close();
  await service?.close();
  await uniflow?.dispose();
  await rm(dir, { recursive: true });
});

async function started(options: ServeOptions): Promise<Service> {
  const one = await serve(uniflow, { port: 0, ...options });
  opened.push(one);
  return one;
}

async function visit({ to = service, scheme = 'light', width = 1280 } = {}): ReturnType<typeof watchedPage> {
  const watched = await watchedPage(browser, scheme);
  opened.unshift(watched.page); // closed before its service
  await watched.page.setViewport({ width, height: 800 });
  await watched.page.evaluateOnNewDocument(
    `document.addEventListener('securitypolicyviolation', ({ violatedDirective, blockedURI }) => console.warn(violatedDirective, blockedURI))`,
  );
  await watched.page.goto(to.url);
  return watched;
}

const textOf = (page: Page, selector: string): Promise<string> => page.$eval(selector, (element: any) => element.textContent);

async function choose(page: Page, path: string): Promise<void> {
  await (await page.$('input[type=file]'))!.uploadFile(path);
}

async function reconstructed(page: Page, path = photo): Promise<void> {
  await page.waitForFunction(`document.querySelector('[role=status]').textContent.startsWith('Reconstructed ${basename(path)}')`);
  await page.waitForFunction('[...document.images].every((image) => image.complete && image.naturalWidth > 0)');
}

async function visitWithPhoto(options: Parameters<typeof visit>[0] = {}): ReturnType<typeof watchedPage> {
  const watched = await visit(options);
  await choose(watched.page, photo);
  await reconstructed(watched.page);
  return watched;
}

/** Waits for an error that screen readers announce. */
async function expectAlert(page: Page, expected: string | RegExp): Promise<void> {
  const pattern = typeof expected === 'string' ? new RegExp(`^${expected.replaceAll('.', '\\.')}$`) : expected;
  const found = page.waitForFunction(`${String(pattern)}.test(document.querySelector('[role=alert]').textContent)`, { timeout: 20_000 });
  await found.catch(() => undefined);
  expect(await textOf(page, '[role=alert]')).toMatch(pattern);
}

const decodeUrl = (url: string): Promise<RgbImage> => decodeImage(Buffer.from(url.slice(url.indexOf(',') + 1), 'base64'));

/** The pixels of a canvas, [r, g, b] for each patch. */
async function coloursOf(page: Page, selector: string): Promise<number[][]> {
  const { data } = await decodeUrl(await page.$eval(selector, (canvas: any) => canvas.toDataURL()));
  return Array.from({ length: data.length / 3 }, (_, i) => Array.from(data.subarray(3 * i, 3 * i + 3)));
}

async function pixelsOf(page: Page, selector: string): Promise<Uint8Array> {
  return (await decodeUrl(await page.$eval(selector, (image: any) => image.src))).data;
}

function setValue(slider: any, value: number): void {
  slider.value = value;
  slider.dispatchEvent(new Event('input'));
}

/** Mean absolute difference of two images of the same size between two fractions of their width. */
function difference(a: RgbImage, b: RgbImage, from: number, to: number): number {
  expect([a.width, a.height]).toEqual([b.width, b.height]);
  let [sum, count] = [0, 0];
  for (let row = 0; row < a.height; row++)
    for (let i = 3 * Math.ceil(from * a.width); i < 3 * Math.floor(to * a.width); i++, count++)
      sum += Math.abs(a.data[3 * row * a.width + i]! - b.data[3 * row * a.width + i]!);
  return sum / count;
}

async function drop(page: Page, files: readonly string[]): Promise<void> {
  const session = await page.createCDPSession();
  const data = { items: [], files: [...files], dragOperationsMask: 1 };
  for (const type of ['dragEnter', 'dragOver', 'drop'] as const)
    await session.send('Input.dispatchDragEvent', { type, x: 600, y: 700, data });
}

/** The token of each patch of the photo. */
function tokenRows(): number[][] {
  const { shape, data } = encoded.tokens as NdArray<Float32Array>;
  const [, patches = 0, width = 0] = shape;
  return Array.from({ length: patches }, (_, i) => Array.from(data.subarray(i * width, (i + 1) * width)));
}

describe('an image that is chosen', () => {
  test('is reconstructed, with the PSNR and SSIM of the library', async () => {
    const { page } = await visitWithPhoto();
    const { images, psnr, ssim } = await uniflow.reconstruct(photo);
    expect(await textOf(page, '#psnr')).toBe(`${psnr.toFixed(2)} dB`);
    expect(await textOf(page, '#ssim')).toBe(ssim.toFixed(4));
    expect(Buffer.compare(await pixelsOf(page, '#reconstruction'), images.data as Uint8Array)).toBe(0);
    const again = await uniflow.reconstruct({ pixels: ndarray(await pixelsOf(page, '#original'), [1, 224, 224, 3]) });
    expect([again.psnr, again.ssim]).toEqual([psnr, ssim]);
  });

  test('is reconstructed with the steps, the seed and the schedule that are filled in', async () => {
    const { page } = await visitWithPhoto();
    await page.type('#steps', '3');
    await page.type('#seed', '7');
    await page.type('#schedule', 'pow_2');
    await page.click('#settings button');
    await reconstructed(page);
    const { psnr } = await uniflow.reconstruct(photo, { steps: 3, seed: 7, schedule: 'pow_2' });
    expect(await textOf(page, '#psnr')).toBe(`${psnr.toFixed(2)} dB`);
    expect(psnr.toFixed(2)).not.toBe((await uniflow.reconstruct(photo)).psnr.toFixed(2));
  });

  test('is the original left of the slider and the reconstruction right of it', async () => {
    const { page } = await visitWithPhoto();
    const shot = async (divider: number): Promise<RgbImage> => {
      await page.$eval('#divider', setValue, divider);
      return decodeImage(Buffer.from(await (await page.$('.layers'))!.screenshot()));
    };
    const plain = await shot(100);
    await page.$eval('#reconstruction', (image: any) => (image.style.filter = 'invert(1)')); // otherwise it resembles the original
    expect(difference(await shot(100), plain, 0, 1)).toBe(0);
    const [inverted, half] = [await shot(0), await shot(50)];
    expect(difference(inverted, plain, 0, 1)).toBeGreaterThan(50);
    expect(difference(half, plain, 0, 0.49)).toBe(0);
    expect(difference(half, inverted, 0.51, 1)).toBe(0);
  });

  test('has its tokens coloured by their principal components', async () => {
    const { page } = await visitWithPhoto();
    const colours = await coloursOf(page, '#components');
    const rows = new Matrix(tokenRows()).center('column');
    const { realEigenvalues: variances, eigenvectorMatrix: vectors } = new EigenvalueDecomposition(rows.transpose().mmul(rows), {
      assumeSymmetric: true,
    });
    const order = variances.map((_, i) => i).sort((a, b) => variances[b]! - variances[a]!);
    for (const [channel, component] of order.slice(0, 3).entries()) {
      const projection = rows.mmul(vectors.getColumnVector(component)).to1DArray();
      const differences = [1, -1].map((sign) => {
        const expected = stretched(projection.map((value) => sign * value));
        return expected.reduce((sum, value, i) => sum + Math.abs(value - colours[i]![channel]!), 0) / expected.length;
      });
      expect(Math.min(...differences)).toBeLessThan(2); // of 255
      expect(Math.max(...differences)).toBeGreaterThan(10);
    }
    const share = order.slice(0, 3).reduce((sum, i) => sum + variances[i]!, 0) / variances.reduce((a, b) => a + b);
    expect(await textOf(page, '#components-caption')).toContain(`${Math.round(100 * share)} % of the variance`);
  });

  test('has every patch coloured by its cosine to the patch under the pointer', async () => {
    const { page } = await visitWithPhoto();
    const { rows, cols } = encoded.grid;
    const box = (await (await page.$('#map'))!.boundingBox())!;
    const [row, col] = [3, 20];
    await page.mouse.move(box.x + ((col + 0.5) / cols) * box.width, box.y + ((row + 0.5) / rows) * box.height);
    const cosines = cosinesTo(row * cols + col);
    const lowest = Math.min(...cosines);
    const nearest = cosines.indexOf(Math.max(...cosines.filter((_, i) => i !== row * cols + col)));
    expect(await textOf(page, '#patch')).toBe(
      `Patch in row ${row + 1}, column ${col + 1}. Most similar: row ${Math.floor(nearest / cols) + 1}, column ${(nearest % cols) + 1}, ` +
        `cosine ${cosines[nearest]!.toFixed(2)}. Yellow is cosine 1, dark violet ${lowest.toFixed(2)}.`,
    );
    const colours = await coloursOf(page, '#similarity');
    for (const [i, [, green]] of colours.entries()) expect(shareOfGreen(green!)).toBeCloseTo((cosines[i]! - lowest) / (1 - lowest), 1);
    const marker = (await (await page.$('#marker'))!.boundingBox())!;
    expect(marker.x - box.x).toBeCloseTo((col / cols) * box.width, 0);
    expect(marker.y - box.y).toBeCloseTo((row / rows) * box.height, 0);
  });

  test('has latents to download, in a file that the library reads', async () => {
    const { page } = await visit();
    const named = join(dir, 'Löwenzahn.1.jpg');
    await copyFile(photo, named);
    await choose(page, named);
    await reconstructed(page, named);
    const file = new ArrayFile(await downloaded(page, 'Löwenzahn.1.safetensors', () => page.click('#download')));
    expect(file.metadata).toEqual({ ids: '["Löwenzahn.1.jpg"]', grid: '28x28' });
    expect(relativeL2(await file.read('latents'), encoded.latents)).toBeLessThan(tolerances.batch);
    expect(await textOf(page, '#shape')).toBe('784 patches × 48 channels, float32.');
  });

  test('can be dropped anywhere, and be replaced by another one', async () => {
    const { page, complaints } = await visitWithPhoto();
    const first = await coloursOf(page, '#components');
    const dogs = join(photos, 'dogs.jpg');
    await drop(page, [dogs]);
    await reconstructed(page, dogs);
    expect(await textOf(page, '#psnr')).toBe(`${(await uniflow.reconstruct(dogs)).psnr.toFixed(2)} dB`);
    expect(await coloursOf(page, '#components')).not.toEqual(first);
    expect(complaints).toEqual([]);
  });
});

/** 0..255 between the values that leave a hundredth of all at either end. */
function stretched(values: readonly number[]): number[] {
  const sorted = [...values].sort((a, b) => a - b);
  const tail = Math.floor(0.01 * values.length);
  const [low, high] = [sorted[tail]!, sorted[values.length - 1 - tail]!];
  return values.map((value) => Math.min(255, Math.max(0, (255 * (value - low)) / (high - low))));
}

function cosinesTo(patch: number): number[] {
  const units = tokenRows().map((row) => row.map((value) => value / Math.hypot(...row)));
  return units.map((row) => row.reduce((sum, value, i) => sum + value * units[patch]![i]!, 0));
}

/** The place of a colour in the colour map viridis, whose green rises from end to end. */
function shareOfGreen(green: number): number {
  const points = [1, 82, 145, 201, 231];
  const after = Math.max(
    1,
    points.findIndex((point) => green <= point),
  );
  const [from, to] = [points[after - 1]!, points[after]!];
  return (after - 1 + (green - from) / (to - from)) / (points.length - 1);
}

async function downloaded(page: Page, name: string, start: () => Promise<unknown>): Promise<string> {
  const folder = await mkdtemp(join(dir, 'download-'));
  const session = await page.createCDPSession();
  await session.send('Browser.setDownloadBehavior', { behavior: 'allow', downloadPath: folder });
  await start();
  for (const end = Date.now() + 10_000; !(await readdir(folder)).includes(name);) {
    if (Date.now() > end) throw new Error(`${name} is not in ${folder}: ${(await readdir(folder)).join(', ')}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return join(folder, name);
}

describe('what is wrong is said', () => {
  test('a file that is no image, one that is too large, several at once, a service that is gone', async () => {
    const to = await started({ maxBody: 2 ** 20 });
    const { page } = await visit({ to });
    const text = join(dir, 'notes.txt');
    await writeFile(text, 'not an image');
    await choose(page, text);
    await expectAlert(page, /^file 0 \(notes\.txt\): expected a JPEG/);

    const large = join(dir, 'large.jpg');
    await writeFile(large, Buffer.alloc(20 * 2 ** 20));
    await choose(page, large);
    await expectAlert(page, /at most 1048576 bytes/);
    expect(await page.$eval('#results', (results: any) => results.hidden)).toBe(true);

    await drop(page, [photo, text]);
    await expectAlert(page, 'One image file at a time: 2 were given.');

    await choose(page, photo);
    await reconstructed(page);
    expect(await textOf(page, '[role=alert]')).toBe('');

    await to.close();
    await page.click('#settings button');
    await expectAlert(page, /^The service cannot be reached/);
  });

  test('settings that the service refuses, beside the results of those before', async () => {
    const { page } = await visitWithPhoto({ to: await started({ maxSteps: 4 }) });
    await page.type('#steps', '5');
    await page.click('#settings button');
    await expectAlert(page, /options\.steps.*<=4/);
    expect(await page.$eval('#results', (results: any) => results.hidden)).toBe(false);
  });

  test('a click without an image', async () => {
    const { page } = await visit();
    await page.click('#settings button');
    await expectAlert(page, 'Choose an image first.');
  });
});

test('the token is asked for when the service needs it, and forgotten by a reload', async () => {
  const { page } = await visit({ to: await started({ token: 'secret' }) });
  await choose(page, photo);
  await expectAlert(page, 'This service asks for a token.');
  await page.keyboard.type('wrong'); // the field has the focus
  await page.keyboard.press('Enter');
  await expectAlert(page, 'The service refuses this token.');
  await page.keyboard.type('secret');
  await page.keyboard.press('Enter');
  await reconstructed(page);
  expect(await page.$eval('#login', (form: any) => [form.hidden, form.elements[0].value])).toEqual([true, '']);
  expect(await page.evaluate('[localStorage.length, sessionStorage.length, document.cookie]')).toEqual([0, 0, '']);
  await page.reload();
  await choose(page, photo);
  await expectAlert(page, 'This service asks for a token.');
});

describe('its policy', () => {
  test('blocks nothing that the page does, and no request leaves the service', async () => {
    const { page, complaints, requests } = await visitWithPhoto();
    await downloaded(page, 'dandelion.safetensors', () => page.click('#download'));
    expect(complaints).toEqual([]);
    const others = requests.filter((url) => !/^(data|blob):/.test(url));
    expect(others).toEqual([`${service.url}/`, `${service.url}/v1/reconstruct`, `${service.url}/v1/encode`]);
  });

  test('blocks what the page does not do', async () => {
    const { page, complaints } = await visit();
    await page.evaluate(`{
      const image = document.createElement('img');
      image.src = 'http://127.0.0.1:1/x.png';
      const style = document.createElement('style');
      style.textContent = 'body { display: none }';
      document.body.append(image, style);
    }`);
    await expect(page.evaluate(`fetch('http://127.0.0.1:1/')`)).rejects.toThrow();
    await expect(page.evaluate(`document.body.setAttribute('onclick', 'window.pwned = 1')`)).rejects.toThrow(/TrustedScript/);
    const blocked = complaints.filter((text) => /^[-a-z]+ (http|inline)/.test(text)).map((text) => text.split(' ')[0]);
    expect(blocked.sort()).toEqual(['connect-src', 'img-src', 'style-src-elem']);
  });
});

describe('everybody can use it', () => {
  test('with the keyboard alone', async () => {
    const { page } = await visit();
    const tab = async (): Promise<string> => {
      await page.keyboard.press('Tab');
      const { id, outline } = (await page.evaluate(`(() => {
        const { id, tagName } = document.activeElement;
        const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
        return { id: id || tagName, outline: outlineStyle + ' ' + outlineWidth };
      })()`)) as { id: string; outline: string };
      expect({ id, outline }).toEqual({ id, outline: 'solid 3px' });
      return id;
    };
    expect(await tab()).toBe('file');
    const [chooser] = await Promise.all([page.waitForFileChooser(), page.keyboard.press('Space')]);
    await chooser.accept([photo]);
    await reconstructed(page);
    expect(await tab()).toBe('steps');
    await page.keyboard.type('2');
    await page.keyboard.press('Enter');
    await reconstructed(page);
    expect(await textOf(page, '#psnr')).toBe(`${(await uniflow.reconstruct(photo, { steps: 2 })).psnr.toFixed(2)} dB`);
    expect([await tab(), await tab(), await tab(), await tab()]).toEqual(['seed', 'schedule', 'BUTTON', 'divider']);
    await page.keyboard.press('ArrowRight');
    expect(await page.$eval('#divider', (slider: any) => slider.getAttribute('aria-valuetext'))).toBe('51 % original');
    expect(await page.evaluate(`getComputedStyle(document.getElementById('reconstruction')).clipPath`)).toBe('inset(0px 0px 0px 51%)');
    expect(await tab()).toBe('map');
    for (const key of ['ArrowUp', 'ArrowLeft', 'ArrowLeft'] as const) await page.keyboard.press(key);
    expect(await textOf(page, '[role=status]')).toMatch(/^Patch in row 14, column 13\. Most similar: row \d+, column \d+, cosine/);
    for (let i = 0; i < 15; i++) await page.keyboard.press('ArrowUp');
    expect(await textOf(page, '[role=status]')).toMatch(/^Patch in row 1, column 13\./);
    expect(await tab()).toBe('download');
    await downloaded(page, 'dandelion.safetensors', () => page.keyboard.press('Enter'));
  });

  test('with a screen reader: every control has a name, every value is text', async () => {
    const { page } = await visitWithPhoto();
    const names: string[] = [];
    const collect = ({ role, name, valuetext, children = [] }: any): void => {
      names.push([role, name, valuetext].filter(Boolean).join(' '));
      children.forEach(collect);
    };
    collect(await page.accessibility.snapshot());
    expect(names).toEqual(
      expect.arrayContaining([
        ...['spinbutton Steps', 'spinbutton Seed', 'combobox Schedule', 'button Reconstruct', 'link Download the latents'],
        ...['slider Part of the image that shows the original 50', 'application Similarity of patches'],
        ...['image The original', 'image The reconstruction', 'image Tokens as colours'],
        ...['heading UniFlow tokenizer', 'heading Reconstruction', 'heading Tokens as colours', 'heading Similarity of patches'],
      ]),
    );
    expect(names.some((name) => name.startsWith('button Image'))).toBe(true); // the file input
  });

  test.each(['light', 'dark'])('with %s colours, text contrasts with its background by 4.5 or more', async (scheme) => {
    const { page } = await visitWithPhoto({ scheme });
    await page.evaluate(`document.querySelector('[role=alert]').textContent = 'an error'`);
    const { background, contrasts } = (await page.evaluate(CONTRASTS)) as { background: string; contrasts: [string, number][] };
    expect(background).toBe(scheme === 'light' ? 'rgb(255, 255, 255)' : 'rgb(22, 24, 27)');
    expect(contrasts.length).toBeGreaterThan(15);
    expect(contrasts.filter(([, contrast]) => contrast < 4.5)).toEqual([]);
  });

  test('on a narrow screen', async () => {
    const { page } = await visitWithPhoto({ width: 320 });
    expect(await page.evaluate('document.documentElement.scrollWidth')).toBe(320);
    const boxes = await page.$$eval('.layers, canvas, input, button, a', (all) =>
      all.map((element: any) => element.getBoundingClientRect()).map(({ left, right }: any) => [left, right] as [number, number]),
    );
    for (const [left, right] of boxes) expect([left >= 0, right <= 320]).toEqual([true, true]);
    await page.tap('#map'); // chooses the patch in the middle
    expect(await textOf(page, '#patch')).toMatch(/^Patch in row 15, column 15\./);
  });
});

/** The contrast (WCAG 2) of every element with text of its own to the page's background. */
const CONTRASTS = `(() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((value) => value / 255).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = getComputedStyle(document.body).backgroundColor;
  const contrast = (colour) => {
    const [dark, light] = [luminance(colour), luminance(background)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const withText = [...document.querySelectorAll('main *:not(button, script)')].filter(
    (element) => element.checkVisibility() && [...element.childNodes].some(({ nodeType, data }) => nodeType === 3 && data.trim() !== ''),
  );
  return { background, contrasts: withText.map((element) => [element.id || element.tagName, contrast(getComputedStyle(element).color)]) };
})()`;

test('it can be turned off, and needs no token to be opened', async () => {
  const [off, guarded] = [await started({ page: false }), await started({ token: 'secret' })];
  expect((await fetch(off.url)).status).toBe(404);
  const response = await fetch(guarded.url);
  expect(response.status).toBe(200);
  expect(response.headers.get('content-type')).toBe('text/html; charset=utf-8');
  expect(response.headers.get('content-security-policy')).toMatch(/^default-src 'none'; script-src 'sha256-[^']+'; style-src 'sha256-/);
  await expect(serve(uniflow, { page: 'no' as never })).rejects.toMatchObject({ code: 'BAD_INPUT', subject: 'page' });
});

// UNIFLOW_SCREENSHOT=docs/page.jpg makes the image of docs/serve.md.
const screenshot = process.env['UNIFLOW_SCREENSHOT'];
(screenshot === undefined ? test.skip : test)('a screenshot', async () => {
  const { page } = await visitWithPhoto({ width: 1080 });
  await page.screenshot({ path: screenshot!, quality: 80, fullPage: true });
});
