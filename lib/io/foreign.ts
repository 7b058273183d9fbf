/** Recognises files that are not what a model needs, names the common mistakes, and says what to do. */
import { open, readdir } from 'node:fs/promises';
import { UniFlowError } from '../errors.js';

/** Throws the reason why the file at `path` could not be read, if it is known; otherwise returns. */
export async function refuseForeign(path: string): Promise<void> {
  const start = await beginning(path).catch(() => '');
  if (start.startsWith('version https://git-lfs.github.com/spec/'))
    throw UniFlowError.expected('BAD_CHECKPOINT', path, 'the file itself', 'a Git LFS pointer to it: run `git lfs pull` in the folder');
  if (/^\s*(<!doctype html|<html|<\?xml)/i.test(start))
    throw UniFlowError.expected(
      'BAD_CHECKPOINT',
      path,
      'a file of the model',
      'an HTML page (of a login or an error, as a download leaves it): download the file again, with HF_TOKEN where the model is gated',
    );
}

async function beginning(path: string): Promise<string> {
  const file = await open(path);
  try {
    const { buffer, bytesRead } = await file.read(Buffer.alloc(256), 0, 256, 0);
    return buffer.toString('latin1', 0, bytesRead);
  } finally {
    await file.close();
  }
}

/** Advice for a folder or repository whose weights are not in safetensors, as the end of an error message. */
export function otherWeights(names: readonly string[]): string {
  const others = names.filter((name) => /\.(bin|pth?|ckpt|h5|msgpack|gguf|onnx|safetensors)$/.test(name)).sort();
  if (others.length === 0) return '';
  const found = `${others.slice(0, 3).join(', ')}${others.length > 3 ? ', …' : ''}`;
  const pickled = others.some((name) => /\.(bin|pth?|ckpt)$/.test(name));
  const remedy = pickled ? "; in Python, transformers' from_pretrained(…) and save_pretrained(…) of 4.36 or later convert it" : '';
  return ` but ${found}${remedy}`;
}

/** The same for a folder. */
export async function otherWeightsIn(dir: string): Promise<string> {
  return otherWeights(await readdir(dir).catch(() => []));
}
