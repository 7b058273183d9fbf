/** The images of a run, of which some may be damaged: they are passed over, named in the log, and may be deleted while the run rests. */
import type { Dataset } from '../sources/dataset.js';
import type { Damaged } from './loader.js';
import { reasonOf, UniFlowError } from '../errors.js';
import type { LogEntry, LogEntryOf } from './log.js';

type DamagedEntry = LogEntryOf<'damaged'>;

/** Reports each damaged image once, however often it is met. */
export class DamagedImages {
  private readonly known: Set<string>;
  private readonly waiting: DamagedEntry[] = [];
  private report: ((entry: DamagedEntry) => void) | undefined;

  /** @param past what the run has logged so far. */
  constructor(past: readonly LogEntry[]) {
    this.known = new Set(past.filter((entry) => entry.event === 'damaged').map(keyOf));
  }

  get count(): number {
    return this.known.size;
  }

  /** For the loader of the images in `of`. */
  in(of: DamagedEntry['of']): (damaged: Damaged) => void {
    return ({ index, id, error }) => {
      const entry: DamagedEntry = { event: 'damaged', of, index, id, reason: reasonOf(error, error.subject ?? id) };
      if (this.known.has(keyOf(entry))) return;
      this.known.add(keyOf(entry));
      if (this.report) this.report(entry);
      else this.waiting.push(entry);
    };
  }

  /** From now on, and with what has been found already. */
  reportTo(report: (entry: DamagedEntry) => void): void {
    this.report = report;
    this.waiting.splice(0).forEach(report);
  }
}

const keyOf = ({ of, id }: DamagedEntry): string => `${of}/${id}`;

/**
 * `data` as it was when the run began. Where images that the log has as damaged were deleted since, there are gaps, which read as missing
 * files: all other images keep their indices, and the run its order. Where others are gone as well, it is `data` itself, of another length.
 */
export async function withGaps(data: Dataset, past: readonly LogEntry[]): Promise<Dataset> {
  const missing = (past.find((entry) => entry.event === 'start')?.data.images ?? 0) - data.length;
  if (missing <= 0) return data;
  const damaged = past.filter((entry) => entry.event === 'damaged').filter(({ of }) => of === 'data');
  const gaps = new Map<number, string>();
  for (const { index, id } of damaged) if (!(await holds(data, id, index - missing, index))) gaps.set(index, id);
  if (gaps.size !== missing) return data;
  const before = (index: number): number => [...gaps.keys()].filter((gap) => gap < index).length;
  const read: Dataset['read'] = async (index) => {
    const id = gaps.get(index);
    if (id !== undefined) throw UniFlowError.expected('NOT_FOUND', id, 'an image', 'nothing: it was deleted');
    return data.read(index - before(index));
  };
  return { ...data, length: data.length + missing, read };
}

/** Whether the image `id` is at one of the indices from `first` to `last`. */
async function holds(data: Dataset, id: string, first: number, last: number): Promise<boolean> {
  for (let i = Math.max(0, first); i <= Math.min(last, data.length - 1); i++) if ((await data.read(i)).id === id) return true;
  return false;
}
