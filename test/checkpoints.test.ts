/** Published checkpoints unchanged: their configs, names and processors, against transformers' values (scripts/oracle generates more). */
import { afterAll, beforeAll, describe, expect, jest, test } from '@jest/globals';
import ndarray, { type NdArray } from 'ndarray';
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { evaluate, openDataset, setThreads, Trainer, UniFlow, UniFlowError, VisionEncoder } from '../lib/index.js';
import { defaultPreprocessing } from '../lib/io/preprocess.js';
import { applyProcessor } from '../lib/io/processor.js';
import { failure, fixtures, golden, photos, readTensors, relativeL2, tolerances } from './support.js';

jest.setTimeout(120_000); // for busy machines

type Json = Record<string, unknown>;
const checkpoint = (name: string): string => join(fixtures, 'checkpoints', name);
const readJson = async (path: string): Promise<Json> => JSON.parse(await readFile(path, 'utf8')) as Json;

let dir: string;
beforeAll(async () => {
  setThreads(1);
  dir = await mkdtemp(join(tmpdir(), 'uniflow-checkpoints-'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

let copies = 0;
/** A copy of a checkpoint folder with changed fields in a JSON file; null is written as null. */
async function changed(source: string, fields: Json, file = 'config.json'): Promise<string> {
  const folder = join(dir, `copy-${copies++}`);
  await cp(source, folder, { recursive: true });
  const json = file === 'config.json' ? await readJson(join(folder, file)) : {};
  await writeFile(join(folder, file), JSON.stringify({ ...json, ...fields }));
  return folder;
}

async function loaded<T>(folder: string, use: (encoder: VisionEncoder) => Promise<T> | T): Promise<T> {
  const encoder = await VisionEncoder.load(folder);
  try {
    return await use(encoder);
  } finally {
    await encoder.dispose();
  }
}

/** Compares all hidden states of all sizes in the golden file. */
async function agrees(encoder: VisionEncoder, folder: string): Promise<void> {
  const expected = await readTensors(join(folder, 'golden.safetensors'));
  const sizes = Object.keys(expected).flatMap((name) => /^pixels\.(.+)$/.exec(name)?.[1] ?? []);
  expect(sizes.length).toBeGreaterThan(1);
  for (const size of sizes) {
    const out = await encoder.encode({ pixels: expected[`pixels.${size}`] as NdArray }, { hiddenStates: true });
    out.hiddenStates!.forEach((h, i) => expect(relativeL2(h, expected[`h.${size}.${i}`]!)).toBeLessThan(tolerances.float32));
    expect(relativeL2(out.lastHiddenState, expected[`last.${size}`]!)).toBeLessThan(tolerances.float32);
  }
}

describe('loads with the hidden states of transformers', () => {
  test.each([
    ['clip-full-dump', 'a vision_config with every field that transformers has'],
    ['dinov2-cls', 'tensors of a classifier, with dinov2. in front'],
    ['dinov3-noreg', 'register tokens without elements'],
    ['dinov3-proc-nulls', 'nulls in preprocessor_config.json'],
    ['internvl-nomean', 'a final norm, as there is no mean pooling'],
    ['ivit-chat3', 'a mixture of experts that is off'],
    ['siglip-so400m384', 'a size that patches do not fill'],
  ])('%s: %s', async (name) => {
    await loaded(checkpoint(name), (encoder) => agrees(encoder, checkpoint(name)));
  });

  test.each(['module.', '_orig_mod.', 'model.', 'module._orig_mod.encoder.'])('loads names with the prefix %s', async (prefix) => {
    const folder = await changed(checkpoint('internvl-nomean'), {});
    await rename(join(folder, 'model.safetensors'), (name) => prefix + name);
    await loaded(folder, (encoder) => agrees(encoder, folder));
  });

  test('loads a UniFlow whose names have the prefix module.', async () => {
    const folder = await changed(golden('uniflow-tiny'), {});
    await rename(join(folder, 'model.safetensors'), (name) => `module.${name}`);
    const [uniflow, plain] = [await UniFlow.load(folder), await UniFlow.load(golden('uniflow-tiny'))];
    const pixels = (await readTensors(join(folder, 'golden.safetensors')))['pixels']!;
    expect((await uniflow.encode({ pixels })).latents).toEqual((await plain.encode({ pixels })).latents);
    for (const model of [uniflow, plain]) await model.dispose();
  });

  test('preprocesses an image with processor_config.json at the size of the position table', async () => {
    const expected = new Float32Array((await readFile(join(checkpoint('clip-processor-v5'), 'dogs-last-hidden-state.f32'))).buffer);
    const { lastHiddenState } = await loaded(checkpoint('clip-processor-v5'), (encoder) =>
      encoder.encode(join(photos, 'dogs.jpg'), { size: 64 }),
    );
    expect(relativeL2(lastHiddenState, ndarray(expected, [1, 17, 48]))).toBeLessThan(tolerances.float32);
  });
});

/** Renames the tensors of a safetensors file. */
async function rename(path: string, name: (old: string) => string): Promise<void> {
  const file = await readFile(path);
  const end = 8 + Number(file.readBigUInt64LE());
  const { __metadata__, ...tensors } = JSON.parse(file.toString('utf8', 8, end)) as Json;
  const renamed = Object.fromEntries(Object.entries(tensors).map(([old, entry]) => [name(old), entry]));
  const header = Buffer.from(JSON.stringify({ ...(__metadata__ ? { __metadata__ } : {}), ...renamed }));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  await writeFile(path, Buffer.concat([length, header, file.subarray(end)]));
}

describe('config.json', () => {
  test('treats null as absent', async () => {
    await loaded(await changed(golden('dinov2'), { layer_norm_eps: null, apply_layernorm: null, surprise: null }), (encoder) => {
      expect(encoder.config.eps).toBe(1e-6);
    });
  });

  test.each<[string, string, Json, UniFlowError['code'], RegExp]>([
    ['a mixture of experts that is on', 'ivit-chat3', { vision_config: { use_moe: true } }, 'BAD_CHECKPOINT', /use_moe/],
    ['experts in a family that has none', 'dinov2-cls', { num_experts: 8 }, 'BAD_CHECKPOINT', /num_experts: unknown field/],
    ['pruned heads', 'dinov2-cls', { pruned_heads: { 0: [1] } }, 'BAD_CHECKPOINT', /pruned_heads/],
    ['quantised weights', 'dinov2-cls', { quantization_config: { bits: 4 } }, 'BAD_CHECKPOINT', /quantization_config/],
    ['an image smaller than a patch', 'dinov2-cls', { image_size: 13 }, 'BAD_CHECKPOINT', /image_size: expected at least patch_size 14/],
    ['CLIP without its tower', 'clip-full-dump', { vision_config: undefined }, 'BAD_CHECKPOINT', /vision_config in .*'clip': .*got none/],
    ['SigLIP2 NaFlex', 'siglip-so400m384', { model_type: 'siglip2_vision_model' }, 'UNSUPPORTED', /NaFlex/],
    ['SigLIP2 NaFlex with its text model', 'siglip-so400m384', { model_type: 'siglip2' }, 'UNSUPPORTED', /NaFlex/],
    ['a name that objects have', 'dinov2-cls', { model_type: '__proto__' }, 'UNSUPPORTED', /'__proto__'/],
    ['another such', 'dinov2-cls', { model_type: 'constructor' }, 'UNSUPPORTED', /'constructor'/],
    ['no model type', 'dinov2-cls', { model_type: null }, 'UNSUPPORTED', /model_type/],
  ])('refuses %s', async (_, name, fields, code, about) => {
    const inner = fields['vision_config'] as Json | undefined;
    const own = (await readJson(join(checkpoint(name), 'config.json')))['vision_config'] as Json | undefined;
    const merged = inner ? { ...fields, vision_config: { ...own, ...inner } } : fields;
    const error = await failure(VisionEncoder.load(await changed(checkpoint(name), merged)));
    expect(error).toMatchObject({ code, message: expect.stringMatching(about) });
  });

  test('prefers vision_config_dict when an older CLIP has both', async () => {
    const json = await readJson(join(checkpoint('clip-full-dump'), 'config.json'));
    const folder = await changed(checkpoint('clip-full-dump'), {
      vision_config_dict: json['vision_config'],
      vision_config: { ...(json['vision_config'] as Json), num_hidden_layers: 12 },
    });
    await loaded(folder, (encoder) => agrees(encoder, folder));
  });

  test('lists the tensors present when none fits', async () => {
    const folder = await changed(checkpoint('internvl-nomean'), {});
    await rename(join(folder, 'model.safetensors'), (name) => name.replace('embeddings.', 'stem.'));
    const error = await failure(VisionEncoder.load(folder));
    expect(error.code).toBe('BAD_CHECKPOINT');
    expect(error.message).toMatch(/internvl vision encoder: one tensor embeddings\.patch_embeddings.*60 tensors, among them .*layernorm/);
  });
});

describe('the processor', () => {
  const base = defaultPreprocessing('clip', [64, 64]);
  const apply = (json: Json): ReturnType<typeof applyProcessor> => applyProcessor(base, json, 'file');

  test.each<[string, Json, Partial<ReturnType<typeof apply>>]>([
    ['nothing said: the family', {}, base],
    ['nulls only: the family', { size: null, crop_size: null, do_center_crop: null, do_convert_rgb: null, resample: null }, base],
    [
      'a shortest edge and a crop',
      { size: { shortest_edge: 80 }, do_center_crop: true, crop_size: 64 },
      { edgeRatio: 1.25, size: [64, 64] },
    ],
    ['a number: shortest edge with a crop', { size: 80, do_center_crop: true, crop_size: { height: 64, width: 64 } }, { edgeRatio: 1.25 }],
    ['a number without a crop: a square', { size: 80 }, { mode: 'stretch', size: [80, 80] }],
    ['a height and width', { size: { height: 32, width: 48 } }, { mode: 'stretch', size: [32, 48] }],
    ['with nulls', { size: { height: 32, width: 48, shortest_edge: null } }, { mode: 'stretch', size: [32, 48] }],
    ['the same in a list', { size: [32, 48] }, { mode: 'stretch', size: [32, 48] }],
    ['a crop of everything', { size: { height: 80, width: 80 }, do_center_crop: true, crop_size: 80 }, { mode: 'stretch', size: [80, 80] }],
    ['a filter', { resample: 4 }, { filter: 'box' }],
    ['one mean for all channels', { image_mean: 0.5, image_std: 0.25 }, { mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25] }],
    ['no normalisation', { do_normalize: false }, { mean: [0, 0, 0], std: [1, 1, 1] }],
    [
      'the defaults of its class',
      { image_processor_type: 'SiglipImageProcessorFast' },
      { mode: 'stretch', size: [224, 224], mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5] },
    ],
    [
      'those of an older class',
      { feature_extractor_type: 'CLIPFeatureExtractor' },
      { mode: 'shortest_edge', edgeRatio: 1, size: [224, 224] },
    ],
    ['steps that are off', { crop_to_patches: false, max_patches: 12, do_pad: false, do_reduce_labels: false }, base],
  ])('%s', (_, json, expected) => {
    expect(apply(json)).toEqual({ ...base, ...expected, ...('mode' in expected || !('size' in json) ? {} : { mode: 'shortest_edge' }) });
  });

  test.each<[string, Json]>([
    ['size', { size: { shortest_edge: 64 } }],
    ['size', { size: { shortest_edge: 64, longest_edge: 128 } }],
    ['size', { size: { max_height: 64, max_width: 64 } }],
    ['size', { size: { height: 64, width: 64, longest_edge: 64 } }],
    ['crop_size', { size: 64, do_center_crop: true, crop_size: 80 }],
    ['crop_size', { size: { height: 80, width: 80 }, do_center_crop: true, crop_size: 64 }],
    ['do_resize', { do_resize: false }],
    ['do_rescale', { do_rescale: false }],
    ['rescale_factor', { rescale_factor: 1 }],
    ['do_convert_rgb', { do_convert_rgb: false }],
    ['resample', { resample: 0 }],
    ['crop_pct', { crop_pct: 0.875 }],
    ['do_pad', { do_pad: true }],
    ['crop_to_patches', { crop_to_patches: true }],
    ['surprise', { surprise: 1 }],
    ['image_processor_type', { image_processor_type: 'Siglip2ImageProcessor' }],
    ['image_processor_type', { image_processor_type: 'constructor' }],
  ])('refuses %s of %j', async (name, json) => {
    const error = await failure(Promise.resolve().then(() => apply(json)));
    expect(error).toMatchObject({ code: 'UNSUPPORTED', subject: `file: ${name}` });
  });

  test.each([{ size: 'large' }, { size: 0 }, { image_std: [1, 0, 1] }, { do_resize: 'yes' }])('rejects %j as a mistake', async (json) => {
    expect(await failure(Promise.resolve().then(() => apply(json)))).toMatchObject({ code: 'BAD_CHECKPOINT', subject: 'file' });
  });

  test('of transformers 5 takes precedence over the older file', async () => {
    const folder = await changed(checkpoint('clip-processor-v5'), { image_mean: [0, 0, 0] }, 'preprocessor_config.json');
    await loaded(folder, ({ preprocessing }) => {
      expect(preprocessing).toMatchObject({ mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6], filter: 'bilinear', mode: 'shortest_edge' });
    });
  });

  test('of text only does not affect images', async () => {
    const folder = await changed(golden('clip'), { processor_class: 'CLIPProcessor' }, 'processor_config.json');
    await loaded(folder, ({ preprocessing }) => expect(preprocessing).toEqual(base));
  });

  test('sets the image size of the encoder and of a tokenizer on it', async () => {
    const processor = { size: { shortest_edge: 32 }, do_center_crop: true, crop_size: { height: 28, width: 28 } };
    const folder = await changed(golden('dinov2'), processor, 'preprocessor_config.json');
    await loaded(folder, async (encoder) => {
      const photo = join(photos, 'dogs.jpg');
      expect((await encoder.encode(photo)).grid).toEqual({ rows: 2, cols: 2 });
      const uniflow = UniFlow.fromEncoder(encoder, { latentChannels: 4, globalBlocks: 1, flowBlocks: 1 });
      expect(uniflow.config).toMatchObject({
        imageSize: [28, 28],
        encoder: { imageSize: [56, 56] },
        decoder: { grid: { rows: 2, cols: 2 } },
      });
      await uniflow.save(join(dir, 'at-28'));
      const again = await UniFlow.load(join(dir, 'at-28'));
      expect(again.config).toEqual(uniflow.config);
      expect((await again.encode(photo)).latents).toEqual((await uniflow.encode(photo)).latents);
      for (const model of [uniflow, again]) await model.dispose();
    });
  });
});

describe('a size that patches do not fill', () => {
  let uniflow: UniFlow;
  beforeAll(async () => {
    await loaded(checkpoint('siglip-so400m384'), (encoder) => {
      uniflow = UniFlow.fromEncoder(encoder, { latentChannels: 4, globalBlocks: 1, flowBlocks: 1 });
    });
  });
  afterAll(() => uniflow.dispose());
  const photo = join(photos, 'dogs.jpg');

  test('is used for resizing, and its whole patches are encoded and decoded', async () => {
    expect(uniflow.config).toMatchObject({ imageSize: [60, 60], decoder: { grid: { rows: 4, cols: 4 } } });
    const { images, originals, grid } = await uniflow.reconstruct(photo);
    expect({ grid, images: images.shape, originals: originals.shape }).toEqual({
      ...{ grid: { rows: 4, cols: 4 } },
      ...{ images: [1, 56, 56, 3], originals: [1, 56, 56, 3] },
    });
  });

  test('gives the same result as its whole patches', async () => {
    const [height, width] = [33, 45];
    const cut = ndarray(new Uint8Array(28 * 42 * 3), [1, 28, 42, 3]);
    const whole = ndarray(
      Uint8Array.from({ length: height * width * 3 }, (_, i) => (i * 7) % 256),
      [1, height, width, 3],
    );
    for (let y = 0; y < 28; y++) for (let x = 0; x < 42; x++) for (let c = 0; c < 3; c++) cut.set(0, y, x, c, whole.get(0, y, x, c));
    expect((await uniflow.encode({ pixels: whole })).latents).toEqual((await uniflow.encode({ pixels: cut })).latents);
  });

  test('works in evaluation and training', async () => {
    const data = await openDataset(photos);
    const { images, psnr, pins } = await evaluate(uniflow, { data });
    expect({ images, size: pins.size, finite: Number.isFinite(psnr) }).toEqual({ images: data.length, size: [60, 60], finite: true });
    await data.close();
    const trainer = new Trainer(uniflow, { lambdaDistillation: 0 });
    const pixels = ndarray(new Uint8Array(60 * 60 * 3).fill(99), [1, 60, 60, 3]);
    expect((await trainer.step({ pixels })).flow).toBeGreaterThan(0);
    await trainer.finish();
  });

  test('gives the same result in a stream', async () => {
    const { latents } = await uniflow.encode(photo);
    for await (const batch of uniflow.encodeStream([photo])) expect(batch.latents).toEqual(latents);
  });
});

describe('invalid weights', () => {
  const weights = 'model.safetensors';
  test.each<[string, string, string, RegExp]>([
    ['a Git LFS pointer', weights, 'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n', /Git LFS pointer.*git lfs pull/],
    ['a web page', weights, '<!DOCTYPE html><html><body>Please log in', /HTML page.*download the file again/],
    ['a config that is a pointer', 'config.json', 'version https://git-lfs.github.com/spec/v1\noid', /config\.json.*Git LFS pointer/],
    ['a config that is a web page', 'config.json', '\n<html>', /config\.json.*HTML page/],
  ])('%s', async (_, file, content, about) => {
    const folder = await changed(golden('dinov2'), {});
    await writeFile(join(folder, file), content);
    const error = await failure(VisionEncoder.load(folder));
    expect(error).toMatchObject({ code: 'BAD_CHECKPOINT', message: expect.stringMatching(about) });
  });

  test('explains a folder with only pickled weights', async () => {
    const folder = await changed(golden('dinov2'), {});
    for (const name of [weights, 'golden.safetensors']) await rm(join(folder, name));
    await writeFile(join(folder, 'pytorch_model.bin'), '');
    const error = await failure(VisionEncoder.load(folder));
    expect(error.message).toMatch(/expected model\.safetensors.* but got neither but pytorch_model\.bin; in Python, .*save_pretrained/);
  });
});

describe('saved', () => {
  async function header(folder: string): Promise<Json> {
    const file = await readFile(join(folder, 'model.safetensors'));
    return JSON.parse(file.toString('utf8', 8, 8 + Number(file.readBigUInt64LE()))) as Json;
  }

  test.each([
    ['clip-full-dump', ['post_layernorm.weight', 'post_layernorm.bias']],
    ['siglip-so400m384', ['head.probe', 'head.attention.in_proj_weight', 'head.mlp.fc2.bias']],
    ['dinov2-cls', ['embeddings.mask_token']],
    ['dinov3-noreg', ['embeddings.mask_token', 'embeddings.register_tokens']],
  ])('%s keeps what it does not compute with, untouched', async (name, kept) => {
    const folder = join(dir, `saved-${name}`);
    await loaded(checkpoint(name), (encoder) => encoder.save(folder, { dtype: 'bfloat16' }));
    const [before, after] = [await header(checkpoint(name)), await header(folder)];
    for (const tensor of kept) {
      const old = Object.keys(before).find((key) => key === tensor || key.endsWith(`.${tensor}`)) as string;
      const [{ dtype, shape }, now] = [before[old] as Json, after[tensor] as Json];
      expect({ tensor, dtype: now['dtype'], shape: now['shape'] }).toEqual({ tensor, dtype, shape });
      if ((shape as number[]).includes(0)) continue;
      const values = async (from: string, key: string): Promise<unknown> => (await readTensors(join(from, 'model.safetensors')))[key]!.data;
      expect(await values(folder, tensor)).toEqual(await values(checkpoint(name), old));
    }
    await loaded(folder, (encoder) => expect(encoder.config.layers).toBe(3));
  });

  test('keeps the processor files unchanged', async () => {
    const [source, folder] = [checkpoint('clip-processor-v5'), join(dir, 'saved-processor')];
    await loaded(source, (encoder) => encoder.save(folder));
    expect(await readFile(join(folder, 'processor_config.json'), 'utf8')).toBe(
      await readFile(join(source, 'processor_config.json'), 'utf8'),
    );
  });

  test('writes floats as floats, as transformers 5 requires, and integers as integers', async () => {
    const folder = join(dir, 'saved-floats');
    const config = { ...(await readJson(join(golden('dinov2'), 'config.json'))), layerscale_value: 1, initializer_range: 1 };
    const encoder = VisionEncoder.random(config);
    await encoder.save(folder);
    await encoder.dispose();
    const text = await readFile(join(folder, 'config.json'), 'utf8');
    for (const line of ['"layerscale_value": 1.0,', '"initializer_range": 1.0,', '"drop_path_rate": 0.0,', '"mlp_ratio": 4,'])
      expect(text).toContain(line);
  });

  test('writes the element type in each spelling that it had', async () => {
    const folder = join(dir, 'saved-dtype');
    await loaded(await changed(golden('dinov2'), { torch_dtype: 'float32' }), (encoder) => encoder.save(folder, { dtype: 'bfloat16' }));
    expect(await readJson(join(folder, 'config.json'))).toMatchObject({ dtype: 'bfloat16', torch_dtype: 'bfloat16' });
  });
});
