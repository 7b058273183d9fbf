/** Understanding against reconstruction, as an SVG with its own background: readable on light and dark pages. */
import { statistic } from './claims.js';

export interface Series {
  name: string;
  color: string;
  /** Draws only the outlines of the dots. */
  hollow: boolean;
  /** PSNR in dB and accuracy in %, one point per run. */
  points: readonly { x: number; y: number }[];
}

interface Reference {
  at: number;
  name: string;
}

const [WIDTH, HEIGHT] = [860, 480];
const FRAME = { left: 64, right: 560, top: 24, bottom: 424 };
/** Line styles of the references. */
const DASHES = [
  'stroke="#57606a" stroke-width="1.5" stroke-dasharray="6 4"',
  'stroke="#57606a" stroke-width="1.5" stroke-dasharray="2 3"',
] as const;

/** Small dots are runs and large dots their means; dashed lines are the named references. */
export function scatterPlot(
  series: readonly Series[],
  labels: { x: string; y: string },
  { horizontal, vertical }: { horizontal: Reference; vertical: Reference },
): string {
  const all = series.flatMap(({ points }) => points);
  const x = axis([...all.map((p) => p.x), vertical.at], FRAME.left, FRAME.right);
  const y = axis([...all.map((p) => p.y), horizontal.at], FRAME.bottom, FRAME.top);
  const middle = { x: (FRAME.left + FRAME.right) / 2, y: (FRAME.top + FRAME.bottom) / 2 };
  const center = ({ points }: Series): [number, number] => [
    x.at(statistic(points.map((p) => p.x)).mean),
    y.at(statistic(points.map((p) => p.y)).mean),
  ];
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="system-ui, sans-serif" font-size="13" fill="#24292f">`,
    `<rect width="${WIDTH}" height="${HEIGHT}" rx="8" fill="#ffffff"/>`,
    ...x.ticks.map((t) => line(x.at(t), FRAME.top, x.at(t), FRAME.bottom) + text(x.at(t), FRAME.bottom + 18, String(t))),
    ...y.ticks.map((t) => line(FRAME.left, y.at(t), FRAME.right, y.at(t)) + text(FRAME.left - 8, y.at(t) + 4, String(t), 'end')),
    text(middle.x, HEIGHT - 14, labels.x),
    `<g transform="rotate(-90 18 ${middle.y})">${text(18, middle.y, labels.y)}</g>`,
    line(FRAME.left, y.at(horizontal.at), FRAME.right, y.at(horizontal.at), DASHES[0]),
    line(x.at(vertical.at), FRAME.top, x.at(vertical.at), FRAME.bottom, DASHES[1]),
    ...series.flatMap((s) => s.points.map((p) => dot(x.at(p.x), y.at(p.y), 3, s, 0.4))),
    ...series.map((s) => dot(...center(s), 7, s, 0.9)),
    ...series.map((s, i) => dot(FRAME.right + 22, legend(i), 6, s, 0.9) + text(FRAME.right + 36, legend(i) + 4, s.name, 'start')),
    ...[horizontal, vertical].map(({ name }, i) => {
      const at = legend(series.length + i);
      return line(FRAME.right + 14, at, FRAME.right + 30, at, DASHES[i]) + text(FRAME.right + 36, at + 4, name, 'start');
    }),
    '</svg>\n',
  ].join('\n');
}

const legend = (i: number): number => FRAME.top + 16 + 23 * i;

function line(x1: number, y1: number, x2: number, y2: number, style = 'stroke="#d0d7de"'): string {
  return `<line x1="${px(x1)}" y1="${px(y1)}" x2="${px(x2)}" y2="${px(y2)}" ${style}/>`;
}

function text(x: number, y: number, value: string, anchor = 'middle'): string {
  return `<text x="${px(x)}" y="${px(y)}" text-anchor="${anchor}">${value}</text>`;
}

function dot(x: number, y: number, r: number, { color, hollow }: Series, opacity: number): string {
  const fill = hollow ? 'fill="#ffffff" fill-opacity="0.2" stroke-width="2"' : `fill="${color}" fill-opacity="${opacity}"`;
  return `<circle cx="${px(x)}" cy="${px(y)}" r="${r}" ${fill} stroke="${color}"/>`;
}

const px = (value: number): string => value.toFixed(1);

/** Maps values to [from, to] with a margin at both ends, and chooses round ticks. */
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
