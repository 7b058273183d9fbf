/**
 * Packages needed by a single feature. They are optional peers of this package, so installing the library leaves them out. If a feature is used without them,
 * the error contains the command that installs them.
 */
import { UniFlowError } from './errors.js';
import { peerRanges } from './package.js';

interface Optional {
  /** Name of the feature in the error. */
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

/** A feature is used but its packages are not installed. It ends a run: it is not the fault of an image, and all others would fail alike. */
export class MissingPackageError extends UniFlowError {
  constructor(feature: Feature, missing: string, cause: unknown) {
    const what = `${FEATURES[feature].title} needs packages that are not installed, such as ${missing}`;
    const details = { subject: missing, expected: `${missing} ${peerRanges[missing]}`, actual: 'not installed', cause };
    super('UNSUPPORTED', `${what}. Install them with: ${installCommand(feature)}`, details);
  }
}

/**
 * Returns the result of `load`, which imports a module that uses packages of the feature.
 * @throws {MissingPackageError} if one of them is not installed.
 */
export async function optional<M>(feature: Feature, load: () => Promise<M>): Promise<M> {
  try {
    return await load();
  } catch (error) {
    const missing = missingPackage(error, FEATURES[feature].packages);
    throw missing === undefined ? error : new MissingPackageError(feature, missing, error);
  }
}

/** The install command, with all packages of the feature in versions that this package supports. */
export function installCommand(feature: Feature): string {
  return ['npm install', ...FEATURES[feature].packages.map((name) => `${name}@${majorOf(peerRanges[name] as string)}`)].join(' ');
}

/** '^5.12.8' → '5', '^0.17.0' → '0.17': ranges that need no quoting in a shell. */
function majorOf(range: string): string {
  return range.replace(/^\^(0\.\d+|\d+).*$/, '$1');
}

const NOT_FOUND = ['ERR_MODULE_NOT_FOUND', 'MODULE_NOT_FOUND'];

/** The package that an import did not find. */
function missingPackage(error: unknown, packages: readonly string[]): string | undefined {
  const { code, message } = error as NodeJS.ErrnoException;
  return NOT_FOUND.includes(code ?? '') ? packages.find((name) => message.includes(`'${name}'`)) : undefined;
}
