/** BMP, which libvips cannot read. */
import { decode } from 'bmp-ts';
import { UniFlowError } from '../errors.js';
import type { RgbImage } from '../sources/item.js';

/** A BMP's header: bytes 14 to 30, and the offset of the pixels. */
export interface BmpHeader {
  width: number;
  height: number;
  bits: number;
  compression: number;
  pixels: number;
  /** Whether it declares transparency bits. */
  alpha: boolean;
}

/** Values of biCompression. */
const COMPRESSION = { none: 0, rle8: 1, rle4: 2, bitfields: 3, jpeg: 4, png: 5, alphaBitfields: 6 };
const DEPTHS = [1, 4, 8, 16, 24, 32];

export function isBmp(bytes: Uint8Array): boolean {
  return bytes[0] === 0x42 && bytes[1] === 0x4d;
}

/** @throws {UniFlowError} `BAD_INPUT` if the file is damaged, `UNSUPPORTED` for kinds of BMP that no program writes today. */
export function readBmpHeader(name: string, bytes: Uint8Array): BmpHeader {
  if (bytes.length < 54) throw damaged(name, `${bytes.length} bytes`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const header = view.getUint32(14, true);
  if (header < 40) throw UniFlowError.expected('UNSUPPORTED', name, 'a BMP of Windows 3 or later', `a header of ${header} bytes`);
  const [width, height] = [view.getInt32(18, true), Math.abs(view.getInt32(22, true))];
  const [bits, compression, pixels] = [view.getUint16(28, true), view.getUint32(30, true), view.getUint32(10, true)];
  if (width <= 0 || height <= 0) throw damaged(name, `${width} x ${height} pixels`);
  const known = DEPTHS.includes(bits) && compression <= COMPRESSION.bitfields;
  if (!known) throw UniFlowError.expected('UNSUPPORTED', name, 'a BMP of 1 to 32 bits', `${bits} bits, compression ${compression}`);
  const alpha = bits === 32 && compression === COMPRESSION.bitfields && header >= 56 && view.getUint32(66, true) !== 0;
  const rows = Math.ceil((bits * width) / 32) * 4 * height;
  const isPlain = compression === COMPRESSION.none || compression === COMPRESSION.bitfields;
  if (pixels < 54 || (isPlain && bytes.length < pixels + rows)) throw damaged(name, `${bytes.length} of ${pixels + rows} bytes`);
  return { width, height, bits, compression, pixels, alpha };
}

/** Decodes to RGB, over white if the header declares transparency. */
export function decodeBmp(name: string, bytes: Uint8Array, { width, height, alpha }: BmpHeader): RgbImage {
  let decoded: { data: Uint8Array };
  try {
    decoded = decode(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength));
  } catch (error) {
    throw damaged(name, (error as Error).message);
  }
  const from = decoded.data; // alpha, blue, green, red
  if (from.length !== 4 * width * height) throw damaged(name, `${from.length} bytes of pixels`);
  const data = new Uint8Array(3 * width * height);
  for (let i = 0, j = 0; i < from.length; i += 4, j += 3) {
    const opacity = alpha ? (from[i] as number) / 255 : 1;
    for (let c = 0; c < 3; c++) data[j + c] = Math.round(255 + opacity * ((from[i + 3 - c] as number) - 255));
  }
  return { data, width, height };
}

function damaged(name: string, reason: string): UniFlowError {
  return new UniFlowError('BAD_INPUT', `${name}: the image is damaged or incomplete: ${reason}`, { subject: name });
}
