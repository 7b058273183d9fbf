/** The images of a run. Damaged ones are skipped and named in the log, and may be deleted while the run is stopped. */
import type { Dataset } from '../sources/dataset.js';
import type { Damaged } from './loader.js';
import { reasonOf, UniFlowError } from '../errors.js';
import type { LogEntry, LogEntryOf } from './log.js';

type DamagedEntry = LogEntryOf<'damaged'>;

/** Reports each damaged image only once. */
export class DamagedImages {
  private readonly known: Set<string>;
  private readonly waiting: DamagedEntry[] = [];
  private report: ((entry: DamagedEntry) => void) | undefined;

  /** @param past log entries of earlier sessions. */
  constructor(past: readonly LogEntry[]) {
    this.known = new Set(past.filter((entry) => entry.event === 'damaged').map(keyOf));
  }

  get count(): number {
    return this.known.size;
  }

  /** The listener for the loader of the images in `of`. */
  in(of: DamagedEntry['of']): (damaged: Damaged) => void {
    return ({ index, id, error }) => {
      const entry: DamagedEntry = { event: 'damaged', of, index, id, reason: reasonOf(error, error.subject ?? id) };
      if (this.known.has(keyOf(entry))) return;
      this.known.add(keyOf(entry));
      if (this.report) this.report(entry);
      else this.waiting.push(entry);
    };
  }

  /** Sends all future reports to `report`, and those collected so far. */
  reportTo(report: (entry: DamagedEntry) => void): void {
    this.report = report;
    this.waiting.splice(0).forEach(report);
  }
}

const keyOf = ({ of, id }: DamagedEntry): string => `${of}/${id}`;

/**
 * `data` as it was when the run began. If images logged as damaged have been deleted since, gaps take their place and read as missing files, so all other
 * images keep their indices and the run keeps its order. If other images are missing as well, this is `data` itself, with a different length.
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

/** Whether the image `id` has one of the indices `first` to `last`. */
async function holds(data: Dataset, id: string, first: number, last: number): Promise<boolean> {
  for (let i = Math.max(0, first); i <= Math.min(last, data.length - 1); i++) if ((await data.read(i)).id === id) return true;
  return false;
}
