/** `npm run bench`: prepares the checkout and runs the benchmarks. Arguments are passed on: `npm run bench -- --help`. */
import { prepare, run } from './prepare.mjs';

prepare();
run(process.execPath, ['--import', 'tsx', 'bench/main.ts', ...process.argv.slice(2)]);
