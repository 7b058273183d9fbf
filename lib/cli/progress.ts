/** Progress of the work: a bar on a terminal, occasional lines elsewhere, nothing if quiet. */
import cliProgress, { type MultiBar, type SingleBar } from 'cli-progress';
import type { RunProgress } from '../shards/run.js';
import { rateText } from './output.js';

const SECONDS_BETWEEN_LINES = 3;

export interface Amount {
  /** Unit of the count, as in `images/s`. */
  unit: string;
  /** Count per unit. */
  scale?: number;
}

export class Progress {
  private done = 0;
  private total: number | undefined;
  private before = 0;
  private detail = '';
  private readonly started = performance.now();
  private readonly bars: MultiBar | undefined;
  private bar: SingleBar | undefined;
  private readonly timer: NodeJS.Timeout | undefined;

  constructor(
    private readonly label: string,
    private readonly amount: Amount,
    quiet: boolean,
  ) {
    if (quiet) return;
    if (process.stderr.isTTY) {
      // A MultiBar with one bar, because a SingleBar moves back to its first line when it stops and overwrites lines printed since.
      this.bars = new cliProgress.MultiBar({
        format: (options, { progress }) => `${label} [${cliProgress.Format.BarFormat(progress, options)}] ${this.state()}`,
        barsize: 24,
        fps: 4,
        forceRedraw: true, // redraws the bar after print()
        gracefulExit: false, // main.ts handles Ctrl-C
        linewrap: true, // lets the terminal wrap lines printed meanwhile; the bar itself is cut to the width
      });
    } else {
      this.timer = setInterval(() => this.line(`${this.label}: ${this.state()}`), SECONDS_BETWEEN_LINES * 1000).unref();
    }
  }

  /**
   * @param total undefined if it is not known yet
   * @param before number completed earlier, which does not count for the rate
   */
  start(total: number | undefined, before = 0): this {
    this.total = total;
    this.before = before;
    this.done = before;
    this.bar = this.bars?.create(total ?? 0, before);
    if (this.timer) this.line(`${this.label}: ${this.count()}`);
    return this;
  }

  /** Sets the total once it is known. */
  expect(total: number): void {
    this.total = total;
    this.bar?.setTotal(total);
  }

  /** Updates the bar: `done` of the total, `before` of them completed earlier; `detail` is shown beside them. */
  update(done: number, detail = '', before = this.before): void {
    this.done = done;
    this.before = before;
    this.detail = detail;
    this.bar?.update(done);
  }

  /** Prints a line of the result to stdout. */
  print(text: string): void {
    this.clear();
    process.stdout.write(`${text}\n`);
  }

  /** Prints a line about the work to stderr. */
  line(text: string): void {
    this.clear();
    process.stderr.write(`${text}\n`);
  }

  stop(): void {
    this.bars?.stop();
    clearInterval(this.timer);
  }

  private clear(): void {
    if (this.bars) process.stderr.write('\r\x1b[K');
  }

  private state(): string {
    if (this.done === this.before) return this.count();
    const { unit, scale = 1 } = this.amount;
    const rate = (this.done - this.before) / Math.max(1e-3, (performance.now() - this.started) / 1000);
    const left = this.total === undefined ? '' : `, ${duration((this.total - this.done) / rate)} left`;
    return `${this.count()}, ${rateText(rate / scale)} ${unit}/s${left}${this.detail && `, ${this.detail}`}`;
  }

  private count(): string {
    const { unit, scale = 1 } = this.amount;
    const total = this.total === undefined ? '' : `/${Math.round(this.total / scale)}`;
    return `${Math.round(this.done / scale)}${total} ${unit}`;
  }
}

/** For example `1:05`. */
function duration(seconds: number): string {
  const s = Math.round(seconds);
  const two = (n: number): string => String(n).padStart(2, '0');
  const [hours, minutes] = [Math.floor(s / 3600), Math.floor(s / 60) % 60];
  return hours > 0 ? `${hours}:${two(minutes)}:${two(s % 60)}` : `${minutes}:${two(s % 60)}`;
}

/** Progress bars of consecutive stages. */
export class Stages {
  private stage: string | undefined;
  private bar: Progress | undefined;

  constructor(private readonly quiet: boolean) {}

  update({ stage, done, total }: { stage: string; done: number; total: number }): void {
    if (stage !== this.stage) {
      this.bar?.stop();
      this.bar = new Progress(stage, { unit: stage.startsWith('probe') ? 'steps' : 'images' }, this.quiet).start(total);
    }
    this.stage = stage;
    this.bar?.update(done);
  }

  /** Prints a line about the work to stderr. */
  line(text: string): void {
    if (this.bar) this.bar.line(text);
    else process.stderr.write(`${text}\n`);
  }

  stop(): void {
    this.bar?.stop();
    this.bar = undefined;
  }
}

const SECONDS_BETWEEN_READINGS = 1;

/** Utilisation of the stages over about the last second, and the number of failed images. */
export function stageDetails(): (state: Pick<RunProgress, 'failures' | 'utilisation'>) => string {
  let next = 0;
  let stages = '';
  return ({ failures, utilisation }) => {
    const now = performance.now() / 1000;
    if (now >= next) {
      next = now + SECONDS_BETWEEN_READINGS;
      stages = Object.entries(utilisation())
        .map(([stage, share]: [string, number]) => `${stage} ${Math.round(100 * share)} %`)
        .join(', ');
    }
    return failures > 0 ? `${stages}, ${failures} failed` : stages;
  };
}
