/** Skipped files: counted by kind, and listed up to a limit. */
import type { Skipped } from './item.js';
import { kindOf } from './names.js';

/** Maximum length of the list; a truncated list says so. */
const MAX_LISTED = 100_000;

export class Skips {
  private readonly kinds = new Map<string, number>();
  private readonly listed: Skipped[] = [];
  count = 0;
  /** Number of files that are, or may be, images. */
  lost = 0;

  static of(skipped: readonly Skipped[]): Skips {
    const skips = new Skips();
    skipped.forEach(skips.add);
    return skips;
  }

  readonly add = (skipped: Skipped): void => {
    this.count++;
    if (skipped.lost) this.lost++;
    if (this.listed.length < MAX_LISTED) this.listed.push(skipped);
    const kind = kindOf(skipped.path);
    this.kinds.set(kind, (this.kinds.get(kind) ?? 0) + 1);
  };

  /** For example `12 files were not images: 7 .txt, 5 .json`; undefined if there are none. */
  get summary(): string | undefined {
    if (this.count === 0) return undefined;
    const kinds = [...this.kinds].sort(([, a], [, b]) => b - a).map(([kind, count]) => `${count} ${kind}`);
    const listed = kinds.length > MAX_KINDS ? [...kinds.slice(0, MAX_KINDS), '...'] : kinds;
    const files = this.count === 1 ? '1 file was' : `${this.count} files were`;
    return `${files} not ${this.lost > 0 ? 'read' : this.count === 1 ? 'an image' : 'images'}: ${listed.join(', ')}`;
  }

  /** Listed files that are, or may be, images. */
  get losses(): readonly Skipped[] {
    return this.listed.filter(({ lost }) => lost);
  }

  /** One JSON line per file. */
  *lines(): Generator<string> {
    for (const { path, reason } of this.listed) yield `${JSON.stringify({ path, reason })}\n`;
    if (this.count > this.listed.length) yield `${JSON.stringify({ more: this.count - this.listed.length })}\n`;
  }
}

const MAX_KINDS = 8;
