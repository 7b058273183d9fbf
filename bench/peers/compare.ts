/**
 * Comparisons with other libraries: the same float32 work in this process, with the same number of threads, on the same data. Results are
 * compared first, to ensure that both do the same work.
 */
import type { Effort, Row } from '../harness.js';
import { Inputs } from '../inputs.js';
import { encoders, images } from './encoders.js';
import { loadPeer } from './install.js';
import { operations } from './operations.js';

/** The compared libraries and their packages. */
const PACKAGES = { 'ONNX Runtime': 'onnxruntime-node', 'transformers.js': '@huggingface/transformers' } as const;
export type Peer = keyof typeof PACKAGES;

/** Milliseconds of both, and the relative L2 difference of the results. */
export interface Measured {
  oursMs: number;
  theirsMs: number;
  difference: number;
}

export interface Comparison<Package = never> {
  peer: Peer;
  name: string;
  shape: string;
  /** `inputs` are released afterwards. */
  measure: (theirs: Package, inputs: Inputs, effort: Effort) => Promise<Measured>;
}

export interface PeerResult extends Measured {
  family: 'peers';
  peer: Peer;
  name: string;
  shape: string;
  dtype: 'float32';
  /** oursMs / theirsMs; below 1, this library is faster. */
  ratio: number;
}

const MAX_DIFFERENCE = 1e-4;
const comparisons: Comparison[] = [...operations, ...encoders, ...images];

/** Runs the selected comparisons, except those whose packages are unavailable. */
export async function comparePeers(
  effort: Effort,
  wanted: (row: Pick<Row, 'family' | 'name' | 'shape' | 'dtype'>) => boolean,
  say: (line: string) => void,
): Promise<PeerResult[]> {
  const results: PeerResult[] = [];
  for (const peer of Object.keys(PACKAGES) as Peer[]) {
    const chosen = comparisons.filter(
      ({ peer: of, name, shape }) => of === peer && wanted({ family: 'peers', name, shape, dtype: 'float32' }),
    );
    const theirs = chosen.length > 0 ? loadPeer<never>(PACKAGES[peer], say) : undefined;
    if (!theirs) continue;
    say(`\n${'float32, median ms'.padEnd(40)}${'ours'.padStart(10)}${peer.padStart(17)}${'ours/theirs'.padStart(13)}`);
    for (const comparison of chosen) {
      const result = await compare(comparison, theirs, effort);
      const cells = [result.oursMs.toFixed(2).padStart(10), result.theirsMs.toFixed(2).padStart(17), result.ratio.toFixed(2).padStart(13)];
      say(`${result.name} ${result.shape}`.padEnd(40) + cells.join(''));
      results.push(result);
    }
  }
  return results;
}

async function compare({ peer, name, shape, measure }: Comparison, theirs: never, effort: Effort): Promise<PeerResult> {
  const inputs = new Inputs();
  try {
    const measured = await measure(theirs, inputs, effort);
    if (!(measured.difference < MAX_DIFFERENCE))
      throw new Error(`${name} ${shape}: ours and ${peer}'s differ by ${measured.difference}: not the same work`);
    return { family: 'peers', peer, name, shape, dtype: 'float32', ...measured, ratio: measured.oursMs / measured.theirsMs };
  } finally {
    await inputs.release();
  }
}
