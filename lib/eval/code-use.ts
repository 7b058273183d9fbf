/** How a tokenizer with codes uses them: counted over all tokens, separately for each group of channels. */
import { codeCount, groupCount, requireLevels, type CodesConfig } from '../codes.js';
import { native } from '../native.js';

export interface CodeUse {
  /** Number of codes of a group. */
  count: number;
  /** Share of them that occurs at least once, in [0, 1], per group; at most the number of tokens / count. */
  used: number[];
  /** Entropy of the codes in bits, per group; at most log2(count), and at most that of the number of tokens. */
  entropy: number[];
  /** With log2(count) bits for each code. */
  bitsPerPixel: number;
  /** With an ideal entropy coder that knows how often each code of a group occurs. */
  entropyPerPixel: number;
}

/** Mean over the groups of the share of codes that are used. */
export function shareOfCodes({ used }: Pick<CodeUse, 'used'>): number {
  return used.reduce((sum, share) => sum + share, 0) / used.length;
}

export class CodeMeter {
  private readonly count: number;
  private readonly groups: number;
  /** [G, count] */
  private readonly counts: Int32Array;

  constructor(private readonly config: CodesConfig & { patch: number }) {
    this.count = codeCount(requireLevels(config));
    this.groups = groupCount(config);
    this.counts = new Int32Array(this.groups * this.count);
  }

  /** Adds codes [..., G]. */
  async add(codes: Int32Array): Promise<void> {
    await native.countCodes(codes, this.groups, this.counts);
  }

  measure(): CodeUse {
    const { count, groups, config } = this;
    const group = Array.from({ length: groups }, (_, g) => this.counts.subarray(g * count, (g + 1) * count).filter((n) => n > 0));
    const entropy = group.map(entropyOf);
    const pixels = config.patch ** 2;
    return {
      count,
      used: group.map((found) => found.length / count),
      entropy,
      bitsPerPixel: (groups * Math.log2(count)) / pixels,
      entropyPerPixel: entropy.reduce((sum, bits) => sum + bits, 0) / pixels,
    };
  }
}

function entropyOf(counts: Int32Array): number {
  const total = counts.reduce((sum, n) => sum + n, 0);
  return counts.reduce((sum, n) => sum - (n / total) * Math.log2(n / total), 0);
}
