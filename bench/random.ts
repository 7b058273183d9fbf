/** The flow's noise for four images. The bound counts only the writes and is not reachable, because every number takes integer work. */
import { native } from '../lib/native.js';
import type { Row } from './harness.js';

const [BATCH, PATCHES, PIXELS] = [4, 1024, 588];

export const rows: Row[] = [
  {
    ...{ family: 'random', name: 'noise', shape: `${BATCH}x${PATCHES}x${PIXELS}`, dtype: 'float32' },
    cost: { bytes: 4 * BATCH * PATCHES * PIXELS },
    setup: () => {
      const ids = Uint32Array.from({ length: BATCH }, (_, i) => i);
      return () => native.noise(0, ids, PATCHES, PIXELS);
    },
  },
];
