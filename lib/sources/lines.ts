/** Reads lines of a text file, with any line ending and any Unicode encoding. */
import { createReadStream } from 'node:fs';
import { UniFlowError } from '../errors.js';
import { unreadable } from './files.js';

/** A line and its number, from 1. */
export interface Line {
  line: string;
  number: number;
}

/** Maximum length of a line, to detect files that are not lists. */
const MAX_LINE = 2 ** 20;

/** @throws {UniFlowError} `BAD_INPUT` if a line has more than a million characters. */
export async function* linesOf(path: string): AsyncGenerator<Line, void, undefined> {
  let number = 0;
  let rest = '';
  for await (const text of textOf(path)) {
    const lines = (rest + text).split(/\r\n|\n|\r(?!$)/); // a CR at the end may be the first half of CRLF
    rest = lines.pop() as string;
    if (rest.length > MAX_LINE)
      throw UniFlowError.expected('BAD_INPUT', `${path}, line ${number + lines.length + 1}`, `at most ${MAX_LINE} characters`, 'more');
    for (const line of lines) yield { line, number: ++number };
  }
  for (const line of rest.split('\r')) yield { line, number: ++number };
}

/** Decodes UTF-8, or UTF-16 if the file starts with its byte order mark. */
async function* textOf(path: string): AsyncGenerator<string, void, undefined> {
  let decoder: InstanceType<typeof TextDecoder> | undefined;
  try {
    for await (const chunk of createReadStream(path) as AsyncIterable<Buffer>) {
      decoder ??= new TextDecoder(
        chunk[0] === 0xff && chunk[1] === 0xfe ? 'utf-16le' : chunk[0] === 0xfe && chunk[1] === 0xff ? 'utf-16be' : 'utf-8',
      );
      yield decoder.decode(chunk, { stream: true });
    }
    if (decoder) yield decoder.decode();
  } catch (cause) {
    throw cause instanceof UniFlowError ? cause : unreadable(path, cause);
  }
}
