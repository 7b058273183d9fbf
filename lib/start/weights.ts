/** A model's parameters as float64 matrices, to modify them before training. */
import { Matrix } from 'ml-matrix';
import { native } from '../native.js';
import { assignParameter, type Parameter } from '../parameters.js';
import { onDevice } from '../tensor.js';
import type { UniFlowModel } from '../model.js';

/** A linear layer: weight [out, in], bias [1, out]. */
export interface Layer {
  weight: Matrix;
  bias: Matrix;
}

/** Parameters by checkpoint name. The matrices modified by `change` are written back to the model. */
export class Weights {
  private readonly byName: Map<string, Parameter>;

  constructor(private readonly uniflow: Pick<UniFlowModel, 'parameters' | 'device' | 'dtype'>) {
    this.byName = new Map(uniflow.parameters.map((parameter) => [parameter.parts[0]?.name as string, parameter]));
  }

  /** Changes a linear layer. */
  async edit(layer: string, change: (layer: Layer) => void): Promise<void> {
    const [weight, bias] = await Promise.all([this.read(`${layer}.weight`), this.read(`${layer}.bias`)]);
    change({ weight, bias });
    this.write(`${layer}.weight`, weight);
    this.write(`${layer}.bias`, bias);
  }

  /** Changes a position table, [N, D]. */
  async editTable(name: string, change: (table: Matrix) => void): Promise<void> {
    const table = await this.read(name);
    change(table);
    this.write(name, table);
  }

  /** Makes a linear layer zero. */
  zero(layer: string): void {
    for (const name of [`${layer}.weight`, `${layer}.bias`]) {
      const parameter = this.byName.get(name);
      if (parameter) this.assign(parameter, new Float32Array(sizeOf(parameter)));
    }
  }

  private async read(name: string): Promise<Matrix> {
    const parameter = this.byName.get(name) as Parameter;
    const bytes = native.parameterBytes(parameter.tensor.handle, 'float32');
    const data = new Uint8Array(bytes.shape[0] as number);
    await bytes.read(data);
    bytes.dispose();
    const columns = parameter.tensor.dim(-1);
    return Matrix.from1DArray(sizeOf(parameter) / columns, columns, new Float32Array(data.buffer));
  }

  private write(name: string, matrix: Matrix): void {
    this.assign(this.byName.get(name) as Parameter, Float32Array.from(matrix.to1DArray()));
  }

  private assign(parameter: Parameter, data: Float32Array): void {
    onDevice(this.uniflow.device, () => {
      const value = native.fromHost(data, parameter.tensor.shape);
      assignParameter(parameter, value, this.uniflow.dtype);
      value.dispose();
    });
  }
}

const sizeOf = ({ tensor }: Parameter): number => tensor.shape.reduce((a, b) => a * b, 1);
