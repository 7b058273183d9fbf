/** `npm run reproduce:fashion-mnist`, `npm run reproduce:cifar10`: the paper's claims at a small scale. */
import { Argument, Command } from 'commander';
import { spawnSync } from 'node:child_process';
import { cpus } from 'node:os';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { integerFrom } from '../../lib/cli/options.js';
import { cpuInfo } from '../../lib/index.js';
import { claimsOf } from './claims.js';
import { plans, quick, type Plan, type PlanName } from './plan.js';
import { writeReport, type Origin } from './report.js';
import { reproduce } from './reproduce.js';

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

interface Options {
  quick?: boolean;
  variants?: string[];
  seeds?: number;
  steps?: number;
  teacherSteps?: number;
  data?: string;
  work?: string;
  out?: string;
}

/** Default locations of the data. */
const INSTALLED: Partial<Record<PlanName, string>> = { 'fashion-mnist': '/usr/share/datasets/fashion-mnist' };

const program = new Command('npm run reproduce:DATA --')
  .description('Trains and measures tokenizers in many regimes. A reproduction that was stopped goes on where it was.')
  .addArgument(new Argument('<plan>').choices(Object.keys(plans)))
  .option('--quick', 'for a look, in about ten minutes: few steps, one seed; written to the work folder')
  .option('--variants <ids>', "of the plan, as frozen,finetune; the paper's is always among them (default: all)", (ids) => ids.split(','))
  .option('--seeds <n>', 'runs of each variant', integerFrom(1))
  .option('--steps <n>', 'of each run; fewer for a try-out', integerFrom(1))
  .option('--teacher-steps <n>', 'of the teacher', integerFrom(1))
  .option('--data <folder>', 'the data files: IDX of Fashion-MNIST, train-*.parquet and test-*.parquet of CIFAR-10')
  .option('--work <folder>', 'models and what was measured (default: out/DATA)')
  .option('--out <folder>', 'the report: a page, a plot and all numbers (default: docs)')
  .parse();
const name = program.args[0] as PlanName;
const options = program.opts<Options>();
const work = options.work ?? join(root, 'out', name);
const data = options.data ?? INSTALLED[name];
if (data === undefined) program.error('the option --data is missing: the folder with train-*.parquet and test-*.parquet', { exitCode: 2 });

const plan = planOf(plans[name], options);
const out = options.out ?? (options.quick ? work : join(root, 'docs'));
const results = await reproduce(plan, { data: data as string, work, print: (line) => console.log(line) });
await writeReport(out, results, plan, originOf());
for (const { text, seen, because } of claimsOf(results, plan)) console.log(`${seen ? 'seen' : 'NOT SEEN'}: ${text} ${because}`);
console.log(`Written: ${relative(process.cwd(), join(out, `${plan.report}.md`))}`);

function planOf(whole: Plan, given: Options): Plan {
  const plan = given.quick ? quick(whole) : whole;
  const ids = plan.variants.map(({ id }) => id);
  const wanted = [...(given.variants ?? ids), plan.paper];
  const unknown = wanted.filter((id) => !ids.includes(id));
  if (unknown.length > 0) program.error(`--variants: expected some of ${ids.join(',')}, but got ${unknown.join(',')}`, { exitCode: 2 });
  return {
    ...{ ...plan, variants: plan.variants.filter(({ id }) => wanted.includes(id)), seeds: given.seeds ?? plan.seeds },
    teacher: { ...plan.teacher, steps: given.teacherSteps ?? plan.teacher.steps },
    adaptation: { ...plan.adaptation, steps: given.steps ?? plan.adaptation.steps },
  };
}

function originOf(): Origin {
  const { threads, kernels } = cpuInfo();
  const given = process.argv.slice(3).map((argument, i, all) => (all[i - 1] === '--data' ? 'FOLDER' : argument));
  return {
    command: [`npm run reproduce:${name}`, ...(given.length > 0 ? ['--', ...given] : [])].join(' '),
    machine: `${threads} threads of ${cpus()[0]?.model.trim() ?? 'an unknown processor'} (${kernels} kernels, Node.js ${process.version})`,
    date: new Date().toISOString().slice(0, 10),
    commit:
      git('rev-parse', '--short', 'HEAD') + (git('status', '--porcelain', '--', 'lib', 'native', 'examples') ? ' with local changes' : ''),
  };
}

function git(...args: string[]): string {
  return spawnSync('git', args, { cwd: root, encoding: 'utf8' }).stdout?.trim() || '';
}
