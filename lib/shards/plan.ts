/**
 * The plan of a run: shard k has the images k·n to (k+1)·n of the source. The record of a shard states the ids and files that it was made
 * of, so a run that is resumed compares its source with them.
 */
import { throwIfAborted, UniFlowError } from '../errors.js';
import type { Item } from '../sources/item.js';
import { IdHasher, type ShardIds, type ShardRecord } from './shard.js';
import { sameFiles, Stamps } from './stamps.js';

/** The items of one shard, which can be taken once, as they are needed. */
export class PlannedShard implements AsyncIterable<Item> {
  /** Resolves once all items have been taken, so that those of the next shard can be. */
  readonly taken: Promise<void>;
  private allTaken!: () => void;
  private count = 0;
  private readonly hasher = new IdHasher();

  constructor(
    readonly index: number,
    readonly first: Item,
    private readonly rest: AsyncIterator<Item>,
    private readonly size: number,
  ) {
    this.taken = new Promise((resolve) => (this.allTaken = resolve));
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Item, void, undefined> {
    while (this.count < this.size) {
      const next = this.count === 0 ? { value: this.first } : await this.rest.next();
      if ('done' in next && next.done) break;
      this.count++;
      this.hasher.add(next.value);
      yield next.value;
    }
    this.count = this.size;
    this.allTaken();
  }

  /** Takes the items that are left. @returns the ids of all. */
  async ids(): Promise<ShardIds> {
    const left = this[Symbol.asyncIterator]();
    while (!(await left.next()).done);
    return this.hasher.record();
  }
}

/** The shards of a source. All items of one must be taken before the next is asked for. */
export async function* plannedShards(items: AsyncIterator<Item>, size: number): AsyncGenerator<PlannedShard, void, undefined> {
  for (let index = 0; ; index++) {
    const first = await items.next();
    if (first.done) return;
    yield new PlannedShard(index, first.value, items, size);
  }
}

export interface CompareOptions {
  signal?: AbortSignal | undefined;
  /** Compares the files by content, if the record has it. */
  verify?: boolean | undefined;
}

/** Takes the items of a completed shard. @throws {UniFlowError} `BAD_INPUT` if they are not the images it was made of. */
export async function compareShard(run: string, record: ShardRecord, shard: PlannedShard, options: CompareOptions): Promise<void> {
  const stamps = new Stamps(options.verify);
  for await (const item of shard) {
    throwIfAborted(options.signal);
    stamps.add(item);
  }
  compareIds(run, record, await shard.ids());
  if (!sameFiles(record.stamps, await stamps.record())) throw changed(run, record, options.verify);
}

/** @throws {UniFlowError} `BAD_INPUT` if the shard was made of images with other ids; `ids`: those of the source, undefined after its end. */
export function compareIds(run: string, record: ShardRecord, ids: ShardIds | undefined): void {
  if (ids?.ids === record.ids) return;
  const range = ({ items, firstId, lastId }: ShardIds): string => `${items}, '${firstId}' to '${lastId}'`;
  const subject = `${run}: the images of shard ${record.index}`;
  throw UniFlowError.expected('BAD_INPUT', subject, `those that it was made of (${range(record)})`, ids ? range(ids) : 'none');
}

/** The error for files that changed under the same names. */
function changed(run: string, { index, firstId, lastId, stamps }: ShardRecord, verify = false): UniFlowError {
  const differ = verify && stamps?.content !== undefined ? 'content' : 'size or time of change';
  const advice = stamps?.content !== undefined && !verify ? ', or compare the content with verify' : '';
  return UniFlowError.expected(
    'BAD_INPUT',
    `${run}: the files of shard ${index}, '${firstId}' to '${lastId}'`,
    'those that it was made of',
    `a file of another ${differ}. Choose another folder${advice}`,
  );
}
