/** `npm run quickstart`: from a fresh checkout to reconstructed photographs. */
import { prepare, run } from './prepare.mjs';

prepare();
run(process.execPath, ['--import', 'tsx', 'examples/quickstart.ts']);
