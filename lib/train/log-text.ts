/** Log entries as text, for terminals and reports. */
import { shareOfCodes } from '../eval/code-use.js';
import type { LogEntryOf } from './log.js';

/** `PCA of 48 coefficients a patch, fitted to 209 images of data/: PSNR 34.19 dB, SSIM 0.9512` */
export function baselineText({ channels, fitted, psnr, ssim }: LogEntryOf<'baseline'>): string {
  const of = `${fitted.images.toLocaleString('en')} images of ${fitted.path}`;
  return `PCA of ${channels} coefficients a patch, fitted to ${of}: PSNR ${psnr.toFixed(2)} dB, SSIM ${ssim.toFixed(4)}`;
}

/** `PSNR 34.19 dB, SSIM 0.9512, effective rank 12.3, 31 % of the channels in use, 62 % of the codes used` */
export function validationText(validation: Omit<LogEntryOf<'validation'>, 'event' | 'step'>): string {
  const { psnr, ssim, effectiveRank, channelsInUse, codes } = validation;
  const rank = effectiveRank === undefined ? '' : `, effective rank ${effectiveRank.toFixed(1)}`;
  const used = channelsInUse === undefined ? '' : `, ${Math.round(100 * channelsInUse)} % of the channels in use`;
  const coded = codes === undefined ? '' : `, ${Math.round(100 * shareOfCodes(codes))} % of the codes used`;
  return `PSNR ${psnr.toFixed(2)} dB, SSIM ${ssim.toFixed(4)}${rank}${used}${coded}`;
}
