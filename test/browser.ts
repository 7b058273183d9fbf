/** Chromium for the tests of pages. */
import { spawnSync } from 'node:child_process';
import puppeteer, { type Browser, type Page } from 'puppeteer-core';

export function launchBrowser(): Promise<Browser> {
  const { stdout } = spawnSync('sh', ['-c', 'command -v chromium'], { encoding: 'utf8' });
  if (stdout === '') throw new Error('chromium is not on the PATH; `npm test` installs it, or: apt-get install chromium');
  return puppeteer.launch({ executablePath: stdout.trim(), args: ['--no-sandbox'] });
}

/** A new page that records what it complains of (messages, errors, violations of its policy) and what it requests. */
export async function watchedPage(browser: Browser, scheme = 'light'): Promise<{ page: Page; complaints: string[]; requests: string[] }> {
  const page = await browser.newPage();
  const complaints: string[] = [];
  const requests: string[] = [];
  page.on('console', (message) => complaints.push(message.text()));
  page.on('pageerror', (error) => complaints.push(String(error)));
  page.on('request', (request) => requests.push(request.url()));
  await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
  return { page, complaints, requests };
}
