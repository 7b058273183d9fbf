/** DINOv2 in ONNX, for images of the size that its positions were trained for. */
import type { EncoderConfig } from '../../lib/encoder/config.js';
import { families } from '../../lib/encoder/families.js';
import { MICROSOFT, transposed, type Attribute, type FloatArray, type Graph, type IntArray, type Node } from './onnx.js';

/** Weights by their names in the checkpoint. */
export type Weights = ReadonlyMap<string, FloatArray>;

/**
 * exported: products of [B,S,D] and attention of single operators, as written by PyTorch's exporter and recognised by ONNX Runtime's
 * optimiser.
 * fused: Gemm over all tokens, which adds the bias, and ONNX Runtime's own attention.
 * Which one is faster depends on the width and the batch. Other forms were never the fastest on a CPU: SkipLayerNormalization (slower than
 * the two operators that it replaces), Attention with its own projection, one product for query, key and value.
 */
export const forms = ['exported', 'fused'] as const;
export type Form = (typeof forms)[number];

/** A sequence of operators, each with one uniquely named output. */
class Draft {
  readonly nodes: Node[] = [];
  readonly initializers: Record<string, FloatArray | IntArray> = {};
  private count = 0;

  constant(array: FloatArray | IntArray): string {
    const name = `constant${this.count++}`;
    this.initializers[name] = array;
    return name;
  }

  op(op: string, inputs: string[], attributes: Record<string, Attribute> = {}, domain = ''): string {
    const name = `value${this.count++}`;
    this.nodes.push({ op, inputs, outputs: [name], attributes, domain });
    return name;
  }

  reshape(x: string, ...shape: number[]): string {
    return this.op('Reshape', [x, this.constant({ data: BigInt64Array.from(shape, BigInt), shape: [shape.length] })]);
  }

  transpose(x: string, ...perm: number[]): string {
    return this.op('Transpose', [x], { perm });
  }
}

/** From `pixel_values` [B,3,H,W], normalised, to `last_hidden_state` [B,S,D], the names that transformers.js uses. */
export function dinoV2Graph(config: EncoderConfig, weights: Weights, batch: number, form: Form): Graph {
  return new DinoV2(config, weights, batch, form).graph();
}

class DinoV2 extends Draft {
  private readonly names = families.dinov2;
  private readonly patches: number;
  private readonly seq: number;

  constructor(
    private readonly config: EncoderConfig,
    private readonly weights: Weights,
    private readonly batch: number,
    private readonly form: Form,
  ) {
    super();
    const [height, width] = config.imageSize;
    this.patches = (height / config.patch) * (width / config.patch);
    this.seq = this.patches + 1;
  }

  graph(): Graph {
    const { batch, seq, config } = this;
    let h = this.embedding();
    for (let i = 0; i < config.layers; i++) h = this.block(h, i);
    const last = this.reshapeFlat(this.norm(h, this.names.finalNorm as string), batch, seq, config.width);
    this.nodes.push({ op: 'Identity', inputs: [last], outputs: ['last_hidden_state'] });
    return {
      ...{ nodes: this.nodes, initializers: this.initializers },
      inputs: { pixel_values: [batch, 3, ...config.imageSize] },
      outputs: { last_hidden_state: [batch, seq, config.width] },
    };
  }

  private embedding(): string {
    const { batch, patches, config } = this;
    const side = [config.patch, config.patch];
    const kernel = [this.weight(`${this.names.patch}.weight`), this.weight(`${this.names.patch}.bias`)];
    const maps = this.op('Conv', ['pixel_values', ...kernel], { kernel_shape: side, strides: side });
    const tokens = this.transpose(this.reshape(maps, batch, config.width, patches), 0, 2, 1);
    const all = this.op('Concat', [this.classTokens(), tokens], { axis: 1 });
    return this.flat(this.op('Add', [all, this.weight(this.names.position!.name)]));
  }

  private classTokens(): string {
    const one = this.array(this.names.classToken!.name).data;
    const data = new Float32Array(this.batch * one.length);
    for (let i = 0; i < this.batch; i++) data.set(one, i * one.length);
    return this.constant({ data, shape: [this.batch, 1, one.length] });
  }

  private block(h: string, i: number): string {
    const layer = this.names.layer(i, this.config);
    const qkv = layer.qkv as readonly [string, string, string];
    const u = this.norm(h, layer.norm1);
    const mixed = this.attention(...(qkv.map((name) => this.linear(u, name)) as [string, string, string]));
    h = this.op('Add', [this.linear(mixed, layer.proj, layer.scale1), h]);
    const hidden = this.op('Gelu', [this.linear(this.norm(h, layer.norm2), layer.fc1 as string)]);
    return this.op('Add', [this.linear(hidden, layer.fc2, layer.scale2), h]);
  }

  private attention(q: string, k: string, v: string): string {
    const { batch, seq, config } = this;
    const { heads, width } = config;
    if (this.form === 'fused') {
      const operands = [q, k, v].map((x) => this.reshape(x, batch, seq, width));
      return this.flat(this.op('MultiHeadAttention', operands, { num_heads: heads }, MICROSOFT));
    }
    const byHead = (x: string, ...perm: number[]): string => this.transpose(this.reshape(x, batch, seq, heads, width / heads), ...perm);
    const scale = this.constant({ data: Float32Array.of(Math.sqrt(heads / width)), shape: [] });
    const scores = this.op('Mul', [this.op('MatMul', [byHead(q, 0, 2, 1, 3), byHead(k, 0, 2, 3, 1)]), scale]);
    const mixed = this.op('MatMul', [this.op('Softmax', [scores], { axis: 3 }), byHead(v, 0, 2, 1, 3)]);
    return this.reshape(this.transpose(mixed, 0, 2, 1, 3), batch, seq, width);
  }

  private norm(x: string, name: string): string {
    const attributes = { axis: this.form === 'fused' ? 1 : 2, epsilon: { float: this.config.eps } };
    return this.op('LayerNormalization', [x, this.weight(`${name}.weight`), this.weight(`${name}.bias`)], attributes);
  }

  /** Folds LayerScale into the weight and the bias, an optimisation that a user would do once in advance. */
  private linear(x: string, name: string, scale?: string): string {
    const scales = scale === undefined ? undefined : this.array(scale).data;
    const scaled = ({ data, shape }: FloatArray): FloatArray =>
      scales ? { data: data.map((value, i) => value * (scales[i % scales.length] as number)), shape } : { data, shape };
    const weight = this.constant(scaled(transposed(this.array(`${name}.weight`))));
    const bias = this.constant(scaled(this.array(`${name}.bias`)));
    return this.form === 'fused' ? this.op('Gemm', [x, weight, bias]) : this.op('Add', [this.op('MatMul', [x, weight]), bias]);
  }

  /** [B,S,D] → [B*S,D], if the form flattens all tokens. */
  private flat(x: string): string {
    return this.reshapeFlat(x, this.batch * this.seq, this.config.width);
  }

  private reshapeFlat(x: string, ...shape: number[]): string {
    return this.form === 'fused' ? this.reshape(x, ...shape) : x;
  }

  private weight(name: string): string {
    return this.constant(this.array(name));
  }

  private array(name: string): FloatArray {
    const array = this.weights.get(name);
    if (!array) throw new Error(`No weight ${name}`);
    return array;
  }
}
