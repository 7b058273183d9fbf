/** Understanding against reconstruction, as an SVG on a ground of its own: readable on light and dark pages. */
import { statistic } from './claims.js';

export interface Series {
  name: string;
  color: string;
  /** PSNR in dB and accuracy in %, a point a run. */
  points: readonly { x: number; y: number }[];
}

const [WIDTH, HEIGHT] = [720, 420];
const FRAME = { left: 64, right: 560, top: 24, bottom: 364 };

/** @param reference a dashed line at this y, with its name. */
export function scatterPlot(series: readonly Series[], labels: { x: string; y: string }, reference: { y: number; name: string }): string {
  const all = series.flatMap(({ points }) => points);
  const x = axis(
    all.map((p) => p.x),
    FRAME.left,
    FRAME.right,
  );
  const y = axis([...all.map((p) => p.y), reference.y], FRAME.bottom, FRAME.top);
  const middle = { x: (FRAME.left + FRAME.right) / 2, y: (FRAME.top + FRAME.bottom) / 2 };
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="system-ui, sans-serif" font-size="13" fill="#24292f">`,
    `<rect width="${WIDTH}" height="${HEIGHT}" rx="8" fill="#ffffff"/>`,
    ...x.ticks.map((t) => line(x.at(t), FRAME.top, x.at(t), FRAME.bottom) + text(x.at(t), FRAME.bottom + 18, String(t))),
    ...y.ticks.map((t) => line(FRAME.left, y.at(t), FRAME.right, y.at(t)) + text(FRAME.left - 8, y.at(t) + 4, String(t), 'end')),
    text(middle.x, HEIGHT - 14, labels.x),
    `<g transform="rotate(-90 18 ${middle.y})">${text(18, middle.y, labels.y)}</g>`,
    line(FRAME.left, y.at(reference.y), FRAME.right, y.at(reference.y), 'stroke="#57606a" stroke-width="1.5" stroke-dasharray="6 4"'),
    ...series.flatMap(({ points, color }) => points.map((p) => dot(x.at(p.x), y.at(p.y), 4, color, 0.45))),
    ...series.map(({ points, color }) =>
      dot(x.at(statistic(points.map((p) => p.x)).mean), y.at(statistic(points.map((p) => p.y)).mean), 9, color, 0.9),
    ),
    ...series.map(
      ({ name, color }, i) => dot(FRAME.right + 22, legend(i), 7, color, 0.9) + text(FRAME.right + 36, legend(i) + 4, name, 'start'),
    ),
    line(
      FRAME.right + 14,
      legend(series.length),
      FRAME.right + 30,
      legend(series.length),
      'stroke="#57606a" stroke-width="1.5" stroke-dasharray="6 4"',
    ),
    text(FRAME.right + 36, legend(series.length) + 4, reference.name, 'start'),
    '</svg>\n',
  ].join('\n');
}

const legend = (i: number): number => FRAME.top + 16 + 24 * i;

function line(x1: number, y1: number, x2: number, y2: number, style = 'stroke="#d0d7de"'): string {
  return `<line x1="${px(x1)}" y1="${px(y1)}" x2="${px(x2)}" y2="${px(y2)}" ${style}/>`;
}

function text(x: number, y: number, value: string, anchor = 'middle'): string {
  return `<text x="${px(x)}" y="${px(y)}" text-anchor="${anchor}">${value}</text>`;
}

function dot(x: number, y: number, r: number, color: string, opacity: number): string {
  return `<circle cx="${px(x)}" cy="${px(y)}" r="${r}" fill="${color}" fill-opacity="${opacity}" stroke="${color}"/>`;
}

const px = (value: number): string => value.toFixed(1);

/** From values to [from, to] with some room at both ends, and round numbers in between. */
function axis(values: readonly number[], from: number, to: number): { at: (value: number) => number; ticks: number[] } {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = Math.max(0.08 * (high - low), 0.1);
  const [begin, end] = [low - room, high + room];
  const rough = (end - begin) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) as number);
  const count = Math.floor(end / step) - Math.ceil(begin / step) + 1;
  const ticks = Array.from({ length: count }, (_, i) => Number(((Math.ceil(begin / step) + i) * step).toPrecision(6)));
  return { at: (value) => from + ((value - begin) / (end - begin)) * (to - from), ticks };
}
