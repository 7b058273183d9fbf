/** Output to Amazon S3 and compatible stores. Loaded only if an s3:// URL is used. */
import {
  CopyObjectCommand,
  DeleteObjectCommand,
  GetObjectCommand,
  HeadBucketCommand,
  HeadObjectCommand,
  paginateListObjectsV2,
  S3Client,
} from '@aws-sdk/client-s3';
import { Upload } from '@aws-sdk/lib-storage';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { buffer } from 'node:stream/consumers';
import { UniFlowError } from '../errors.js';
import type { ByteRange, Output } from './output.js';

type Chunks = Iterable<Uint8Array> | AsyncIterable<Uint8Array>;

/** Size of an upload part. The SDK holds up to {@link PARTS_AT_ONCE} in memory. A file has at most 10,000 parts: 160 GiB. */
const PART_BYTES = 16 * 2 ** 20;
const PARTS_AT_ONCE = 2;
const ATTEMPTS = 5;
const CONNECT_TIMEOUT = 5_000;
/** Milliseconds without traffic after which an attempt fails. Stores may be silent while copying large objects. */
const SILENCE = 120_000;

export class S3Output implements Output {
  readonly scratch = join(tmpdir(), 'uniflow-s3');

  private constructor(
    readonly name: string,
    private readonly client: S3Client,
    private readonly bucket: string,
    /** Ends with '/' unless empty. */
    private readonly prefix: string,
  ) {}

  /**
   * Opens `s3://bucket/prefix`; the bucket must exist. Credentials, region and endpoint are resolved by the SDK: AWS_ACCESS_KEY_ID,
   * AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, profiles, roles. A custom endpoint is addressed in path style.
   *
   * @throws {UniFlowError} `BAD_INPUT` for a malformed URL, `NETWORK` if the bucket cannot be reached.
   */
  static async open(url: string, silence = SILENCE): Promise<S3Output> {
    const [, bucket, prefix = ''] = /^s3:\/\/([^/]+)(?:\/+(.*?))?\/*$/.exec(url) ?? [];
    if (bucket === undefined) throw UniFlowError.expected('BAD_INPUT', 'out', 's3://bucket/prefix', `'${url}'`);
    const { AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION } = process.env;
    const own = Boolean(AWS_ENDPOINT_URL_S3 ?? AWS_ENDPOINT_URL);
    const region = own && !AWS_REGION ? { region: 'us-east-1' } : {}; // other stores ignore the region, but the SDK requires one
    const requestHandler = { connectionTimeout: CONNECT_TIMEOUT, socketTimeout: silence }; // the SDK has no timeout by default
    const client = new S3Client({ forcePathStyle: own, maxAttempts: ATTEMPTS, requestHandler, ...region });
    const output = new S3Output(url, client, bucket, prefix && `${prefix}/`);
    await output.send('', () => client.send(new HeadBucketCommand({ Bucket: bucket })));
    return output;
  }

  async write(name: string, chunks: Chunks): Promise<void> {
    await this.send(name, () => this.upload(name, chunks));
  }

  /**
   * If the store does not support If-None-Match, two concurrent calls may both return true. The file is held in memory, which is fine
   * because it is small.
   */
  async create(name: string, chunks: Chunks): Promise<boolean> {
    if ((await this.size(name)) !== undefined) return false;
    const bytes = await buffer(Readable.from(chunks, { objectMode: false }));
    try {
      await this.upload(name, [bytes], { IfNoneMatch: '*' });
      return true;
    } catch (error) {
      if (statusOf(error) === 501) return this.write(name, [bytes]).then(() => true); // stores without support for the condition answer 501
      // 412: the object exists; 409: another write is in progress
      if ([409, 412].includes(statusOf(error) ?? 0) && (await this.size(name)) !== undefined) return false;
      throw this.failure(name, error);
    }
  }

  async move(from: string, to: string): Promise<void> {
    const source = [this.bucket, ...(this.prefix + from).split('/')].map(encodeURIComponent).join('/');
    await this.send(to, () => this.client.send(new CopyObjectCommand({ ...this.keyOf(to), CopySource: source })));
    await this.remove(from);
  }

  async read(name: string, range?: ByteRange): Promise<Buffer> {
    if (range && range.end <= range.begin) return Buffer.alloc(0);
    return this.send(name, async () => {
      const part = range ? { Range: `bytes=${range.begin}-${range.end - 1}` } : {};
      const { Body } = await this.client.send(new GetObjectCommand({ ...this.keyOf(name), ...part }));
      const bytes = Buffer.from((await Body?.transformToByteArray()) ?? []);
      if (!range || bytes.length === range.end - range.begin) return bytes;
      throw UniFlowError.expected('BAD_INPUT', this.urlOf(name), `${range.end} bytes or more`, `${range.begin + bytes.length}`);
    });
  }

  async list(prefix: string): Promise<string[]> {
    return this.send(prefix, async () => {
      const names: string[] = [];
      for await (const { Contents } of paginateListObjectsV2(
        { client: this.client },
        { Bucket: this.bucket, Prefix: this.prefix + prefix },
      ))
        for (const { Key } of Contents ?? []) names.push((Key as string).slice(this.prefix.length));
      return names.sort();
    });
  }

  async size(name: string): Promise<number | undefined> {
    try {
      return (await this.client.send(new HeadObjectCommand(this.keyOf(name)))).ContentLength ?? 0;
    } catch (error) {
      if (statusOf(error) === 404) return undefined;
      throw this.failure(name, error);
    }
  }

  async remove(name: string): Promise<void> {
    await this.send(name, () => this.client.send(new DeleteObjectCommand(this.keyOf(name))));
  }

  private async upload(name: string, chunks: Chunks, condition: { IfNoneMatch?: string } = {}): Promise<void> {
    const params = { ...this.keyOf(name), Body: Readable.from(chunks, { objectMode: false }), ...condition };
    await new Upload({ client: this.client, params, partSize: PART_BYTES, queueSize: PARTS_AT_ONCE }).done();
  }

  private keyOf(name: string): { Bucket: string; Key: string } {
    return { Bucket: this.bucket, Key: this.prefix + name };
  }

  private urlOf(name: string): string {
    return `s3://${this.bucket}/${this.prefix}${name}`;
  }

  private async send<T>(name: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      throw this.failure(name, error);
    }
  }

  private failure(name: string, cause: unknown): UniFlowError {
    if (cause instanceof UniFlowError) return cause;
    const subject = this.urlOf(name);
    if (statusOf(cause) === 404) return UniFlowError.expected('NOT_FOUND', subject, 'an object', 'none', cause);
    const { name: kind, message } = cause as Error;
    const why = [kind === 'Unknown' ? `HTTP ${statusOf(cause)}` : kind, message].filter(
      (text) => !['', 'Error', 'UnknownError'].includes(text),
    );
    return new UniFlowError('NETWORK', `${subject}: ${why.join(': ')}`, { subject, cause });
  }
}

function statusOf(error: unknown): number | undefined {
  return (error as { $metadata?: { httpStatusCode?: number } } | undefined)?.$metadata?.httpStatusCode;
}
