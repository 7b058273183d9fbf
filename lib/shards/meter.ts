/** How busy the stages of the pipeline are. */

/** Shares of the time, from 0 to 1. */
export interface Utilisation {
  /** Of the pictures that may be decoded at once. */
  decode: number;
  compute: number;
  write: number;
}

export class Meter {
  readonly decode: Stage;
  readonly compute = new Stage(1);
  readonly write = new Stage(1);

  /** @param decoders pictures decoded at once. */
  constructor(decoders: number) {
    this.decode = new Stage(decoders);
  }

  /** Since the start, or since this was last called. */
  read(): Utilisation {
    return { decode: this.decode.read(), compute: this.compute.read(), write: this.write.read() };
  }
}

/** A stage with `capacity` places. */
class Stage {
  private active = 0;
  private busy = 0;
  private since = performance.now();
  private last = this.since;

  constructor(private readonly capacity: number) {}

  async during<T>(work: () => Promise<T>): Promise<T> {
    this.count(1);
    try {
      return await work();
    } finally {
      this.count(-1);
    }
  }

  read(): number {
    this.count(0);
    const share = this.busy / Math.max(1, this.last - this.since);
    this.busy = 0;
    this.since = this.last;
    return share;
  }

  private count(change: number): void {
    const now = performance.now();
    this.busy += ((now - this.last) * Math.min(this.active, this.capacity)) / this.capacity;
    this.last = now;
    this.active += change;
  }
}
