/** The package's location, and the model bundled with it. */
import { readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The package's folder, both from `lib/` (tests) and from `dist/`. */
export const packageRoot = join(dirname(fileURLToPath(import.meta.url)), '..');

const manifest = JSON.parse(readFileSync(join(packageRoot, 'package.json'), 'utf8')) as {
  version: string;
  peerDependencies: Readonly<Record<string, string>>;
};

export const packageVersion = manifest.version;

/** Versions of the optional packages (optional.ts) that this package works with. */
export const peerRanges = manifest.peerDependencies;

/**
 * Folder of the bundled model: a small tokenizer for colour photographs, trained on photographs in Debian's wallpaper packages (models/default/README.md). It
 * reconstructs images, but its tokens carry no semantics, because it had no pretrained teacher.
 */
export const embeddedModel = join(packageRoot, 'models', 'default');

/** Its name in files: the install location would say nothing. */
export const embeddedName = `${basename(dirname(embeddedModel))}/${basename(embeddedModel)}`;
