/** Where a model is: a local folder, or a repository of the Hugging Face hub, kept in the cache that Python shares. */
import { createHash, randomUUID } from 'node:crypto';
import { mkdir, readFile, rename, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import { basename, dirname, join, relative, resolve } from 'node:path';
import { getHFHubCachePath, getRepoFolderName, HUB_URL, HubApiError, listFiles, modelInfo, type ListFileEntry } from '@huggingface/hub';
import { aborted, throwIfAborted, UniFlowError } from '../errors.js';

/** How far the download of a model is. */
export interface HubProgress {
  /** The file that bytes arrived for. */
  file: string;
  /** Bytes of all files so far, those that were in the cache included. */
  loaded: number;
  /** Bytes of all files. */
  total: number;
}

export interface HubOptions {
  /** Branch, tag or commit of a hub repository. Default main. */
  revision?: string;
  /** Where downloads are kept. Default: HF_HUB_CACHE, or $HF_HOME/hub, or ~/.cache/huggingface/hub. */
  cacheDir?: string;
  onProgress?: (progress: HubProgress) => void;
  signal?: AbortSignal;
}

/** One revision of a repository, as one call of {@link resolveModel} sees it. */
interface Repository extends HubOptions {
  name: string;
  revision: string;
  endpoint: string;
  /** Its folder in the cache: `blobs/<checksum>`, `snapshots/<commit>/<file>` linked to them, `refs/<revision>`. */
  folder: string;
  fetch: typeof fetch;
}

const CONFIG = 'config.json';
const PREPROCESSOR = 'preprocessor_config.json';
const WEIGHTS = 'model.safetensors';
const INDEX = 'model.safetensors.index.json';
const COMMIT = /^[0-9a-f]{40}$/;

/**
 * The local folder of a model: itself where `model` is a folder, else the hub repository `owner/name`, downloaded
 * on first use.
 *
 * Honours HF_ENDPOINT, HF_TOKEN (or the token that `hf auth login` stored) and HF_HUB_OFFLINE. Where the hub cannot
 * be reached, the copy in the cache is used if it is complete.
 *
 * @throws {UniFlowError} `NOT_FOUND`, `BAD_INPUT`, `BAD_CHECKPOINT`, `NETWORK` or `ABORTED`.
 */
export async function resolveModel(model: string, options: HubOptions): Promise<string> {
  throwIfAborted(options.signal);
  const found = await stat(model).catch(() => undefined);
  if (found?.isDirectory()) return model;
  if (found) throw UniFlowError.expected('BAD_INPUT', model, 'the folder of a model', 'a file');
  if (/^[./~]|\\|\/.*\//.test(model)) {
    const hint = model.startsWith('~') ? ' (a leading ~ is expanded by shells, not here)' : '';
    throw new UniFlowError('NOT_FOUND', `${model}: no such folder${hint}`, { subject: model });
  }
  if (!/^\b[\w.-]+\b\/\b[\w.-]+\b$/.test(model) || /--|\.\./.test(model))
    throw UniFlowError.expected('BAD_INPUT', 'model', 'the path of a folder, or owner/name on the hub', JSON.stringify(model));
  const repository = await repositoryOf(model, options);
  return inTurn(repository.folder, options.signal, () => locate(repository));
}

async function repositoryOf(name: string, options: HubOptions): Promise<Repository> {
  const { revision = 'main', cacheDir = getHFHubCachePath(), signal } = options;
  // It becomes a path below refs/; git allows none of these either.
  if (!revision || /^\/|\/$|\.\.|\\/.test(revision))
    throw UniFlowError.expected('BAD_INPUT', 'revision', 'a branch, tag or commit', JSON.stringify(revision));
  const endpoint = (process.env['HF_ENDPOINT'] || HUB_URL).replace(/\/+$/, '');
  const folder = join(resolve(cacheDir), getRepoFolderName({ type: 'model', name }));
  return { ...options, name, revision, endpoint, folder, fetch: hubFetch(endpoint, await accessToken(), signal) };
}

/** The token from the places where Python's huggingface_hub looks. */
async function accessToken(): Promise<string> {
  const { HF_TOKEN, HUGGING_FACE_HUB_TOKEN, HF_TOKEN_PATH, HF_HOME, XDG_CACHE_HOME } = process.env;
  const home = HF_HOME ?? join(XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'huggingface');
  const stored = (): Promise<string> => readFile(HF_TOKEN_PATH ?? join(home, 'token'), 'utf8').catch(() => '');
  return (HF_TOKEN || HUGGING_FACE_HUB_TOKEN || (await stored())).trim();
}

/** `@huggingface/hub` takes no signal, and refuses the tokens of mirrors, which do not start with `hf_`. */
function hubFetch(endpoint: string, token: string, signal?: AbortSignal): typeof fetch {
  return async (input, init) => {
    const headers = new Headers(init?.headers);
    if (token && new URL(String(input)).origin === new URL(endpoint).origin) headers.set('Authorization', `Bearer ${token}`);
    return fetch(input, { ...init, headers, signal });
  };
}

const queues = new Map<string, Promise<unknown>>();

/** Runs `work` after the earlier calls for `key`, so that a second load finds in the cache what the first downloads. */
async function inTurn<T>(key: string, signal: AbortSignal | undefined, work: () => Promise<T>): Promise<T> {
  const before = queues.get(key) ?? Promise.resolve();
  const turn = settled(before, signal).then(work);
  const after = Promise.allSettled([before, turn]).then(() => {
    if (queues.get(key) === after) queues.delete(key);
  });
  queues.set(key, after);
  return turn;
}

function settled(before: Promise<unknown>, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    throwIfAborted(signal);
    const stop = (): void => reject(aborted(signal as AbortSignal));
    signal?.addEventListener('abort', stop);
    void before.then(() => {
      signal?.removeEventListener('abort', stop);
      resolve();
    });
  });
}

async function locate(repository: Repository): Promise<string> {
  const { name, revision, endpoint } = repository;
  const cached = await cachedSnapshot(repository);
  if (/^(1|on|yes|true)$/i.test(process.env['HF_HUB_OFFLINE'] ?? '')) {
    if (cached) return cached;
    throw unavailable(repository, 'HF_HUB_OFFLINE is set');
  }
  // A commit never changes. Without a preprocessor_config.json one cannot tell whether the repository has none.
  if (cached && COMMIT.test(revision) && (await has(cached, PREPROCESSOR))) return cached;
  try {
    const { sha } = await modelInfo({ name, revision, hubUrl: endpoint, fetch: repository.fetch, additionalFields: ['sha'] });
    if (!COMMIT.test(sha)) throw new Error(`the commit is ${JSON.stringify(sha)}`);
    return await download(repository, sha);
  } catch (error) {
    if (cached && error instanceof Outage) return cached;
    throw explained(repository, error);
  }
}

// ----- the cache ------------------------------------------------------------------------------------------------

/** The snapshot of the revision that was current at the last download, if it has all that a model needs. */
async function cachedSnapshot({ folder, revision }: Repository): Promise<string | undefined> {
  const ref = (): Promise<string> => readFile(join(folder, 'refs', revision), 'utf8').catch(() => '');
  const commit = COMMIT.test(revision) ? revision : (await ref()).trim();
  const snapshot = join(folder, 'snapshots', commit);
  if (!COMMIT.test(commit) || !(await has(snapshot, CONFIG))) return undefined;
  const files = (await has(snapshot, WEIGHTS)) ? [] : (await has(snapshot, INDEX)) ? await shards(join(snapshot, INDEX)) : [WEIGHTS];
  const present = await Promise.all(files.map((file) => has(snapshot, file)));
  return present.every(Boolean) ? snapshot : undefined;
}

function has(dir: string, file: string): Promise<boolean> {
  return stat(join(dir, file)).then(
    (found) => found.isFile(),
    () => false,
  );
}
