/** Locates a model: a local folder, or a Hugging Face hub repository in the cache shared with Python. */
import { randomUUID } from 'node:crypto';
import { readFile, rename, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import { basename, dirname, join, relative, resolve } from 'node:path';
import { getHFHubCachePath, getRepoFolderName, HUB_URL, HubApiError, listFiles, modelInfo, type ListFileEntry } from '@huggingface/hub';
import { aborted, throwIfAborted, UniFlowError } from '../errors.js';
import { makeFolder } from './files.js';
import { otherWeights } from './foreign.js';
import { PREPROCESSOR, PROCESSOR } from './processor.js';

/** The file being downloaded, and the bytes of all files: so far (including those found in the cache), and in total. */
export interface HubProgress {
  file: string;
  loaded: number;
  total: number;
}

export interface HubOptions {
  /** Branch, tag or commit of a hub repository. Default main. */
  revision?: string;
  /** Download folder. Default: HF_HUB_CACHE, or $HF_HOME/hub, or ~/.cache/huggingface/hub. */
  cacheDir?: string;
  onProgress?: (progress: HubProgress) => void;
  signal?: AbortSignal;
}

/** State of one call on a repository. `folder` holds blobs/CHECKSUM, snapshots/COMMIT/FILE (links to blobs), and refs/REVISION. */
interface Repository extends HubOptions {
  name: string;
  revision: string;
  endpoint: string;
  folder: string;
  fetch: typeof fetch;
}

const CONFIG = 'config.json';
const OPTIONAL = [PREPROCESSOR, PROCESSOR]; // optional files of a model
const WEIGHTS = 'model.safetensors';
const INDEX = 'model.safetensors.index.json';
const COMMIT = /^[0-9a-f]{40}$/;

/**
 * The local folder of a model: `model` itself if it is a folder, else that of the hub repository `owner/name`, downloaded on first use. If the hub cannot be
 * reached or refuses access, a complete copy in the cache is used.
 *
 * Honours HF_ENDPOINT, HF_TOKEN (or the token that `hf auth login` stored) and HF_HUB_OFFLINE.
 *
 * @throws {UniFlowError} `NOT_FOUND`, `BAD_INPUT`, `BAD_CHECKPOINT`, `NETWORK` or `ABORTED`.
 */
export async function resolveModel(model: string, options: HubOptions): Promise<string> {
  throwIfAborted(options.signal);
  const found = await stat(model).catch(() => undefined);
  if (found?.isDirectory()) return model;
  if (found) throw UniFlowError.expected('BAD_INPUT', model, 'the folder of a model', 'a file');
  if (/^[./~]|\\|\/.*\//.test(model)) throw new UniFlowError('NOT_FOUND', `${model}: no such folder`, { subject: model });
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

/** The access token, from the same places as Python's huggingface_hub. */
async function accessToken(): Promise<string> {
  const { HF_TOKEN, HUGGING_FACE_HUB_TOKEN, HF_TOKEN_PATH, HF_HOME, XDG_CACHE_HOME } = process.env;
  const home = HF_HOME ?? join(XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'huggingface');
  const stored = (): Promise<string> => readFile(HF_TOKEN_PATH ?? join(home, 'token'), 'utf8').catch(() => '');
  return (HF_TOKEN || HUGGING_FACE_HUB_TOKEN || (await stored())).trim();
}

/** `@huggingface/hub` supports no signal and rejects tokens that do not start with `hf_`, such as those of mirrors. */
function hubFetch(endpoint: string, token: string, signal: AbortSignal | undefined): typeof fetch {
  return async (input, init) => {
    const headers = new Headers(init?.headers);
    const { origin } = new URL(input instanceof Request ? input.url : input);
    if (token && origin === new URL(endpoint).origin) headers.set('Authorization', `Bearer ${token}`);
    return fetch(input, { ...init, headers, signal });
  };
}

const queues = new Map<string, Promise<void>>();

/** Runs `work` after earlier calls with the same key, so a second load finds the first one's downloads in the cache. */
function inTurn<T>(key: string, signal: AbortSignal | undefined, work: () => Promise<T>): Promise<T> {
  const before = queues.get(key) ?? Promise.resolve();
  const turn = unlessAborted(before, signal).then(work);
  queues.set(
    key,
    Promise.allSettled([before, turn]).then(() => undefined),
  );
  return turn;
}

function unlessAborted(wait: Promise<void>, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    throwIfAborted(signal);
    const stop = (): void => reject(aborted(signal as AbortSignal));
    signal?.addEventListener('abort', stop);
    void wait.then(resolve).finally(() => signal?.removeEventListener('abort', stop));
  });
}

async function locate(repository: Repository): Promise<string> {
  const cached = await cachedSnapshot(repository);
  if (/^(1|on|yes|true)$/i.test(process.env['HF_HUB_OFFLINE'] ?? '')) {
    if (cached) return cached;
    throw unavailable(repository, 'HF_HUB_OFFLINE is set');
  }
  // A commit never changes. But if processor files are missing, only the hub knows whether they exist.
  const processors = cached ? await Promise.all(OPTIONAL.map((name) => isFile(join(cached, name)))) : [];
  if (cached && COMMIT.test(repository.revision) && processors.includes(true)) return cached;
  let commit: string;
  try {
    commit = await currentCommit(repository);
  } catch (error) {
    const unreachable = !(error instanceof HubApiError) || error.statusCode >= 500 || error.statusCode === 429;
    if (cached && unreachable && !repository.signal?.aborted) return cached;
    return withoutAccess(repository, cached, explained(repository, error));
  }
  return download(repository, commit).catch((error: unknown) => withoutAccess(repository, cached, error));
}

/** The cached copy, with a warning, if the hub refuses access; as in Python's huggingface_hub. */
function withoutAccess({ name, endpoint }: Repository, cached: string | undefined, error: unknown): string {
  const cause = error instanceof UniFlowError ? error.cause : undefined;
  if (cached === undefined || !(cause instanceof HubApiError) || ![401, 403].includes(cause.statusCode)) throw error;
  const why = `${endpoint} refuses access (${cause.statusCode}; is HF_TOKEN missing or expired?)`;
  process.emitWarning(`${name}: ${why}: the copy in ${cached} is used, which may not be the newest`, { type: 'UniFlowWarning' });
  return cached;
}

async function currentCommit({ name, revision, endpoint, fetch }: Repository): Promise<string> {
  const { sha } = await modelInfo({ name, revision, hubUrl: endpoint, fetch, additionalFields: ['sha'] });
  if (!COMMIT.test(sha)) throw new Error(`${JSON.stringify(sha)} is not a commit`); // it becomes a folder name
  return sha;
}

/** Explains a failed request. */
function explained(repository: Repository, cause: unknown, url = repository.endpoint): UniFlowError {
  const { name, revision, endpoint, signal } = repository;
  if (signal?.aborted) return aborted(signal);
  if (!(cause instanceof HubApiError)) {
    const { cause: inner, message } = cause as Error & { cause?: NodeJS.ErrnoException };
    return unavailable(repository, `no complete answer came from ${url} (${inner?.code ?? inner?.message ?? message})`, cause);
  }
  const { statusCode } = cause;
  const missing = `no such model or revision ${revision} at ${endpoint}, and no such folder`;
  if (statusCode === 404) return new UniFlowError('NOT_FOUND', `${name}: ${missing}`, { subject: name, cause });
  if (statusCode !== 401 && statusCode !== 403) return unavailable(repository, `${url} answered with status ${statusCode}`, cause);
  const refused = `${endpoint} refuses access (${statusCode}). If the name is right, the model is gated or private`;
  const remedy = `accept the licence at ${endpoint}/${name} and set HF_TOKEN to a token that may read it`;
  return new UniFlowError('NETWORK', `${name}: ${refused}: ${remedy}`, { subject: name, cause });
}

function unavailable({ name, revision, folder }: Repository, why: string, cause?: unknown): UniFlowError {
  const remedy = 'Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or download the model elsewhere and pass its folder';
  const message = `${name}: ${why}, and ${dirname(folder)} has no complete copy of revision ${revision}. ${remedy}`;
  return new UniFlowError('NETWORK', message, { subject: name, cause });
}

/** The snapshot of the revision's last download, if it is complete. */
async function cachedSnapshot({ folder, revision }: Repository): Promise<string | undefined> {
  const commit = COMMIT.test(revision) ? revision : await readFile(join(folder, 'refs', revision), 'utf8').catch(() => '');
  const snapshot = join(folder, 'snapshots', commit.trim());
  const all = async (files: string[]): Promise<boolean> =>
    (await Promise.all(files.map((file) => isFile(join(snapshot, file))))).every(Boolean);
  if (await all([CONFIG, WEIGHTS])) return snapshot;
  return (await all([CONFIG, INDEX])) && (await all(await shardsOf(snapshot))) ? snapshot : undefined;
}

function isFile(path: string): Promise<boolean> {
  return stat(path)
    .then((found) => found.isFile())
    .catch(() => false);
}

async function shardsOf(snapshot: string): Promise<string[]> {
  const path = join(snapshot, INDEX);
  try {
    const { weight_map } = JSON.parse(await readFile(path, 'utf8')) as { weight_map: Record<string, string> };
    return [...new Set(Object.values(weight_map))].map(String);
  } catch (cause) {
    throw UniFlowError.expected('BAD_CHECKPOINT', path, 'JSON with a weight_map', (cause as Error).message, cause);
  }
}

async function download(repository: Repository, commit: string): Promise<string> {
  const { folder, revision, onProgress } = repository;
  const snapshot = join(folder, 'snapshots', commit);
  const files = await neededFiles(repository, commit);
  const total = files.reduce((sum, { size }) => sum + size, 0);
  let loaded = 0;
  for (const file of files) {
    const onBytes = (bytes: number): void => onProgress?.({ file: file.path, loaded: (loaded += bytes), total });
    if (await isFile(join(snapshot, file.path))) loaded += file.size;
    else await downloadFile(repository, commit, file, onBytes);
  }
  const ref = join(folder, 'refs', revision); // written last, so it always refers to a complete snapshot
  if (revision !== commit) await place(ref, (temporary) => writeFile(temporary, commit));
  return snapshot;
}

/** The files to download. The index of a sharded model is downloaded first, because it names the other files. */
async function neededFiles(repository: Repository, commit: string): Promise<ListFileEntry[]> {
  const listed = await listedFiles(repository, commit);
  const wanted = [CONFIG, ...OPTIONAL.filter((name) => listed.has(name))];
  const index = listed.get(INDEX);
  if (index && !listed.has(WEIGHTS)) {
    const snapshot = join(repository.folder, 'snapshots', commit);
    if (!(await isFile(join(snapshot, INDEX)))) await downloadFile(repository, commit, index);
    wanted.push(INDEX, ...(await shardsOf(snapshot)));
  } else wanted.push(WEIGHTS);
  const missing = wanted.filter((file) => !listed.has(file));
  if (missing.length === 0) return wanted.map((file) => listed.get(file) as ListFileEntry);
  const expected = `${CONFIG}, and ${WEIGHTS} or ${INDEX} with the files it names (only safetensors are read)`;
  const found = missing.includes(WEIGHTS) ? otherWeights([...listed.keys()]) : '';
  throw UniFlowError.expected('BAD_CHECKPOINT', repository.name, expected, `a repository without ${missing.join(', ')}${found}`);
}

async function listedFiles(repository: Repository, commit: string): Promise<Map<string, ListFileEntry>> {
  const { name, endpoint, fetch } = repository;
  const listed = new Map<string, ListFileEntry>();
  try {
    for await (const entry of listFiles({ repo: name, revision: commit, hubUrl: endpoint, fetch }))
      if (entry.type === 'file' && basename(entry.path) === entry.path) listed.set(entry.path, entry);
    return listed;
  } catch (error) {
    throw explained(repository, error);
  }
}

/**
 * Streams a file into the cache. The function of `@huggingface/hub` for this does not check completeness, logs to stdout, and lets two processes write the
 * same temporary file.
 */
async function downloadFile(
  repository: Repository,
  commit: string,
  file: ListFileEntry,
  onBytes: (bytes: number) => void = () => undefined,
): Promise<void> {
  const checksum = file.lfs?.oid ?? file.oid ?? '';
  const named = /^[0-9a-f]+$/.test(checksum); // it becomes a file name
  if (!named) throw explained(repository, new Error(`${file.path} has the checksum ${JSON.stringify(checksum)}`));
  const blob = join(repository.folder, 'blobs', checksum);
  const bytes = counted(bytesOf(repository, commit, file), onBytes);
  if (await isFile(blob))
    onBytes(file.size); // another revision has it too
  else await place(blob, (temporary) => writeFile(temporary, bytes, { flush: true }));
  const link = join(repository.folder, 'snapshots', commit, file.path);
  await place(link, (temporary) => symlink(relative(dirname(link), blob), temporary));
}

async function* bytesOf(repository: Repository, commit: string, { path, size }: ListFileEntry): AsyncGenerator<Uint8Array> {
  const url = `${repository.endpoint}/${repository.name}/resolve/${commit}/${encodeURIComponent(path)}`;
  let received = 0;
  try {
    const response = await repository.fetch(url);
    if (!response.ok || !response.body) throw new HubApiError(url, response.status);
    for await (const chunk of response.body as AsyncIterable<Uint8Array>) {
      received += chunk.length;
      yield chunk;
    }
    if (received !== size) throw new Error(`${received} of ${size} bytes`);
  } catch (error) {
    throw explained(repository, error, url);
  }
}

/** Separate from {@link bytesOf}, so an error of the listener is not mistaken for a network error. */
async function* counted(bytes: AsyncIterable<Uint8Array>, onBytes: (bytes: number) => void): AsyncGenerator<Uint8Array> {
  for await (const chunk of bytes) {
    onBytes(chunk.length);
    yield chunk;
  }
}

/** Makes a file or link appear complete or not at all, even if other processes make the same one. */
async function place(path: string, make: (temporary: string) => Promise<void>): Promise<void> {
  const temporary = `${path}.${randomUUID()}.incomplete`;
  try {
    await makeFolder(dirname(path));
    await make(temporary);
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true }).catch(() => undefined);
    const { syscall, message } = error as NodeJS.ErrnoException;
    if (!syscall) throw error; // not a disk error, but one of the content
    throw new UniFlowError('BAD_INPUT', `${path}: cannot be written: ${message}`, { subject: path, cause: error });
  }
}
