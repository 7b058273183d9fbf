/** The platforms with a prebuilt package, and the manifests of those packages. */
import { familySync, MUSL } from 'detect-libc';

export const SCOPE = '@uniflow-tokenizer';

/** Keyed by the name that lib/addon.ts looks for. scripts/pack-prebuilt.mjs builds each on a machine of that platform. */
export const platforms = {
  'linux-x64': { os: ['linux'], cpu: ['x64'], libc: ['glibc'] },
  'linux-x64-musl': { os: ['linux'], cpu: ['x64'], libc: ['musl'] },
  'linux-arm64': { os: ['linux'], cpu: ['arm64'], libc: ['glibc'] },
  'darwin-arm64': { os: ['darwin'], cpu: ['arm64'] },
};

export const thisPlatform = `${process.platform}-${process.arch}${familySync() === MUSL ? '-musl' : ''}`;

/** @param main the manifest of uniflow-tokenizer. */
export const prebuiltManifest = (platform, main) => ({
  name: `${SCOPE}/${platform}`,
  version: main.version,
  description: `Prebuilt addon of uniflow-tokenizer for ${platform}`,
  license: main.license,
  preferUnplugged: true,
  engines: main.engines,
  ...platforms[platform],
  files: ['uniflow.node'],
});

/**
 * The main package's published manifest: it lists the prebuilt packages, of which npm installs the matching one. The manifest of the
 * sources does not, because npm cannot install a checkout with unpublished optional packages.
 */
export const publishedManifest = (main) => ({
  ...main,
  scripts: undefined,
  devDependencies: undefined,
  optionalDependencies: Object.fromEntries(Object.keys(platforms).map((platform) => [`${SCOPE}/${platform}`, main.version])),
});
