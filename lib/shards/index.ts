/** Encodes many images to shards of latents, and reads them back. docs/shards.md has the layout. */
export { encodeToShards } from './worker.js';
export type { PlanResult, RunOptions, RunProgress, RunResult } from './run.js';
export { embedToFile, type EmbeddingFileOptions, type EmbeddingFileResult } from './embeddings.js';
export { openShards, type ReadOptions, type Shards, type ShardSample } from './reader.js';
export { openSource, unique, type Source } from '../sources/source.js';
export { ShardEncoder, type EncodeShardOptions, type FileRecord, type ShardOptions, type ShardRecord } from './shard.js';
export { headerOf, seal, type Header, type Manifest } from './manifest.js';
export { openOutput } from './open-output.js';
export { FolderOutput, type ByteRange, type Output } from './output.js';
export type { DownloadOptions } from '../sources/url.js';
export type { Fit, Placement } from '../images/fit.js';
export type { FormatName } from './formats/index.js';
export type { Utilisation } from './meter.js';
export type { Item, ItemImage, ItemImage as Picture } from '../sources/item.js';
export type { StoreType } from './store.js';
