/** Builds the OpenAPI document from the validating schemas. */
import { z } from 'zod';
import { JSON_TYPE, SAFETENSORS_TYPE } from './answers.js';
import type { Settings } from './options.js';
import { PROBLEM } from './problem.js';
import { decoded, encoded, IMAGE_TYPES, problem, reconstructed, requestSchemas } from './schemas.js';

type Json = Record<string, unknown>;

const BINARY: Json = { schema: { type: 'string', format: 'binary' } };
const REFUSALS: Record<number, string> = {
  400: 'The body cannot be parsed.',
  401: 'The token is missing or wrong.',
  406: 'No such form of the answer.',
  408: 'The request was sent too slowly.',
  413: 'The body is too large, or has too many images.',
  415: 'No such form of the request, or it is compressed.',
  422: 'An image or an option is wrong; which one is said.',
  500: 'The service failed.',
  502: 'A URL could not be fetched.',
  503: 'The service is busy or stops: Retry-After says when to come back.',
};

export function openApi(settings: Settings, version: string): Json {
  const schemas = requestSchemas(settings);
  const images = Object.fromEntries(IMAGE_TYPES.map((type) => [type, BINARY]));
  const raw = { 'image/*': BINARY, [SAFETENSORS_TYPE]: BINARY };
  const path = (
    summary: string,
    schema: { body: z.ZodType; options: z.ZodType },
    accepts: Json,
    answer: z.ZodType,
    others: Json,
  ): Json => ({
    post: {
      summary,
      parameters: [optionsParameter(schema.options)],
      requestBody: { required: true, content: requestContent(schema, accepts) },
      responses: { 200: { description: 'Done.', content: { [JSON_TYPE]: media(answer, 'output'), ...others } }, ...refusals() },
    },
  });
  return {
    openapi: '3.1.0',
    info: { title: 'UniFlow tokenizer', version, description: 'Images to latents, and back.' },
    ...(settings.token === undefined ? {} : { security: [{ token: [] }] }),
    paths: {
      '/v1/encode': path('Images to latents.', schemas.encode, raw, encoded, { [SAFETENSORS_TYPE]: BINARY }),
      '/v1/decode': path('Latents to images.', schemas.decode, { [SAFETENSORS_TYPE]: BINARY }, decoded, images),
      '/v1/reconstruct': path('Images to latents and back, with PSNR and SSIM.', schemas.reconstruct, raw, reconstructed, images),
      ...(settings.page
        ? { '/': { get: { summary: 'A page for browsers.', security: [], responses: { 200: text('HTML.', 'text/html') } } } }
        : {}),
      '/healthz': probe('Whether the process is alive.'),
      '/readyz': probe('Whether it takes requests: 503 while its queue is full or it stops.', { 503: refusal('Not now.') }),
      '/metrics': { get: { summary: 'For Prometheus.', responses: { 200: text('Prometheus text format.') } } },
      '/openapi.json': { get: { summary: 'This document.', responses: { 200: { description: 'OpenAPI 3.1.' } } } },
    },
    components: {
      schemas: { Problem: jsonSchema(problem, 'output') },
      ...(settings.token === undefined ? {} : { securitySchemes: { token: { type: 'http', scheme: 'bearer' } } }),
    },
  };
}

function requestContent({ body, options }: { body: z.ZodType; options: z.ZodType }, raw: Json): Json {
  const json = jsonSchema(body, 'input');
  const optionsSchema = jsonSchema(options, 'input');
  const file = { type: 'string', format: 'binary' };
  const form = { type: 'object', properties: { files: { type: 'array', items: file }, options: optionsSchema }, required: ['files'] };
  return {
    [JSON_TYPE]: { schema: { ...json, properties: { ...(json['properties'] as Json), options: optionsSchema } } },
    'multipart/form-data': { schema: form, encoding: { options: { contentType: JSON_TYPE } } },
    ...raw,
  };
}

function optionsParameter(options: z.ZodType): Json {
  const description = 'Options of a body that is one file; other bodies have them inside.';
  return { name: 'options', in: 'query', description, content: { [JSON_TYPE]: media(options, 'input') } };
}

function media(schema: z.ZodType, io: 'input' | 'output'): Json {
  return { schema: jsonSchema(schema, io) };
}

function jsonSchema(schema: z.ZodType, io: 'input' | 'output'): Json {
  const json = z.toJSONSchema(schema, { io }) as Json;
  delete json['$schema']; // the document declares it once
  return json;
}

function refusals(): Json {
  return Object.fromEntries(Object.entries(REFUSALS).map(([status, description]) => [status, refusal(description)]));
}

function refusal(description: string): Json {
  return { description, content: { [PROBLEM]: { schema: { $ref: '#/components/schemas/Problem' } } } };
}

function probe(summary: string, others: Json = {}): Json {
  return { get: { summary, security: [], responses: { 200: text('Yes.'), ...others } } };
}

function text(description: string, type = 'text/plain'): Json {
  return { description, content: { [type]: { schema: { type: 'string' } } } };
}
