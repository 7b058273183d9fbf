/** Reading shards with other programs: with the Python code of docs/shards.md, verbatim, and Parquet with Arrow's library. */
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { tableFromIPC } from 'apache-arrow';
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { copyFile, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { ParquetFile, readParquet } from 'parquet-wasm';
import { FORMATS } from '../lib/shards/formats/index.js';
import { FolderOutput } from '../lib/shards/output.js';
import { Spool } from '../lib/shards/spool.js';
import { fromStored } from '../lib/shards/store.js';
import { encodeToShards, openShards, openSource, UniFlow, type RunOptions, type ShardSample } from '../lib/index.js';
import { ArrayFile } from '../lib/io/arrays.js';
import { photos, root } from './support.js';

const formats = ['safetensors', 'npy', 'tar', 'parquet'] as const;
const stores = ['float32', 'float16', 'bfloat16'] as const;
const fits = ['crop', 'native'] as const;
type Run = [format: (typeof formats)[number], store: (typeof stores)[number], fit: (typeof fits)[number]];
const runs = formats.flatMap((format) => stores.flatMap((store) => fits.map((fit): Run => [format, store, fit])));

/** Six photographs in four shards of two. The second shard has no files, because both of its images are damaged. */
const names = ['brook.jpg', 'brushes.jpg', 'broken-1.jpg', 'broken-2.jpg', 'dandelion.jpg', 'dogs.jpg', 'fig.jpg', 'über "Berge" 山.jpg'];

let dir: string;
let uniflow: UniFlow;
let interpreter: string;
const inDir = (...parts: string[]): string => join(dir, ...parts);
/** Folder of a run, with the name used in the documentation. */
const folderOf = (...run: Run): string => inDir(run.join('-'), 'folder');

async function samplesOf(folder: string): Promise<ShardSample[]> {
  const samples: ShardSample[] = [];
  for await (const sample of await openShards(folder)) samples.push(sample);
  return samples;
}

const shardsIn = async (folder: string, ending: string): Promise<string[]> =>
  (await readdir(folder)).filter((name) => name.startsWith('shard-') && name.endsWith(ending)).sort();

/** Runs a program in the folder, with ASCII as the default text encoding. @returns its output lines, parsed as JSON. */
async function python(program: string, cwd: string): Promise<any[]> {
  const env = { ...process.env, LC_ALL: 'C', PYTHONUTF8: '0', PYTHONCOERCECLOCALE: '0', PYTHONPATH: inDir('modules') };
  const { stdout } = await promisify(execFile)(interpreter, ['-c', program], { cwd, env });
  return stdout.split('\n').filter(Boolean).map((line) => JSON.parse(line) as unknown); // prettier-ignore
}

/** The documentation's code for reading a format. */
async function documented(format: Run[0]): Promise<string> {
  const text = await readFile(join(root, 'docs', 'shards.md'), 'utf8');
  const found = [...text.matchAll(/^```python\n(.*?)^```/gms)].map(([, code]) => code!).filter((code) => code.includes(`.${format}")):`));
  expect(found).toHaveLength(1);
  return found[0]!;
}

/** A substitute for pyarrow, which the tests cannot install: it returns the rows read by {@link readRows} in pyarrow's form. */
const pyarrow = `
import base64, json, types
class ParquetFile:
    def __init__(self, path):
        self.file = json.load(open(f"{path}.json", "rb"))
        self.metadata = types.SimpleNamespace(metadata={key.encode(): value.encode() for key, value in self.file["metadata"].items()})
    def iter_batches(self, batch_size):
        for row in self.file["rows"]:
            decoded = {name: base64.b64decode(row[name]) for name in ("latents", "tokens")}
            yield types.SimpleNamespace(to_pylist=lambda: [row | decoded])
`;

async function readRows(path: string) {
  const table = tableFromIPC(readParquet(new Uint8Array(await readFile(path))).intoIPCStream());
  return { schema: table.schema, rows: table.toArray().map((row) => row.toJSON() as Record<string, any>) };
}

async function writeRows(path: string): Promise<void> {
  const { schema, rows } = await readRows(path);
  const text = rows.map((row) => ({ ...row, ...Object.fromEntries(['latents', 'tokens'].map((name) => [name, base64(row[name])])) }));
  await writeFile(`${path}.json`, JSON.stringify({ metadata: Object.fromEntries(schema.metadata), rows: text }));
}
const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64');

const sha256 = ({ buffer, byteOffset, byteLength }: ArrayBufferView): string =>
  createHash('sha256').update(new Uint8Array(buffer, byteOffset, byteLength)).digest('hex'); // prettier-ignore

beforeAll(async () => {
  interpreter = (await import(join(root, 'scripts', 'system.mjs'))).pythonWithNumpy();
  dir = await mkdtemp(join(tmpdir(), 'uniflow-shards-'));
  uniflow = UniFlow.random('nano');
  for (const name of names)
    if (name.startsWith('broken')) await writeFile(inDir(name), 'not a picture');
    else await copyFile(join(photos, name.includes('Berge') ? 'mountains.jpg' : name), inDir(name));
  await writeFile(inDir('list.txt'), names.join('\n'));
  await mkdir(inDir('modules', 'pyarrow'), { recursive: true });
  await writeFile(inDir('modules', 'pyarrow', 'parquet.py'), pyarrow);
  for (const [format, store, fit] of runs) {
    const options: RunOptions = { format, store, fit, tokens: true, shardSize: 2, batchSize: 2 };
    await encodeToShards(uniflow, openSource(inDir('list.txt')), folderOf(format, store, fit), options);
  }
});
afterAll(async () => {
  await uniflow.dispose();
  await rm(dir, { recursive: true, force: true });
});

test.each(runs)('%s of %s, fit %s: the documented Python gives what openShards gives', async (...run) => {
  const [format] = run;
  const folder = folderOf(...run);
  if (format === 'parquet') for (const name of await shardsIn(folder, '.parquet')) await writeRows(join(folder, name));
  const show = `
import hashlib, json
def show(record, values):
    print(json.dumps([record["id"], values.shape, hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()]))
`;
  const code = await documented(format);
  const indent = /\n( +)[^\n]*\n$/.exec(code)![1]!;
  const latents = `${code}${indent}show(record, latents)\n`;
  const read = await python(show + latents + latents.replaceAll('latents', 'tokens'), join(folder, '..'));
  const samples = await samplesOf(folder);
  expect(samples.map(({ id }) => id)).toEqual(names.filter((name) => !name.startsWith('broken')));
  const expected = (['latents', 'tokens'] as const).map((name) =>
    samples.map((sample) => [sample.id, sample[name]!.shape, sha256(sample[name]!.data)]),
  );
  expect(read).toEqual(expected.flat());
});

/** Writes a shard of images with one float32 vector each, with the contents `bytes`. */
async function writeShard(format: Run[0], ids: string[], bytes: Buffer): Promise<string> {
  const rows = await Spool.open(inDir('scratch'));
  await rows.write(bytes, 0);
  const pictures = ids.map((id) => ({ id, width: 1, height: 1, grid: { rows: 1, cols: 1 } }));
  const arrays = [{ name: 'latents' as const, type: 'float32' as const, width: bytes.length / 4 / ids.length, rows }];
  const offsets = [...ids.keys(), ids.length];
  const [file] = FORMATS[format].files({
    stem: 'shard',
    fileOf: () => `shard.${format}`,
    model: '',
    store: 'float32',
    pictures,
    offsets,
    arrays,
    uniform: true,
  });
  await new FolderOutput(dir).write(file!.name, file!.chunks);
  await rows.close();
  return inDir(file!.name);
}

describe('as the formats are specified', () => {
  test.each(fits)('safetensors, fit %s: an aligned header, arrays without holes, grids', async (fit) => {
    const folder = folderOf('safetensors', 'bfloat16', fit);
    const read = await python(
      `
import json, pathlib
for path in sorted(pathlib.Path(".").glob("shard-*.safetensors")):
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin].decode("utf-8"))
    metadata = header.pop("__metadata__")
    lists = [json.loads(line) for line in open(path.with_suffix(".jsonl"), "rb")]
    end = 0
    for array in sorted(header.values(), key=lambda array: array["data_offsets"]):
        size = {"I32": 4, "BF16": 2}[array["dtype"]]
        for n in array["shape"]: size *= n
        assert array["data_offsets"] == [end, end + size]
        end += size
    assert data[8:9] == b"{" and begin % 8 == 0 and begin + end == len(data)
    first = header["grids"]["data_offsets"][0]
    grids = [int.from_bytes(data[i : i + 4], "little") for i in range(begin + first, begin + header["grids"]["data_offsets"][1], 4)]
    assert grids == [n for line in lists for n in (line["grid"]["rows"], line["grid"]["cols"])]
    assert json.loads(metadata["ids"]) == [line["id"] for line in lists]
    print(json.dumps({name: array["shape"] for name, array in header.items()}))
`,
      folder,
    );
    const samples = await samplesOf(folder);
    const expected = [0, 2, 4].map((begin) => {
      const vectors = samples.slice(begin, begin + 2).reduce((sum, { grid }) => sum + grid.rows * grid.cols, 0);
      const shape = fit === 'crop' ? [2, 16] : [vectors];
      return { grids: [2, 2], latents: [...shape, 16], tokens: [...shape, 64] };
    });
    expect(read).toEqual(expected);
  });

  test('npy: version 1.0, elements at a multiple of 64, mapped as they are read', async () => {
    const read = await python(
      `
import json, pathlib, numpy as np
for path in sorted(pathlib.Path(".").glob("shard-*.npy")):
    with open(path, "rb") as file: version = np.lib.format.read_magic(file)
    mapped, z = np.load(path, mmap_mode="r"), np.load(path)
    assert version == (1, 0) and mapped.offset % 64 == 0 and np.array_equal(mapped, z)
    assert path.stat().st_size == mapped.offset + z.nbytes
    print(json.dumps([path.name, z.dtype.str, z.shape]))
`,
      folderOf('npy', 'bfloat16', 'crop'),
    );
    expect(read).toEqual(
      ['shard-000000', 'shard-000002', 'shard-000003'].flatMap((stem) => [
        [`${stem}.latents.npy`, '<u2', [2, 16, 16]],
        [`${stem}.tokens.npy`, '<u2', [2, 16, 64]],
      ]),
    );
  });

  test('tar: samples as WebDataset groups them, each key once in a run; no times, no owners', async () => {
    const read = await python(
      `
import itertools, json, pathlib, tarfile
for path in sorted(pathlib.Path(".").glob("shard-*.tar")):
    with tarfile.open(path, format=tarfile.USTAR_FORMAT) as tar:
        members = tar.getmembers()
    assert all(m.isreg() and (m.mode, m.mtime, m.uid, m.gid, m.uname, m.gname) == (0o644, 0, 0, 0, "", "") for m in members)
    assert path.read_bytes()[-1024:] == bytes(1024) and path.stat().st_size % 512 == 0
    for key, group in itertools.groupby(members, lambda m: m.name.partition(".")[0]):
        print(json.dumps([key, [m.name.partition(".")[2] for m in group]]))
`,
      folderOf('tar', 'float16', 'native'),
    );
    const keys = ['000000', '000002', '000003'].flatMap((shard) => [`${shard}-000000`, `${shard}-000001`]);
    expect(read).toEqual(keys.map((key) => [key, ['json', 'latents.npy', 'tokens.npy']]));
  });

  test.each(runs.filter(([format]) => format === 'parquet'))('%s of %s, fit %s: types and values', async (...run) => {
    const [, store, fit] = run;
    const folder = folderOf(...run);
    const samples = await samplesOf(folder);
    for (const [i, name] of (await shardsIn(folder, '.parquet')).entries()) {
      const { schema, rows } = await readRows(join(folder, name));
      expect(schema.metadata).toEqual(new Map(Object.entries({ dtype: store, model: '', 'latents.width': '16', 'tokens.width': '64' })));
      expect(schema.fields.map(({ name, type, nullable }) => [name, String(type), nullable])).toEqual([
        ['id', 'Utf8', false],
        ...['width', 'height', 'rows', 'cols'].map((name) => [name, 'Int32', false]),
        ...['crop', 'padding'].map((name) => [name, 'Utf8', true]),
        ...['latents', 'tokens'].map((name) => [name, 'Binary', false]),
      ]);
      expect(rows).toHaveLength(2);
      for (const [row, { latents, tokens, crop, ...of }] of rows.entries()) {
        const { id, width, height, grid, ...sample } = samples[2 * i + row]!;
        expect(of).toEqual({ id, width, height, ...grid, padding: null });
        expect(JSON.parse(crop ?? 'null')).toEqual(fit === 'crop' ? sample.crop : null);
        expect(sha256(await fromStored(latents, store))).toBe(sha256(sample.latents!.data));
        expect(sha256(await fromStored(tokens, store))).toBe(sha256(sample.tokens!.data));
      }
    }
  });

  test('Parquet of many pages in two row groups', async () => {
    const [count, row] = [40, 500_000]; // bytes per image; a row group has at most 16 MiB
    const bytes = Buffer.alloc(count * row, Buffer.from(names.join()));
    const ids = Array.from({ length: count }, (_, i) => `${i}`);
    const path = await writeShard('parquet', ids, bytes);
    const file = await ParquetFile.fromFile(new Blob([await readFile(path)]));
    expect(file.metadata().rowGroups().map((group) => group.numRows())).toEqual([33, 7]); // prettier-ignore
    const { rows } = await readRows(path);
    expect(rows.map(({ id }) => id)).toEqual(ids);
    expect(Buffer.concat(rows.map(({ latents }) => latents)).equals(bytes)).toBe(true);
  });

  test('a header of safetensors has 100 MB at most: more ids than that are in the list of pictures only', async () => {
    const longest = 'x'.repeat(5e7);
    const path = await writeShard('safetensors', [longest, longest], Buffer.from(Float32Array.of(1, 2).buffer));
    const file = new ArrayFile(path);
    expect(file.metadata).toEqual({ grid: '1x1', model: '' });
    expect([...(await file.read('latents')).data]).toEqual([1, 2]);
  });
});

describe('what is known of a run', () => {
  test('statistics are those of NumPy over all latents, whatever they are stored as', async () => {
    const folder = folderOf('npy', 'float32', 'native');
    const [read] = await python(
      `
import json, pathlib, numpy as np
z = np.concatenate([np.load(path).astype("f8") for path in sorted(pathlib.Path(".").glob("shard-*.latents.npy"))])
data = pathlib.Path("latent_stats.safetensors").read_bytes()
begin = 8 + int.from_bytes(data[:8], "little")
header = json.loads(data[8:begin])
metadata = header.pop("__metadata__")
stored = {}
for name, array in header.items():
    assert array["dtype"] == "F64" and array["shape"] == [16]
    stored[name] = np.frombuffer(data[begin:][slice(*array["data_offsets"])], "<f8")
error = {"mean": abs(stored["mean"] - z.mean(0)) / z.std(0), "variance": abs(stored["variance"] / z.var(0) - 1)}
assert max(error["mean"].max(), error["variance"].max()) < 1e-12
print(json.dumps([len(z), metadata, {name: list(array) for name, array in stored.items()}]))
`,
      folder,
    );
    const { manifest } = await openShards(folder);
    const { count, ...statistics } = manifest.statistics!;
    expect(read).toEqual([count, { count: `${count}`, data: manifest.sha256, model: manifest.header.model.sha256 }, statistics]);
    for (const store of stores)
      expect((await openShards(folderOf('tar', store, 'native'))).manifest.statistics).toEqual(manifest.statistics);
  });

  test('the manifest names every file with its bytes and sha256, and the data with one', async () => {
    const [read] = await python(
      `
import hashlib, json, pathlib
manifest = json.load(open("manifest.json", "rb"))
files = [file for shard in manifest["shards"] for file in shard["files"]]
for file in files:
    data = pathlib.Path(file["name"]).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
assert hashlib.sha256(b"".join(bytes.fromhex(file["sha256"]) for file in files)).hexdigest() == manifest["sha256"]
assert sorted(file["name"] for file in files) == sorted(path.name for path in pathlib.Path(".").glob("shard-*"))
failures = [json.loads(line) for line in open("failures.jsonl", "rb")]
print(json.dumps([len(files), manifest["count"], manifest["failures"], [failure["id"] for failure in failures]]))
`,
      folderOf('npy', 'float16', 'crop'),
    );
    expect(read).toEqual([9, 6, 2, ['broken-1.jpg', 'broken-2.jpg']]);
  });
});
