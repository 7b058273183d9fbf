/** Where this package is, and what it ships. */
import { readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The package's folder, from `lib/` (tests) as from `dist/`. */
export const packageRoot = join(dirname(fileURLToPath(import.meta.url)), '..');

const manifest = JSON.parse(readFileSync(join(packageRoot, 'package.json'), 'utf8')) as {
  version: string;
  peerDependencies: Readonly<Record<string, string>>;
};

export const packageVersion = manifest.version;

/** Versions of the optional packages (optional.ts) that this package works with. */
export const peerRanges = manifest.peerDependencies;

/**
 * The folder of the tokenizer that comes with the package: a small one for colour photographs, trained from photographs in Debian's wallpaper
 * packages (models/default/README.md). It reconstructs; having had no pretrained teacher, it does not understand.
 */
export const embeddedModel = join(packageRoot, 'models', 'default');

/** What it is called in files: where it is installed says nothing. */
export const embeddedName = `${basename(dirname(embeddedModel))}/${basename(embeddedModel)}`;
