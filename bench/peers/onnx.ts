/**
 * Writes ONNX models with a minimal protocol buffers encoder.
 *
 * A message is a sequence of fields: a key, (number << 3) | wire type, followed by the value. Wire type 0 is an integer of 7 bits per byte,
 * lowest first, with the eighth bit set on all bytes except the last; 5 is four bytes; 2 is a length and that many bytes: text, raw data,
 * or a nested message. Field numbers are those of onnx.proto, and functions are named after its messages.
 */

type Field = Buffer;

function varint(value: number): Buffer {
  const bytes: number[] = [];
  for (; value >= 0x80; value = Math.floor(value / 0x80)) bytes.push((value % 0x80) | 0x80);
  return Buffer.from([...bytes, value]);
}

const key = (number: number, wireType: number): Buffer => varint(number * 8 + wireType);
const integer = (number: number, value: number): Field => Buffer.concat([key(number, 0), varint(value)]);
const bytes = (number: number, value: Uint8Array): Field => Buffer.concat([key(number, 2), varint(value.length), value]);
const text = (number: number, value: string): Field => bytes(number, Buffer.from(value));
const message = (number: number, ...fields: Field[]): Field => bytes(number, Buffer.concat(fields));

function float(number: number, value: number): Field {
  const encoded = Buffer.alloc(4);
  encoded.writeFloatLE(value);
  return Buffer.concat([key(number, 5), encoded]);
}

const [FLOAT_TENSOR, INT64_TENSOR] = [1, 7]; // TensorProto.DataType
const [FLOAT_ATTRIBUTE, INT_ATTRIBUTE, INTS_ATTRIBUTE] = [1, 2, 7]; // AttributeProto.AttributeType
/** The domain of ONNX Runtime's own operators. */
export const MICROSOFT = 'com.microsoft';
const IR_VERSION = 10;
const OPSET = 21;

/** Non-negative integers, lists of them, or explicitly marked floats. */
export type Attribute = number | readonly number[] | { float: number };

export interface Node {
  op: string;
  inputs: string[];
  outputs: string[];
  /** Default: ONNX's own operators. */
  domain?: string;
  attributes?: Record<string, Attribute>;
}

function attributeProto([name, value]: [string, Attribute]): Field[] {
  if (typeof value === 'number') return [text(1, name), integer(3, value), integer(20, INT_ATTRIBUTE)];
  if ('float' in value) return [text(1, name), float(2, value.float), integer(20, FLOAT_ATTRIBUTE)];
  return [text(1, name), ...value.map((n) => integer(8, n)), integer(20, INTS_ATTRIBUTE)];
}

function nodeProto({ op, inputs, outputs, domain = '', attributes = {} }: Node): Field[] {
  return [
    ...inputs.map((name) => text(1, name)),
    ...outputs.map((name) => text(2, name)),
    text(4, op),
    ...Object.entries(attributes).map((attribute) => message(5, ...attributeProto(attribute))),
    text(7, domain),
  ];
}

export interface FloatArray {
  data: Float32Array;
  shape: readonly number[];
}

/** [rows, cols] → [cols, rows]. */
export function transposed({ data, shape }: FloatArray): FloatArray {
  const [rows, cols] = shape as [number, number];
  const out = new Float32Array(data.length);
  for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) out[c * rows + r] = data[r * cols + c] as number;
  return { data: out, shape: [cols, rows] };
}

/** An operand that contains a shape. */
export interface IntArray {
  data: BigInt64Array;
  shape: readonly number[];
}

/** Raw data is little-endian; this machine is assumed to be too. */
function tensorProto(name: string, { data, shape }: FloatArray | IntArray): Field[] {
  const raw = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  const type = data instanceof BigInt64Array ? INT64_TENSOR : FLOAT_TENSOR;
  return [...shape.map((n) => integer(1, n)), integer(2, type), text(8, name), bytes(9, raw)];
}

/** TypeProto { tensor_type { elem_type, shape { dim { dim_value } ... } } } */
function valueInfoProto(name: string, shape: readonly number[]): Field[] {
  const dimensions = shape.map((n) => message(1, integer(1, n)));
  return [text(1, name), message(2, message(1, integer(1, FLOAT_TENSOR), message(2, ...dimensions)))];
}

const operatorSet = (domain: string, version: number): Field => message(8, text(1, domain), integer(2, version));

export interface Graph {
  nodes: Node[];
  /** Shapes of inputs and outputs, all float32. */
  inputs: Record<string, readonly number[]>;
  outputs: Record<string, readonly number[]>;
  /** Weights. */
  initializers?: Record<string, FloatArray | IntArray>;
}

/** A serialised ModelProto. */
export function onnxModel({ nodes, inputs, outputs, initializers = {} }: Graph): Uint8Array {
  const graph = [
    ...nodes.map((node) => message(1, ...nodeProto(node))),
    text(2, 'bench'),
    ...Object.entries(initializers).map(([name, array]) => message(5, ...tensorProto(name, array))),
    ...Object.entries(inputs).map(([name, shape]) => message(11, ...valueInfoProto(name, shape))),
    ...Object.entries(outputs).map(([name, shape]) => message(12, ...valueInfoProto(name, shape))),
  ];
  return Buffer.concat([integer(1, IR_VERSION), message(7, ...graph), operatorSet('', OPSET), operatorSet(MICROSOFT, 1)]);
}
