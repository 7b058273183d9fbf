/** UniFlow visual tokenizer for TypeScript. @packageDocumentation */
export { UniFlow, type EncodedBatch, type StreamItem } from './uniflow.js';
export type { Encoded, EncodeOptions, Reconstruction } from './model.js';
export type { DecodeOptions } from './decoder/options.js';
export type { Quantization, QuantizedLayer, QuantizeOptions, TokenizerQuantizeOptions } from './quantize.js';
export { VisionEncoder, type EncoderResult, type LoadOptions } from './encoder/vision-encoder.js';
export type { EmbedOptions } from './encoder/embed.js';
export type { Pool } from './encoder/pooling.js';
export type { Codes, Levels } from './codes.js';
export { presets, type Preset, type UniFlowConfig } from './config.js';
export type { EncoderConfig, Family } from './encoder/config.js';
export type { DecoderConfig } from './decoder/decoder.js';
export { timeGrid, type Schedule } from './decoder/schedule.js';
export type { ImageInput, PixelInput } from './images/input.js';
export type { ImageLike } from './images/like.js';
export { decodeImage, type ImageSource, type RgbImage } from './images/decode.js';
export { sideBySide, toImages, writeImage } from './images/write.js';
export type { Preprocessing } from './io/preprocess.js';
export type { HubOptions, HubProgress } from './io/hub.js';
export {
  cpuInfo,
  devices,
  measurePeak,
  memoryStats,
  resetPeakMemory,
  setThreads,
  trimMemory,
  type DeviceInfo,
  type DeviceOptions,
  type MemoryStats,
  type ModelType,
} from './device.js';
export * as losses from './losses/index.js';
export * from './train/index.js';
export * from './shards/index.js';
export * from './queue/index.js';
export * from './eval/index.js';
export { serve, type ServeOptions, type Service } from './serve/index.js';
export { embeddedModel } from './package.js';
export { UniFlowError, type ErrorCode, type ErrorDetails } from './errors.js';
export * as ops from './ops.js';
export { Tape } from './tape.js';
export { Tensor, tidy } from './tensor.js';
export type { Activation, DType, FloatType } from './native.js';
