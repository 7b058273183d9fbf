interface Manifest {
  name: string;
  version: string;
  os: string[];
  cpu: string[];
  libc?: string[];
  files: string[];
}
export const SCOPE: string;
export const platforms: Record<string, Pick<Manifest, 'os' | 'cpu' | 'libc'>>;
export const thisPlatform: string;
export function prebuiltManifest(platform: string, main: { version: string }): Manifest;
export function publishedManifest<Main extends object>(main: Main): Main & { optionalDependencies: Record<string, string> };
