/**
 * `npm run reproduce:fashion-mnist` and `reproduce:cifar10`: prepare the checkout and run the reproduction. Arguments are passed on: `--
 * --help`.
 */
import { prepare, run } from './prepare.mjs';

const given = process.argv.slice(2);
prepare({ fashionMnist: given[0] === 'fashion-mnist' && !given.some((argument) => argument.startsWith('--data')) });
run(process.execPath, ['--import', 'tsx', 'examples/reproduction/main.ts', ...given]);
