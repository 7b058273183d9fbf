/** Half of oracle.py: VisionEncoder on its folders. Prints what differs, by folder, as JSON; leaves what `save` writes in the folder `saved`. */
import type { NdArray } from 'ndarray';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { setThreads, VisionEncoder } from '../../lib/index.js';
import { ArrayFile } from '../../lib/io/arrays.js';

const TOLERANCE = 2e-4; // relative L2
const photo = join(dirname(fileURLToPath(import.meta.url)), '..', '..', 'examples', 'photos', 'dogs.jpg');

/** ‖a − b‖ / ‖b‖ */
function distance(a: NdArray, b: NdArray): number {
  if (a.shape.join() !== b.shape.join()) return Infinity;
  const [x, y] = [a.data, b.data] as unknown as [Float32Array, Float32Array];
  const sum = (term: (i: number) => number): number => y.reduce((total, _, i) => total + term(i) ** 2, 0);
  return Math.sqrt(sum((i) => x[i]! - y[i]!) / sum((i) => y[i]!));
}

async function problemsOf(folder: string): Promise<string[]> {
  const encoder = await VisionEncoder.load(folder);
  try {
    const golden = new ArrayFile(join(folder, 'golden.safetensors'));
    const problems: string[] = [];
    const compare = async (name: string, actual: NdArray | undefined): Promise<void> => {
      const off = actual ? distance(actual, await golden.read(name)) : Infinity;
      if (!(off < TOLERANCE)) problems.push(`${name} is ${off.toPrecision(3)} off`);
    };
    for (const size of golden.names.flatMap((name) => /^pixels\.(.+)$/.exec(name)?.[1] ?? [])) {
      const out = await encoder.encode({ pixels: await golden.read(`pixels.${size}`) }, { hiddenStates: true });
      await compare(`last.${size}`, out.lastHiddenState);
      if (golden.names.includes(`pooled.${size}`))
        await compare(`pooled.${size}`, await encoder.embed({ pixels: await golden.read(`pixels.${size}`) }, { normalize: false }));
      const states = golden.names.filter((name) => name.startsWith(`h.${size}.`));
      if (states.length !== out.hiddenStates!.length)
        problems.push(`${size}: ${out.hiddenStates!.length} hidden states, not ${states.length}`);
      for (const name of states) await compare(name, out.hiddenStates![Number(name.split('.').at(-1))]);
    }
    if (golden.names.includes('photo')) await compare('photo', (await encoder.encode(photo)).lastHiddenState);
    await encoder.save(join(folder, 'saved'));
    return problems;
  } finally {
    await encoder.dispose();
  }
}

setThreads(1); // the models are tiny
const report: Record<string, string[]> = {};
for (const folder of process.argv.slice(2))
  report[folder] = await problemsOf(folder).catch((error: unknown) => [`refused: ${(error as Error).message}`]);
process.stdout.write(JSON.stringify(report));
