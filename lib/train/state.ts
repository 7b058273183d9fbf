/** The state of a stopped training: every float32 tensor of the optimizer and the position, in one safetensors file. */
import { UniFlowError } from '../errors.js';
import { valueBytes } from '../io/checkpoint.js';
import { replaceFile, safetensorsHeader } from '../io/files.js';
import { native, type TensorHandle } from '../native.js';
import type { Trainer, TrainerPosition } from './trainer.js';

const FORMAT = 'uniflow-training-1';

/** Whose state it is. */
export type Resumable = Pick<Trainer, 'state' | 'restore'>;

/**
 * Writes the trainer's state. The file appears complete and durable, or the old one stays.
 * @param pins values that must not change when the training is resumed.
 * @throws UniFlowError `BAD_INPUT` if it cannot be written (a full disk, no permission).
 */
export async function saveState(path: string, trainer: Resumable, pins: Record<string, unknown>): Promise<void> {
  const { tensors, position } = trainer.state();
  const metadata = { format: FORMAT, position: JSON.stringify(position), pins: JSON.stringify(pins) };
  const entries = [...tensors].map(([name, { shape }]) => [name, { dtype: 'F32', shape }] as const);
  await replaceFile(path, async (file) => {
    await file.writeFile(safetensorsHeader(entries, metadata));
    for (const tensor of tensors.values()) await file.writeFile(await valueBytes(tensor, 'float32'));
  });
}

/** @throws UniFlowError `BAD_CHECKPOINT` if the file was not written by {@link saveState}, belongs to another model, or has other pins. */
export async function loadState(path: string, trainer: Resumable, pins: Record<string, unknown>): Promise<TrainerPosition> {
  const { handle: file, metadata, tensors } = native.openSafetensors(path);
  if (metadata['format'] !== FORMAT)
    throw UniFlowError.expected('BAD_CHECKPOINT', path, `the state of a training (${FORMAT})`, metadata['format'] ?? 'another file');
  const position = JSON.parse(metadata['position'] as string) as TrainerPosition;
  const actual = JSON.stringify(pins);
  if (actual !== metadata['pins']) throw UniFlowError.expected('BAD_CHECKPOINT', path, `a training on ${metadata['pins']}`, actual);
  const wanted = trainer.state().tensors;
  const misfits = [...wanted].filter(([name, { shape }]) => tensors[name]?.shape.join() !== shape.join()).map(([name]) => name);
  const unknown = Object.keys(tensors).filter((name) => !wanted.has(name));
  if (misfits.length + unknown.length > 0)
    throw new UniFlowError(
      'BAD_CHECKPOINT',
      `${path} is of another model or of other settings: ${[...misfits, ...unknown].slice(0, 5).join(', ')}`,
      {
        subject: path,
      },
    );
  const read = (name: string, shape: readonly number[]): TensorHandle => native.loadParameter([{ file, name }], shape, 'float32', false);
  trainer.restore(read, position);
  await native.synchronize([...trainer.state().tensors.values()]);
  return position;
}
