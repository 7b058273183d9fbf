/** Mean and variance of each channel, accumulated over any number of parts. */
import { native } from '../native.js';

/** Moments of `count` latent vectors: the mean and the sum of squared deviations, per channel. */
export interface Moments {
  count: number;
  mean: number[];
  m2: number[];
}

/** Moments of latents [..., Z], computed in float64. */
export async function momentsOf(latents: Float32Array, channels: number): Promise<Moments> {
  const [mean, m2] = [new Float64Array(channels), new Float64Array(channels)];
  await native.moments(latents, channels, mean, m2);
  return { count: latents.length / channels, mean: [...mean], m2: [...m2] };
}

/** Combines the moments of two parts by Chan, Golub and LeVeque's update, in float64. */
export function mergeMoments(a: Moments | undefined, b: Moments): Moments {
  if (!a) return b;
  const count = a.count + b.count;
  const part = b.count / count;
  const delta = b.mean.map((mean, c) => mean - (a.mean[c] as number));
  return {
    count,
    mean: a.mean.map((mean, c) => mean + (delta[c] as number) * part),
    m2: a.m2.map((m2, c) => m2 + (b.m2[c] as number) + (delta[c] as number) ** 2 * a.count * part),
  };
}
