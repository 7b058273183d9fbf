/** The page of a report: its HTML, its style, and the script that draws the charts in the browser. */
import type { Chart } from './report-charts.js';

/** A row of a table: a name and its value. */
export type Fact = [name: string, value: string];

export interface Image {
  caption: string;
  /** A `data:` URL. */
  url: string;
}

export interface ReportPage {
  title: string;
  facts: readonly Fact[];
  config: readonly Fact[];
  charts: readonly Chart[];
  /** Rows of a grid. */
  images: readonly Image[][];
  /** uPlot's own files. */
  plot: { script: string; style: string };
}

/** This policy forbids the browser all requests, whatever the page contains. */
const POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

export function reportPage({ title, facts, config, charts, images, plot }: ReportPage): string {
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="${POLICY}">
<link rel="icon" href="data:,">
<title>${escapeHtml(title)}</title>
<style>${plot.style}${STYLE}</style>
</head>
<body>
<h1>${escapeHtml(title)}</h1>
${facts.length > 0 ? table(facts) : '<p>The log of this run is empty.</p>'}
${config.length > 0 ? `<details><summary>Configuration</summary>${table(config)}</details>` : ''}
${charts.length > 0 ? chartSection(charts) : ''}
${images.length > 0 ? imageSection(images) : ''}
<script type="application/json" id="data">${JSON.stringify(charts).replaceAll('<', '\\u003c')}</script>
<script>${plot.script}</script>
<script>${SCRIPT}</script>
</body>
</html>
`;
}

function table(facts: readonly Fact[]): string {
  return `<table>${facts.map(([name, value]) => `<tr><th scope="row">${escapeHtml(name)}</th><td>${escapeHtml(value)}</td></tr>`).join('\n')}</table>`;
}

function chartSection(charts: readonly Chart[]): string {
  const figures = charts.map(
    ({ id, title, note }) =>
      `<figure id="${id}"><figcaption><h3>${escapeHtml(title)}</h3>${note ? `<p>${escapeHtml(note)}</p>` : ''}</figcaption></figure>`,
  );
  return `<h2>Over the steps</h2>
<p>Faint: every step; strong: the moving average. Numbers are of the last step, or of the one under the pointer.
Drag to zoom, double-click to see all; click a name to hide its line.</p>
<div class="charts">${figures.join('\n')}</div>`;
}

function imageSection(rows: readonly Image[][]): string {
  const cell = ({ caption, url }: Image): string =>
    `<figure><img src="${url}" alt="${escapeHtml(caption)}"><figcaption>${escapeHtml(caption)}</figcaption></figure>`;
  return `<h2>Reconstructions</h2>
<div class="images">${rows.map((row) => `<div>${row.map(cell).join('')}</div>`).join('\n')}</div>`;
}

function escapeHtml(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

const STYLE = `
:root {
  --paper: #fff; --ink: #1c1e21; --muted: #5c6168; --line: #e3e5e8; --blue: #1f6fd0; --orange: #c65a00; --red: #d0212f;
  --shallow: .80 .16 88; --deep: .38 .17 305; /* oklch */
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --ink: #e8eaed; --muted: #a2a8b0; --line: #2e3237; --blue: #6cb0ff; --orange: #ff9d4d; --red: #ff6b70;
    --shallow: .92 .15 98; --deep: .58 .19 305;
  }
}
* { box-sizing: border-box; }
body { max-width: 80rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0; color: var(--muted); }
table { border-collapse: collapse; }
body > table, details > table { width: 100%; table-layout: fixed; }
body > table th, details th { width: clamp(6rem, 20vw, 9rem); font-weight: 600; color: var(--muted); text-align: left; vertical-align: top; }
body > table :is(th, td), details :is(th, td) { padding: .3rem .5rem .3rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
summary { margin: .75rem 0 .25rem; color: var(--muted); cursor: pointer; }
figure { margin: 0; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 2rem; margin-top: 1.25rem; }
.charts figcaption { display: flex; flex-wrap: wrap; gap: 0 .75rem; align-items: baseline; margin-bottom: .5rem; }
.charts figcaption p, .u-legend { font-size: 13px; }
.uplot { font-family: inherit; }
.u-legend { margin: 0; text-align: left; font-variant-numeric: tabular-nums; }
.u-legend .raw, .u-legend tr:first-child .u-marker { display: none; }
.u-legend .u-series > * { padding: 0 2px; }
.u-legend .u-marker { width: .8em; height: .8em; border-radius: 2px; }
.u-select { background: color-mix(in srgb, var(--ink) 12%, transparent); }
.images { overflow-x: auto; margin-top: 1rem; }
.images > div { display: flex; gap: .5rem; margin-bottom: 1rem; }
.images figure { flex: 0 1 224px; min-width: 120px; }
.images img { display: block; width: 100%; border-radius: 3px; }
.images figcaption { margin-top: .25rem; font-size: 13px; color: var(--muted); font-variant-numeric: tabular-nums; }
`;

const SCRIPT = String.raw`
(() => {
  'use strict';
  const charts = JSON.parse(document.getElementById('data').textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();

  // Lightness, chroma and hue change in even steps, so the order is visible, also in print.
  function layerColour(depth) {
    const [from, to] = ['shallow', 'deep'].map((name) => css(name).split(' ').map(Number));
    return 'oklch(' + from.map((value, i) => (value + depth * (to[i] - value)).toFixed(3)).join(' ') + ')';
  }

  function number(value) {
    if (value == null) return '–';
    const short = Number(value.toPrecision(4));
    return short !== 0 && Math.abs(short) < 1e-3 ? short.toExponential() : String(short);
  }
  const digits = (plot, values) => values.map((value) => (value == null ? '' : number(value)));

  function line(series) {
    return {
      label: series.label,
      class: series.raw ? 'raw' : undefined,
      stroke: typeof series.colour === 'number' ? layerColour(series.colour) : css(series.colour),
      width: series.raw ? 1 : 1.75,
      alpha: series.raw ? 0.3 : 1,
      points: series.raw ? { show: false } : { fill: css('paper') },
      value: (plot, value) => number(value),
    };
  }

  function drawMarks(plot, steps) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.fillStyle = css('red');
    for (const step of steps) {
      const x = plot.valToPos(step, 'x', true);
      if (x >= bbox.left && x <= bbox.left + bbox.width) ctx.fillRect(x - 1, bbox.top + bbox.height - 12 * devicePixelRatio, 2, 12 * devicePixelRatio);
    }
    ctx.restore();
  }

  const size = (figure) => ({ width: figure.clientWidth, height: figure.clientWidth < 480 ? 220 : 280 });
  const axis = () => ({ stroke: css('muted'), grid: { stroke: css('line'), width: 1 }, ticks: { stroke: css('line'), width: 1 } });

  function draw(chart) {
    const figure = document.getElementById(chart.id);
    const showLast = (plot) => plot.cursor.idx == null && plot.setLegend({ idx: chart.steps.length - 1 });
    return new uPlot(
      {
        ...size(figure),
        scales: { x: { time: false }, y: chart.log ? { distr: 3 } : {} },
        axes: [axis(), { ...axis(), size: 64, values: digits }],
        series: [{ label: 'step' }, ...chart.series.map(line)],
        legend: { markers: { fill: (plot, i) => plot.series[i].stroke() } },
        cursor: { sync: { key: 'step' } },
        hooks: {
          ready: [showLast],
          setCursor: [showLast],
          draw: [(plot) => drawMarks(plot, chart.marks || [])],
          // hide a series together with its faint raw one
          setSeries: [(plot, i, { show }) => show !== undefined && chart.series[i - 2]?.raw && plot.setSeries(i - 1, { show })],
        },
      },
      [chart.steps, ...chart.series.map((series) => series.values)],
      figure,
    );
  }

  let plots = charts.map(draw);
  const resized = new ResizeObserver(() => plots.forEach((plot) => plot.setSize(size(plot.root.parentElement))));
  charts.forEach((chart) => resized.observe(document.getElementById(chart.id)));
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
    plots.forEach((plot) => plot.destroy());
    plots = charts.map(draw);
  });
})();
`;
