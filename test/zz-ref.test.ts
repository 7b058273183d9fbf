import { test } from '@jest/globals';
import ndarray from 'ndarray';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { decodeImage } from '../lib/io/image.js';
import { patchStatistics, principalComponents } from '../lib/eval/pca.js';
import { PatchCodec } from '../lib/eval/baseline.js';
const root = '/work/shared/data/photos';
async function* images(folder: string, patch: number) {
  for (const name of readdirSync(join(root, folder)).filter((n) => n.endsWith('.png')).sort()) {
    const { data, width, height } = await decodeImage(join(root, folder, name));
    const [w, h] = [width - (width % patch), height - (height % patch)];
    const out = new Uint8Array(w * h * 3);
    for (let y = 0; y < h; y++) out.set(data.subarray(y * width * 3, y * width * 3 + w * 3), y * w * 3);
    yield ndarray(out, [1, h, w, 3]);
  }
}
const normalisation = { mean: Float32Array.of(0.485, 0.456, 0.406), std: Float32Array.of(0.229, 0.224, 0.225) };
test('reference', async () => {
  for (const [patch, ks] of [[8, [16, 32, 48]], [16, [64]]] as const) {
    const t = Date.now();
    const statistics = await patchStatistics(images('cid22-train', patch), { patch, normalisation });
    console.log('stat', Date.now() - t);
    for (const k of ks) {
      const t1 = Date.now();
      const codec = new PatchCodec({ config: { patch } as never, normalisation, device: 'cpu' }, principalComponents(statistics, k), 209);
      const t2 = Date.now();
      for (const set of ['kodak', 'cid22-validation']) {
        let [sum, s, n] = [0, 0, 0];
        for await (const image of images(set, patch)) { const q = await codec.quality(image as never); sum += q.get(0, 0); s += q.get(0, 1); n++; }
        process.stdout.write(`patch ${patch} k ${k} ${set} PSNR ${(sum / n).toFixed(3)} SSIM ${(s / n).toFixed(4)} n ${n} (evd ${t2 - t1} ms)\n`);
      }
      codec.dispose();
    }
  }
}, 3_000_000);
