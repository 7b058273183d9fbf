/**
 * The range of a quantised channel (native/ops/codes.h), fitted to a normal latent z of variance 1. The encoder gives x = gain · z + offset, which becomes the
 * latent q; the decoder takes slope · q + intercept, the linear map of q with the least mean squared error from z. The offset undoes the shift of an even
 * number of levels, so that the levels are symmetric about z = 0; the intercept adds the missing half level.
 */
export interface QuantiserFit {
  gain: number;
  offset: number;
  slope: number;
  intercept: number;
}

/** As in native/ops/codes.cpp. */
const MARGIN = 1e-3;
/** Numerical integration over the normal density. */
const [EDGE, STEPS] = [6, 1024];
const POINTS = Array.from({ length: STEPS }, (_, i) => EDGE * ((2 * i + 1) / STEPS - 1));
const GAINS = Array.from({ length: 180 }, (_, i) => 0.1 * 1.02 ** i); // 0.1 to 3.5

/** @param level number of values of the channel. */
export function fitQuantiser(level: number): QuantiserFit {
  const half = Math.floor(level / 2);
  const middle = level % 2 === 0 ? 0.5 : 0;
  const range = ((level - 1) * (1 + MARGIN)) / 2;
  let best = { explained: -1, gain: 0, scale: 0 };
  for (const gain of GAINS) {
    let [zv, vv, zz] = [0, 0, 0];
    for (const z of POINTS) {
      const density = Math.exp(-(z * z) / 2);
      const value = Math.round(range * Math.tanh(gain * z) - middle) + middle; // of the digit, from the middle
      zv += density * z * value;
      vv += density * value * value;
      zz += density * z * z;
    }
    const explained = vv > 0 ? zv ** 2 / (vv * zz) : 0;
    if (explained > best.explained) best = { explained, gain, scale: vv > 0 ? zv / vv : 0 };
  }
  const { gain, scale } = best;
  return { gain, offset: -Math.atanh(middle / range), slope: scale * half, intercept: scale * middle };
}
