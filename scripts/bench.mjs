/** `npm run bench`: everything that the benchmarks need, then the benchmarks. Arguments are theirs: `npm run bench -- --help`. */
import { prepare, run } from './prepare.mjs';

prepare();
run(process.execPath, ['--import', 'tsx', 'bench/main.ts', ...process.argv.slice(2)]);
