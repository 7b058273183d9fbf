/**
 * Rectified flow matching on patches, the paper's L_flow: x_t = t * data + (1 − t) * noise, target data − noise, mean squared error over all elements.
 */
import { velocity, type FlowHead } from '../decoder/flow.js';
import { native, type FloatType } from '../native.js';
import { withGradient } from '../tape.js';
import { tensorOf, type Tensor } from '../tensor.js';

/**
 * @param data patch vectors [M,P] float32. @param noise [M,P]. @param time [M]. @param condition [M,D].
 * @param options those of {@link velocity}. @returns the loss, [1].
 */
export function flowLoss(
  head: FlowHead,
  data: Tensor,
  noise: Tensor,
  time: Tensor,
  condition: Tensor,
  dtype: FloatType,
  options: { recompute?: boolean } = {},
): Tensor {
  const pair = native.interpolate(data.handle, noise.handle, time.handle);
  const [noisy, target] = [tensorOf(pair.noisy), tensorOf(pair.target)];
  return meanSquaredError(velocity(head, noisy, time, condition, dtype, options), target);
}

/** Mean of (value − target)² over all elements, [1]. */
function meanSquaredError(value: Tensor, target: Tensor): Tensor {
  const { loss, grad } = native.meanSquaredError(value.handle, target.handle);
  return withGradient(tensorOf(loss), value, tensorOf(grad));
}
