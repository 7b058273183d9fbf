/** Embeddings: one vector per image, against transformers' own heads, and `uniflow embed`. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { Field, FixedSizeList, Float32, Schema, Table, tableFromIPC, tableToIPC, Utf8 } from 'apache-arrow';
import ndarray, { type NdArray } from 'ndarray';
import { execFile } from 'node:child_process';
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { promisify } from 'node:util';
import { readParquet } from 'parquet-wasm';
import sharp from 'sharp';
import { decodeImage, embedToFile, UniFlow, VisionEncoder } from '../lib/index.js';
import { readNpy } from '../lib/io/npy.js';
import { arrowSchema } from '../lib/shards/embeddings-parquet.js';
import { failure, fixtures, golden, photos, readTensors, relativeL2, root, startCommand, tolerances } from './support.js';

const checkpoint = (name: string): string => join(fixtures, 'checkpoints', name);
const photo = (name: string): string => join(photos, `${name}.jpg`);
const lengths = ({ data, shape }: NdArray<Float32Array>): number[] =>
  Array.from({ length: shape[0]! }, (_, i) => Math.hypot(...data.subarray(i * shape[1]!, (i + 1) * shape[1]!)));

/** A copy of a checkpoint in which a tensor has another name, of the same length. */
async function withoutTensor(folder: string, name: string): Promise<string> {
  const copy = join(dir, name);
  await cp(folder, copy, { recursive: true });
  const weights = join(copy, 'model.safetensors');
  const text = (await readFile(weights)).toString('latin1');
  await writeFile(weights, text.replace(`"${name}"`, `"${name.slice(0, -1)}_"`), 'latin1');
  return copy;
}

let dir: string;
beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), 'uniflow-embed-'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

describe('the pooling head of a checkpoint', () => {
  describe.each(['siglip-base', 'clip-projection', 'clip-tower'])('%s', (name) => {
    test.each(['float32', 'bfloat16'] as const)('gives what transformers does, in %s', async (dtype) => {
      const expected = await readTensors(join(checkpoint(name), 'golden.safetensors'));
      await using encoder = await VisionEncoder.load(checkpoint(name), { dtype });
      expect(encoder.defaultPool).toBe('head');
      const sizes = Object.keys(expected).flatMap((key) => /^pooled\.(.+)$/.exec(key)?.[1] ?? []);
      expect(sizes.length).toBeGreaterThan(1);
      for (const size of sizes) {
        const vectors = await encoder.embed({ pixels: expected[`pixels.${size}`]! }, { normalize: false });
        expect(relativeL2(vectors, expected[`pooled.${size}`]!)).toBeLessThan(tolerances[dtype]);
      }
    });
  });

  test('is written by save as it was, used or not', async () => {
    await using encoder = await VisionEncoder.load(checkpoint('siglip-base'));
    const before = await encoder.embed(photo('dogs'));
    await encoder.save(join(dir, 'saved'));
    await using saved = await VisionEncoder.load(join(dir, 'saved'));
    expect((await saved.embed(photo('dogs'))).data).toEqual(before.data);
  });
});

describe('embed', () => {
  test('pools the tokens of encode: the class token, or the mean of the patches', async () => {
    await using encoder = await VisionEncoder.load(golden('dinov2-registers'));
    const images = [photo('dogs'), photo('fig')];
    const { lastHiddenState: last } = await encoder.encode(images);
    const [, tokens, width] = last.shape as [number, number, number];
    const cls = await encoder.embed(images, { pool: 'cls', normalize: false });
    const mean = await encoder.embed(images, { pool: 'mean', normalize: false });
    expect([cls.shape, mean.shape]).toEqual([
      [2, width],
      [2, width],
    ]);
    const patches = tokens - encoder.prefixTokens;
    for (const image of [0, 1])
      for (let d = 0; d < width; d++) {
        expect(cls.get(image, d)).toBe(last.get(image, 0, d));
        let sum = 0;
        for (let n = encoder.prefixTokens; n < tokens; n++) sum += last.get(image, n, d);
        expect(mean.get(image, d)).toBeCloseTo(sum / patches, 5);
      }
    expect(encoder.defaultPool).toBe('cls');
    expect((await encoder.embed(images, { normalize: false })).data).toEqual(cls.data);
  });

  test('gives vectors of length 1, in the direction of the others', async () => {
    await using encoder = await VisionEncoder.load(golden('dinov3'));
    const images = [photo('dogs'), photo('fig'), photo('brook')];
    const [vectors, raw] = [await encoder.embed(images), await encoder.embed(images, { normalize: false })];
    const norms = lengths(raw);
    for (const length of lengths(vectors)) expect(length).toBeCloseTo(1, 5);
    vectors.data.forEach((value, i) => expect(value).toBeCloseTo(raw.data[i]! / norms[Math.floor(i / raw.shape[1]!)]!, 5));
  });

  test('gives an image the same vector in every batch', async () => {
    await using encoder = await VisionEncoder.load(checkpoint('siglip-base'));
    const images = ['dogs', 'fig', 'brook', 'brushes', 'dandelion'].map(photo);
    const one = await encoder.embed(images, { batchSize: 1 });
    const all = await encoder.embed(images, { batchSize: 5 });
    expect(relativeL2(all, one)).toBeLessThan(tolerances.batch);
  });

  test('takes the mean of the tokens of a UniFlow model', async () => {
    await using uniflow = await UniFlow.load(golden('uniflow-tiny'));
    const { tokens } = await uniflow.encode(photo('dogs'), { tokens: true });
    const vector = await uniflow.embed(photo('dogs'), { normalize: false });
    const [, patches, width] = tokens!.shape as [number, number, number];
    for (let d = 0; d < width; d++) {
      let sum = 0;
      for (let n = 0; n < patches; n++) sum += tokens!.get(0, n, d);
      expect(vector.get(0, d)).toBeCloseTo(sum / patches, 5);
    }
  });

  test('says which pools a model has if it lacks the one asked for', async () => {
    await using siglip = await VisionEncoder.load(checkpoint('siglip-base'));
    expect((await failure(siglip.embed(photo('dogs'), { pool: 'cls' }))).message).toBe(
      "pool: expected 'mean', as this siglip model has no class token, but got 'cls'",
    );
    await using uniflow = await UniFlow.load(golden('uniflow-tiny'));
    const error = await failure(uniflow.embed(photo('dogs'), { pool: 'head' }));
    expect(error).toMatchObject({ code: 'UNSUPPORTED', subject: 'pool' });
    expect(error.message).toContain("'cls' or 'mean', as this internvit model has no pooling head");
    expect((await failure(uniflow.embed(photo('dogs'), { pool: 'max' as 'mean' }))).message).toContain('cls, mean, head');
    expect((await failure(uniflow.embed(photo('dogs'), { tokens: true } as object))).message).toContain("'tokens'");
  });

  test('names the tensors that a head lacks, when it is asked for', async () => {
    await using encoder = await VisionEncoder.load(await withoutTensor(checkpoint('siglip-base'), 'head.mlp.fc1.weight'));
    expect((await encoder.embed(photo('dogs'), { pool: 'mean' })).shape).toEqual([1, encoder.config.width]);
    const error = await failure(encoder.embed(photo('dogs')));
    expect(error.code).toBe('BAD_CHECKPOINT');
    expect(error.message).toContain('head.mlp.fc1.weight: missing');
  });
});

describe('uniflow embed', () => {
  const names = ['brook', 'brushes', 'dandelion', 'dogs', 'fig', 'mountains'];
  const model = checkpoint('siglip-base');
  let expected: NdArray<Float32Array>;
  beforeAll(async () => {
    await using encoder = await VisionEncoder.load(model);
    expected = await encoder.embed(names.map(photo));
    await writeFile(join(dir, 'broken.jpg'), 'not an image');
  });

  test('writes an npy, and the ids beside it, and reports images that cannot be read', async () => {
    const out = join(dir, 'vectors.npy');
    const inputs = [...names.slice(0, 3).map(photo), join(dir, 'broken.jpg'), ...names.slice(3).map(photo)];
    const { code, stdout, stderr } = await startCommand(['embed', ...inputs, '-m', model, '-o', out, '--batch', '2']).ended;
    expect(stderr).toContain(`uniflow: ${join(dir, 'broken.jpg')}: expected a JPEG`);
    expect({ code, stdout }).toEqual({
      code: 1,
      stdout: `6 images as vectors [6, 48] in ${out}, ${join(dir, 'vectors.ids.json')} (1 failed)\n`,
    });
    expect(relativeL2(await readNpy(out), expected)).toBeLessThan(tolerances.batch);
    expect(JSON.parse(await readFile(join(dir, 'vectors.ids.json'), 'utf8'))).toEqual({
      ids: names.map(photo),
      ...{ model, pool: 'head', normalized: 'true' },
    });
  });

  test('writes Parquet that Arrow reads as lists of fixed size, in several row groups', async () => {
    const items = Array.from({ length: 50 }, (_, i) => ({ id: `${i}`, image: photo(names[i % names.length]!) }));
    await using encoder = await VisionEncoder.load(model);
    const out = join(dir, 'vectors.parquet');
    await embedToFile(encoder, items, out, { model: 'a model' });
    const table = tableFromIPC(readParquet(new Uint8Array(await readFile(out))).intoIPCStream());
    expect(String(table.schema.fields[1]!.type)).toBe('FixedSizeList[48]<Float32>');
    expect([...table.getChild('id')!]).toEqual(items.map(({ id }) => id));
    const vectors = table.getChild('embedding')!;
    for (const i of [0, 5, 49]) {
      const vector = Float32Array.from(vectors.get(i) as Iterable<number>);
      const row = names.indexOf(names[i % names.length]!);
      expect(relativeL2(ndarray(vector, [48]), ndarray(expected.data.slice(48 * row, 48 * (row + 1)), [48]))).toBeLessThan(
        tolerances.batch,
      );
    }
    expect(table.schema.metadata.get('pool')).toBe('head');
  });

  test('describes the lists in the schema message that apache-arrow writes', () => {
    const element = new Field('element', new Float32(), false);
    const schema = new Schema([new Field('id', new Utf8(), false), new Field('embedding', new FixedSizeList(768, element), false)]);
    const stream = Buffer.from(tableToIPC(new Table(schema), 'stream'));
    expect(arrowSchema(768)).toBe(stream.subarray(0, 8 + stream.readInt32LE(4)).toString('base64'));
  });

  test('takes the bundled model, and gives the mean of its tokens', async () => {
    const out = join(dir, 'bundled.npy');
    const run = await startCommand(['embed', photo('dogs'), '-o', out, '--no-normalize', '--json']).ended;
    expect(JSON.parse(run.stdout)).toMatchObject({ images: 1, failed: [], files: [out, join(dir, 'bundled.ids.json')] });
    await using uniflow = await UniFlow.load();
    const vectors = await uniflow.embed(photo('dogs'), { pool: 'mean', normalize: false });
    expect(relativeL2(await readNpy(out), vectors)).toBeLessThan(tolerances.batch);
  });

  test('writes nothing if the model lacks the pool, or the file is of another kind', async () => {
    const cls = await startCommand(['embed', photo('dogs'), '-m', model, '-o', join(dir, 'none.npy'), '--pool', 'cls']).ended;
    expect(cls.code).toBe(1);
    expect(cls.stderr).toContain("uniflow: pool: expected 'mean', as this siglip model has no class token, but got 'cls'\n");
    const text = await startCommand(['embed', photo('dogs'), '-m', model, '-o', join(dir, 'none.csv')]).ended;
    expect(text.code).toBe(2);
    expect(text.stderr).toContain('a name ending in .npy, .parquet');
    expect((await readdir(dir)).filter((name) => name.startsWith('none'))).toEqual([]);
  });
});

test('the nearest photograph to a crop of one is the one it is cut from', async () => {
  const names = ['brook', 'brushes', 'dandelion', 'dogs', 'fig', 'mountains'];
  await using uniflow = await UniFlow.load();
  const all = await uniflow.embed(names.map(photo));
  const width = all.shape[1]!;
  const dot = (a: Float32Array, row: number): number => a.reduce((sum, x, i) => sum + x * all.data[row * width + i]!, 0);
  for (const [i, name] of names.entries()) {
    const whole = await decodeImage(photo(name));
    const part = { left: whole.width >> 3, top: whole.height >> 3, width: (whole.width * 3) >> 2, height: (whole.height * 3) >> 2 };
    const crop = await uniflow.embed(await sharp(photo(name)).rotate().extract(part).png().toBuffer());
    const scores = names.map((_, row) => dot(crop.data, row));
    expect(scores.indexOf(Math.max(...scores))).toBe(i);
  }
});

// Slow: npm installs LanceDB (112 MB), which is not among the dependencies.
test('the recipe for LanceDB in docs/embeddings.md finds the photograph that it searches for', async () => {
  const docs = await readFile(join(root, 'docs', 'embeddings.md'), 'utf8');
  const [, install] = /npm install (@lancedb.+)/.exec(docs)!;
  const [, recipe] = /```js\n(import \* as lancedb.+?)```/s.exec(docs)!;
  const folder = join(dir, 'lance');
  await cp(photos, join(folder, 'photos'), { recursive: true });
  await writeFile(
    join(folder, 'recipe.mjs'),
    recipe!.replace("'uniflow-tokenizer'", JSON.stringify(pathToFileURL(join(root, 'lib', 'index.ts')).href)),
  );
  const run = promisify(execFile);
  await run('npm', ['install', '--no-audit', '--no-fund', '--prefer-offline', ...install!.split(' ')], { cwd: folder });
  const tsx = import.meta.resolve('tsx');
  const { stdout } = await run(process.execPath, ['--import', tsx, 'recipe.mjs', 'photos/fig.jpg'], { cwd: folder });
  const [first, second] = stdout
    .trim()
    .split('\n')
    .map((line) => line.split(' '));
  expect(first).toEqual(['0.0000', 'photos/fig.jpg']);
  expect(Number(second![0])).toBeGreaterThan(0.05);
}, 300_000);
