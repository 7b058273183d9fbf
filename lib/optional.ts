/**
 * Packages that one feature alone needs. They are optional peers of this package: an install of the library leaves them out, and where a
 * feature is used without them, the error has the command that installs them.
 */
import { UniFlowError } from './errors.js';
import { peerRanges } from './package.js';

interface Optional {
  /** As the error names it. */
  title: string;
  packages: readonly string[];
}

export const FEATURES = {
  serve: { title: 'the HTTP service', packages: ['fastify', '@fastify/accepts', '@fastify/multipart', 'ipaddr.js', 'prom-client'] },
  queue: { title: 'encoding on many machines', packages: ['bullmq', 'ioredis', 'prom-client'] },
  s3: { title: 'an output on S3', packages: ['@aws-sdk/client-s3', '@aws-sdk/lib-storage'] },
  parquet: { title: 'reading or writing Parquet', packages: ['hyparquet', 'hyparquet-compressors', 'hyparquet-writer'] },
} as const satisfies Record<string, Optional>;

export type Feature = keyof typeof FEATURES;

/** A feature is used and its packages are not installed. It ends a run: no image is to blame, and all others would fail alike. */
export class MissingPackageError extends UniFlowError {
  constructor(feature: Feature, missing: string, cause: unknown) {
    const what = `${FEATURES[feature].title} needs packages that are not installed, such as ${missing}`;
    const details = { subject: missing, expected: `${missing} ${peerRanges[missing]}`, actual: 'not installed', cause };
    super('UNSUPPORTED', `${what}. Install them with: ${installCommand(feature)}`, details);
  }
}

/**
 * What `load` imports, which is a module that imports packages of the feature.
 * @throws {MissingPackageError} where one of them is not installed.
 */
export async function optional<M>(feature: Feature, load: () => Promise<M>): Promise<M> {
  try {
    return await load();
  } catch (error) {
    const missing = missingPackage(error, FEATURES[feature].packages);
    throw missing === undefined ? error : new MissingPackageError(feature, missing, error);
  }
}

/** With all packages of the feature, in versions that this package works with. */
export function installCommand(feature: Feature): string {
  return ['npm install', ...FEATURES[feature].packages.map((name) => `${name}@${majorOf(peerRanges[name] as string)}`)].join(' ');
}

/** '^5.12.8' → '5', '^0.17.0' → '0.17': ranges that no shell has to have quoted. */
function majorOf(range: string): string {
  return range.replace(/^\^(0\.\d+|\d+).*$/, '$1');
}

const NOT_FOUND = ['ERR_MODULE_NOT_FOUND', 'MODULE_NOT_FOUND'];

/** The one that an import did not find. */
function missingPackage(error: unknown, packages: readonly string[]): string | undefined {
  const { code, message } = error as NodeJS.ErrnoException;
  return NOT_FOUND.includes(code ?? '') ? packages.find((name) => message.includes(`'${name}'`)) : undefined;
}
