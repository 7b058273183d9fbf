/** The meaning of a TIFF's samples. libvips guesses where its own metadata does not say. */
import { UniFlowError } from '../errors.js';

/** Tags of TIFF 6.0, and their default values. */
const TAGS: Record<number, readonly [name: string, fallback: readonly number[]]> = {
  258: ['bits', [1]],
  262: ['photometric', [1]],
  277: ['samples', [1]],
  338: ['extra', []],
  339: ['format', [1]],
};

/** Number of colours of each photometric interpretation. */
const COLOURS: Record<number, number> = { 0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3 };
const NAMES: Record<number, string> = { 4: 'a mask', 8: 'CIELAB', 9: 'CIELAB', 10: 'CIELAB', 32803: 'a camera raw', 34892: 'a camera raw' };
const FORMATS: Record<number, string> = { 2: 'signed', 3: 'float', 5: 'complex', 6: 'complex' };
const BITS = [1, 2, 4, 8, 16];
/** Values of ExtraSamples for associated and unassociated alpha. */
const ALPHA = [1, 2];
/** Size in bytes of each type that these tags use. */
const TYPE_BYTES: Record<number, number> = { 1: 1, 3: 2, 4: 4, 16: 8 };

export function isTiff(bytes: Uint8Array): boolean {
  const start = Buffer.from(bytes.subarray(0, 2)).toString('latin1');
  return start === 'II' || start === 'MM';
}

/**
 * Whether the fourth band (of grey images, the second) is transparency. Other bands after the colours are dropped, as in Pillow.
 * @throws {UniFlowError} `UNSUPPORTED` for float, signed and 12-bit samples, CIELAB, camera raws, and grey with several bands.
 */
export function tiffHasAlpha(name: string, bytes: Uint8Array): boolean {
  const { bits, photometric, samples, extra, format } = readTags(bytes);
  const refuse = (actual: string): UniFlowError =>
    UniFlowError.expected('UNSUPPORTED', name, 'a TIFF of grey, RGB, palette or CMYK, unsigned integers of up to 8 or 16 bits', actual);
  const [kind = 1] = photometric;
  const [count = 1] = samples;
  const colours = COLOURS[kind];
  const odd = format.find((f) => f !== 1 && f !== 4);
  if (odd !== undefined) throw refuse(`${FORMATS[odd] ?? 'unknown'} samples of ${bits[0]} bits`);
  const depth = bits.find((b) => !BITS.includes(b) || b !== bits[0]);
  if (depth !== undefined) throw refuse(`samples of ${[...new Set(bits)].join(' and ')} bits`);
  if (colours === undefined) throw refuse(NAMES[kind] ?? `photometric interpretation ${kind}`);
  if (count < colours || (colours === 1 && count > 2))
    throw refuse(`${count} bands, ${colours} of them ${colours === 1 ? 'grey' : 'colours'}`);
  return count > colours && ALPHA.includes(extra[0] ?? 0);
}

type Tags = Record<'bits' | 'photometric' | 'samples' | 'extra' | 'format', readonly number[]>;

/** Reads the tags of the first directory. Unreadable tags are left to libvips, which reports the damage. */
function readTags(bytes: Uint8Array): Tags {
  const tags = Object.fromEntries(Object.values(TAGS)) as unknown as Tags;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const little = bytes[0] === 0x49;
  try {
    const big = view.getUint16(2, little) === 43; // BigTIFF
    const word = (at: number): number => (big ? Number(view.getBigUint64(at, little)) : view.getUint32(at, little));
    const directory = word(big ? 8 : 4);
    const entries = big ? Number(view.getBigUint64(directory, little)) : view.getUint16(directory, little);
    const [head, size, inline] = big ? [8, 20, 8] : [2, 12, 4];
    for (let i = 0; i < Math.min(entries, 4096); i++) {
      const at = directory + head + i * size;
      const tag = TAGS[view.getUint16(at, little)];
      const type = view.getUint16(at + 2, little);
      const count = word(at + 4);
      const width = TYPE_BYTES[type];
      if (!tag || width === undefined || count > 4096) continue;
      const place = at + 4 + inline;
      const begin = count * width <= inline ? place : word(place);
      (tags as Record<string, readonly number[]>)[tag[0]] = Array.from({ length: count }, (_, n) =>
        valueAt(view, begin + n * width, width, little),
      );
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return tags;
}

function valueAt(view: DataView, at: number, width: number, little: boolean): number {
  if (width === 1) return view.getUint8(at);
  if (width === 2) return view.getUint16(at, little);
  return width === 4 ? view.getUint32(at, little) : Number(view.getBigUint64(at, little));
}
