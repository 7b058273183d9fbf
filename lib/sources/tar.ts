/** Locates the files in a tar archive, so that each can be read separately. Headers are parsed by node-tar. */
import { open, type FileHandle } from 'node:fs/promises';
import { Header, Pax, type HeaderData } from 'tar';
import { throwIfAborted, UniFlowError } from '../errors.js';
import { unreadable } from './files.js';

/** A file in an archive; offset and size in bytes. */
export interface TarEntry {
  name: string;
  offset: number;
  size: number;
  /** Reason why its content cannot be read. */
  error?: string;
}

const BLOCK = 512;
/** Maximum size of an extended header. */
const MAX_EXTENSION = 2 ** 20;

/** The bytes of an archive, requested at increasing offsets so that a stream can provide them. */
export interface TarBytes {
  /** Name for errors. */
  name: string;
  /** Undefined if unknown. */
  size: number | undefined;
  /** @throws {UniFlowError} `BAD_INPUT` if the archive ends early. */
  read(offset: number, size: number): Promise<Buffer>;
  /** Whether the archive ends at or before this offset. */
  endsAt(offset: number): Promise<boolean>;
}

/** The files in the archive, in order. Reads only the headers. */
export async function* tarEntries(path: string, signal: AbortSignal | undefined): AsyncGenerator<TarEntry, void, undefined> {
  const file = await openFile(path);
  try {
    const { size } = await file.stat();
    const read = (offset: number, length: number): Promise<Buffer> => readExactly(file, path, offset, length);
    yield* entriesIn({ name: path, size, read, endsAt: (offset) => Promise.resolve(offset >= size) }, signal);
  } finally {
    await file.close();
  }
}

/**
 * The files in an archive, in order. The content of a file can be read before the next is requested. Blocks of zeros end an archive; if
 * another archive follows, as after `cat a.tar b.tar`, its files are read as well.
 */
export async function* entriesIn(archive: TarBytes, signal: AbortSignal | undefined): AsyncGenerator<TarEntry, void, undefined> {
  const { name: path, size: end = Infinity } = archive;
  let global: HeaderData = {};
  let next: HeaderData = {}; // extended headers, which apply to the next file
  let ended = false; // after a block of zeros
  for (let at = 0; ;) {
    throwIfAborted(signal);
    if (ended && (await archive.endsAt(at + BLOCK - 1))) return;
    const header = parseHeader(path, at, await archive.read(at, BLOCK), next, global);
    ended = header.nullBlock;
    if (ended) [at, next, global] = [at + BLOCK, {}, {}];
    if (ended) continue;
    const [offset, size] = [at + BLOCK, header.size ?? 0];
    if (offset + size > end) throw UniFlowError.expected('BAD_INPUT', path, `${offset + size} bytes or more`, `${end}: it is incomplete`);
    at = offset + Math.ceil(size / BLOCK) * BLOCK;
    const text = async (): Promise<string> => {
      if (size > MAX_EXTENSION) throw UniFlowError.expected('BAD_INPUT', path, `an extension of at most ${MAX_EXTENSION} bytes`, `${size}`);
      return (await archive.read(offset, size)).toString();
    };
    if (header.type === 'ExtendedHeader') next = Pax.parse(await text(), next);
    else if (header.type === 'GlobalExtendedHeader') global = Pax.parse(await text(), global, true);
    else if (header.type === 'NextFileHasLongPath') next = { ...next, path: (await text()).replace(/\0.*$/s, '') };
    else if (header.type !== 'NextFileHasLongLinkpath') {
      const isFile = FILES.includes(header.type);
      const error = isFile ? tooLarge(size) : ELSEWHERE.get(header.type);
      if (isFile || error !== undefined) yield { name: header.path ?? '', offset, size, ...(error !== undefined && { error }) };
      next = {};
    }
  }
}

const FILES: readonly string[] = ['File', 'OldFile', 'ContiguousFile'];
/** Node aborts the process on larger reads. */
const MOST_BYTES = 2 ** 31 - 1;

function tooLarge(size: number): string | undefined {
  return size > MOST_BYTES ? `expected at most ${MOST_BYTES} bytes, but got ${size}` : undefined;
}

/** Entry types that represent files but do not contain their content. */
const ELSEWHERE = new Map<string, string>([
  ['Link', 'expected a file, but got a hard link (tar --hard-dereference writes files)'],
  ['SymbolicLink', 'expected a file, but got a symbolic link (tar --dereference writes files)'],
  ['SparseFile', 'expected a file, but got a sparse file (tar without --sparse writes files)'],
]);

function parseHeader(path: string, at: number, block: Buffer, next: HeaderData, global: HeaderData): Header {
  let header: Header | undefined;
  try {
    header = new Header(block, 0, next, global);
  } catch {
    // reported below
  }
  if (header?.nullBlock || header?.cksumValid) return header;
  throw UniFlowError.expected('BAD_INPUT', path, `a tar header at byte ${at}`, 'other bytes');
}

/** Reads the bytes of an entry. */
export async function readEntry(path: string, { offset, size }: Pick<TarEntry, 'offset' | 'size'>): Promise<Buffer> {
  const file = await openFile(path);
  try {
    return await readExactly(file, path, offset, size);
  } finally {
    await file.close();
  }
}

function openFile(path: string): Promise<FileHandle> {
  return open(path).catch((cause: unknown) => {
    throw unreadable(path, cause);
  });
}

async function readExactly(file: FileHandle, path: string, offset: number, size: number): Promise<Buffer> {
  const error = tooLarge(size);
  if (error !== undefined) throw new UniFlowError('BAD_INPUT', `${path}: ${error}`, { subject: path });
  const { buffer, bytesRead } = await file.read(Buffer.allocUnsafe(size), 0, size, offset);
  if (bytesRead === size) return buffer;
  throw UniFlowError.expected('BAD_INPUT', path, `${size} bytes at byte ${offset}`, `${bytesRead}: it is incomplete`);
}
