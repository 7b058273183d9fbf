/** Measures the utilisation of the pipeline stages. */

/** Fractions of the elapsed time, from 0 to 1. */
export interface Utilisation {
  /** Utilisation of all decoding slots. */
  decode: number;
  compute: number;
  write: number;
}

export class Meter {
  readonly decode: Stage;
  readonly compute = new Stage(1);
  readonly write = new Stage(1);

  /** @param decoders number of images decoded at once. */
  constructor(decoders: number) {
    this.decode = new Stage(decoders);
  }

  /** Utilisation since the last call, or since the start. */
  read(): Utilisation {
    return { decode: this.decode.read(), compute: this.compute.read(), write: this.write.read() };
  }
}

/** A stage that processes up to `capacity` items at once. */
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
