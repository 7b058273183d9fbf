/** `npm run reproduce:fashion-mnist`: everything that it needs, then the reproduction. Arguments are its own: `-- --help`. */
import { prepare, run } from './prepare.mjs';

const given = process.argv.slice(2);
prepare({ fashionMnist: !given.some((argument) => argument.startsWith('--data')) });
run(process.execPath, ['--import', 'tsx', 'examples/fashion-mnist/main.ts', ...given]);
