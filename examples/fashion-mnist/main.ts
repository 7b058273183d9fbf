/** `npm run reproduce:fashion-mnist`: the paper's claim on a small scale. */
import { Command } from 'commander';
import { spawnSync } from 'node:child_process';
import { cpus } from 'node:os';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { integerFrom } from '../../lib/cli/options.js';
import { cpuInfo } from '../../lib/index.js';
import { claimsOf } from './claims.js';
import { PLAN, type Plan } from './plan.js';
import { writeReport, type Origin } from './report.js';
import { reproduce } from './reproduce.js';

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

interface Options {
  seeds: number;
  steps: number;
  teacherSteps: number;
  data: string;
  work: string;
  out: string;
}

const { seeds, steps, teacherSteps, data, work, out } = new Command('npm run reproduce:fashion-mnist --')
  .description('Trains and measures tokenizers in five regimes. A reproduction that was stopped goes on where it was.')
  .option('--seeds <n>', 'runs of each regime', integerFrom(1), PLAN.seeds)
  .option('--steps <n>', 'of each run; fewer for a try-out', integerFrom(1), PLAN.adaptation.steps)
  .option('--teacher-steps <n>', 'of the teacher', integerFrom(1), PLAN.teacher.steps)
  .option('--data <folder>', 'the IDX files', '/usr/share/datasets/fashion-mnist')
  .option('--work <folder>', 'models and what was measured', join(root, 'out', 'fashion-mnist'))
  .option('--out <folder>', 'reproduction.md, .svg and .json', join(root, 'docs'))
  .parse()
  .opts<Options>();

const plan: Plan = {
  ...PLAN,
  seeds,
  teacher: { ...PLAN.teacher, steps: teacherSteps },
  adaptation: { ...PLAN.adaptation, steps },
};
const results = await reproduce(plan, { data, work, print: (line) => console.log(line) });
await writeReport(out, results, plan, originOf());
for (const { text, seen, because } of claimsOf(results, plan)) console.log(`${seen ? 'seen' : 'NOT SEEN'}: ${text} ${because}`);
console.log(`Written: ${relative(process.cwd(), join(out, 'reproduction.md'))}`);

function originOf(): Origin {
  const { threads, kernels } = cpuInfo();
  const given = process.argv.slice(2);
  return {
    command: ['npm run reproduce:fashion-mnist', ...(given.length > 0 ? ['--', ...given] : [])].join(' '),
    machine: `${threads} threads of ${cpus()[0]?.model.trim() ?? 'an unknown processor'} (${kernels} kernels, Node.js ${process.version})`,
    date: new Date().toISOString().slice(0, 10),
    commit:
      git('rev-parse', '--short', 'HEAD') + (git('status', '--porcelain', '--', 'lib', 'native', 'examples') ? ' with local changes' : ''),
  };
}

function git(...args: string[]): string {
  return spawnSync('git', args, { cwd: root, encoding: 'utf8' }).stdout?.trim() || '';
}
