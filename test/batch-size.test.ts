/** The number of images of a batch, where none is given. */
import { describe, expect, test } from '@jest/globals';
import { checkBatchSize, defaultBatchSize } from '../lib/gather.js';
import { failure } from './support.js';

describe('the default batch', () => {
  test.each([
    ['cpu', 1024, 4],
    ['cpu', 256, 16],
    ['cpu', 4, 64],
    ['cpu', 100_000, 1],
    ['cuda:0', 1024, 32],
    ['cuda:0', 256, 128],
    ['cuda:1', 4, 256],
    ['cuda:0', 100_000, 1],
  ])('on %s has images of %i tokens: %i', (device, tokens, images) => {
    expect(defaultBatchSize(tokens, device)).toBe(images);
    expect(checkBatchSize(undefined, tokens, device)).toBe(images);
    expect(checkBatchSize(3, tokens, device)).toBe(3);
  });

  test.each([0, -1, 1.5, NaN])('is no excuse for %p', async (batchSize) => {
    const error = await failure(Promise.resolve().then(() => checkBatchSize(batchSize, 1024, 'cuda:0')));
    expect(error.code).toBe('BAD_INPUT');
  });
});
