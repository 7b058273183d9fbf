/** Finds and loads the native addon: compiled here (`uniflow build`), or from the prebuilt package of this platform. */
import { familySync, MUSL } from 'detect-libc';
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { UniFlowError } from './errors.js';
import { packageRoot, packageVersion } from './package.js';

const SCOPE = '@uniflow-tokenizer';

/** Platform part of the prebuilt packages' names: 'linux-x64', 'linux-x64-musl', 'darwin-arm64'. */
export const platformName = `${process.platform}-${process.arch}${familySync() === MUSL ? '-musl' : ''}`;

/** Folders that `uniflow build` may compile in: the package, or the user's cache if the package is read-only. */
export const buildFolders: readonly [string, string] = [
  join(packageRoot, 'build'),
  join(process.env['XDG_CACHE_HOME'] || join(homedir(), '.cache'), 'uniflow-tokenizer', packageVersion, platformName),
];

const require = createRequire(import.meta.url);

/** Possible locations of the addon, in search order. */
const places: { name: string; find: () => string | undefined }[] = [
  ...buildFolders.map((folder) => {
    const path = join(folder, 'Release', 'uniflow.node');
    return { name: path, find: () => (existsSync(path) ? path : undefined) };
  }),
  { name: `${SCOPE}/${platformName}`, find: () => resolved(`${SCOPE}/${platformName}/uniflow.node`) },
];

/**
 * @returns the addon and the path of its file.
 * @throws UniFlowError `UNSUPPORTED` with every location tried, what is missing, and the command to run.
 */
export function loadAddon(): { addon: unknown; path: string } {
  const tried: string[] = [];
  let cause: unknown;
  for (const { name, find } of places) {
    const path = find();
    if (path === undefined) {
      tried.push(`- ${name}: not ${name.startsWith(SCOPE) ? 'installed' : 'there'}`);
      continue;
    }
    try {
      return { addon: require(path) as unknown, path };
    } catch (error) {
      cause = error;
      tried.push(`- ${name}: ${(error as Error).message}`);
    }
  }
  throw new UniFlowError('UNSUPPORTED', ['The native addon cannot be loaded. Tried:', ...tried, ...remedies()].join('\n'), {
    subject: platformName,
    cause,
  });
}

function resolved(specifier: string): string | undefined {
  try {
    return require.resolve(specifier);
  } catch {
    return undefined;
  }
}

function remedies(): string[] {
  const missing = execFileSync(process.execPath, [join(packageRoot, 'scripts', 'system.mjs')], { encoding: 'utf8' }).trim();
  const others = prebuiltPackages().filter((name) => name !== platformName);
  return [
    `This is ${platformName}, Node.js ${process.version}. To get the addon, do one of these:`,
    '- install its prebuilt package: npm install --include=optional uniflow-tokenizer',
    ...(others.length > 0
      ? [
          `  (installed for ${others.join(', ')}: node_modules that were copied from another system must be installed again;`,
          '  for several systems at once: npm install --os=linux --cpu=x64 --libc=glibc uniflow-tokenizer)',
        ]
      : []),
    `- compile it: npx uniflow build${missing ? '' : ' (all that this needs is here)'}`,
    ...(missing ? missing.split('\n').map((line) => `  ${line}`) : []),
  ];
}

/** Platforms whose prebuilt packages are installed next to this package. */
function prebuiltPackages(): string[] {
  return (require.resolve.paths(SCOPE) ?? []).flatMap((folder) => {
    const scope = join(folder, SCOPE);
    return existsSync(scope) ? readdirSync(scope) : [];
  });
}
