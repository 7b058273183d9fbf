/**
 * Cross-entropy with one label per row: mean of −log softmax(logits)[label], natural logarithm. Contract and cost are in native/ops/losses.h, the kernel is
 * native/cpu/cross_entropy.cpp.
 */
import { native } from '../native.js';
import { withGradient } from '../tape.js';
import { tensorOf, type Tensor } from '../tensor.js';

/**
 * Queues the loss and, if a tape records, its derivative.
 * @param logits [M,C] float32 or bfloat16. @param labels int32 [M], 0 to C − 1; any other label fails both results.
 * @returns the mean loss [1], and the number of rows whose label is the largest logit [1] (the first, if several are equal).
 * @throws UniFlowError `BAD_INPUT` if the shapes do not match.
 */
export function crossEntropy(logits: Tensor, labels: Tensor): { loss: Tensor; correct: Tensor } {
  const { loss, grad, correct } = native.crossEntropy(logits.handle, labels.handle);
  return { loss: withGradient(tensorOf(loss), logits, tensorOf(grad)), correct: tensorOf(correct) };
}
