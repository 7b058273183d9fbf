/** Distance between the layers of a fine-tuned encoder and those of its teacher: the α of the distillation loss, per image. */
import type { Encoder } from '../encoder/encoder.js';
import { UniFlowError } from '../errors.js';
import { distillationLoss } from '../losses/distillation.js';
import { native } from '../native.js';
import { tensorOf, type Tensor } from '../tensor.js';

/** @throws UniFlowError `BAD_INPUT` if the layers differ in size. */
export function checkTeacher(student: Encoder, teacher: Encoder): void {
  const form = ({ config, prefix }: Encoder): string =>
    `${config.layers} layers of width ${config.width}, patches of ${config.patch} and ${prefix} tokens in front`;
  if (form(teacher) !== form(student)) throw UniFlowError.expected('BAD_INPUT', 'teacher', form(student), form(teacher));
}

/**
 * 1 − cos(student, teacher), mean over the patch tokens, computed per image so that the numbers do not depend on the batch.
 * @param student, teacher: L hidden states [B,S,D]; the first `skip` tokens are not compared. @returns [B,L]
 */
export function layerDistances(student: readonly Tensor[], teacher: readonly Tensor[], skip: number): Tensor {
  const images = (student[0] as Tensor).dim(0);
  const perImage = Array.from({ length: images }, (_, b) => {
    const one = (stack: readonly Tensor[]): Tensor[] => stack.map((state) => state.slice(b, b + 1));
    return distillationLoss(one(student), one(teacher), { skip, weights: 'uniform' }).alpha.handle;
  });
  return tensorOf(native.concat(perImage)).reshape([images, student.length]);
}
