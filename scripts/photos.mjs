/**
 * `node scripts/photos.mjs [FOLDER]`: collects photographs for the embedded model from Debian's wallpaper packages. Writes FOLDER/train and
 * FOLDER/held-out (default: build/photos), with sides of at most 1,280 pixels. Sources and licences: models/default/README.md.
 */
import { execSync } from 'node:child_process';
import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';
import sharp from 'sharp';
import { root } from './prepare.mjs';

const PACKAGES = {
  'lomiri-wallpapers-16.04': 'usr/share/backgrounds/*.jpg',
  'lomiri-wallpapers-20.04': 'usr/share/backgrounds/*.jpg',
  'mate-backgrounds': 'usr/share/backgrounds/mate/nature/*.jpg',
  'plasma-workspace-wallpapers': 'usr/share/wallpapers/*/contents/images/2560x1600.jpg',
};

/** Never trained on: the originals of examples/photos, and four more. */
const HELD_OUT = [
  'Image_1A_by_freespace',
  'Image_0B_by_freespace',
  'friends_by_Aitzol_Berasategi',
  'picosdeeuropa_by_Aitzol_Berasategi',
  'life_by_Aitzol_Berasategi',
  'seeding_by_Clements_Engelhardt',
  'Kleiber_by_Lukas_Baubkus',
  'Dune',
  'LadyBird',
  'EveningGlow',
];

const LONGEST = 1280;

const folder = resolve(process.argv[2] ?? join(root, 'build', 'photos'));
for (const part of ['train', 'held-out', 'packages']) mkdirSync(join(folder, part), { recursive: true });
const packages = join(folder, 'packages');
for (const [name, pattern] of Object.entries(PACKAGES)) {
  execSync(`apt-get -q download ${name} && dpkg-deb -x ${name}_*.deb .`, { cwd: packages, stdio: 'inherit' });
  const found = execSync(`ls ${pattern}`, { cwd: packages, encoding: 'utf8' }).trim().split('\n');
  for (const path of found) await copy(join(packages, path));
  rmSync(join(packages, 'usr'), { recursive: true });
}
rmSync(packages, { recursive: true });
for (const part of ['train', 'held-out']) console.log(`${join(folder, part)}: ${readdirSync(join(folder, part)).length} photographs`);

async function copy(path) {
  // Plasma names its images by size; the wallpaper's name is three folders up.
  const name = basename(path, '.jpg') === '2560x1600' ? basename(dirname(dirname(dirname(path)))) : basename(path, '.jpg');
  const to = join(folder, HELD_OUT.includes(name) ? 'held-out' : 'train', `${name}.jpg`);
  await sharp(path).autoOrient().resize(LONGEST, LONGEST, { fit: 'inside', withoutEnlargement: true }).jpeg({ quality: 95 }).toFile(to);
}
