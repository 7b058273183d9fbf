/** Assigns class numbers to stated labels. */
import { UniFlowError } from '../errors.js';

/** The labels of a data set. */
export interface Labels {
  /** One per sample; undefined if there are none. */
  labels: Int32Array | undefined;
  /** label → name. */
  classes: readonly string[] | undefined;
}

/** Labels as stated by the samples of a data set. */
export interface Stated {
  subject: string;
  length: number;
  label: (i: number) => string | undefined;
  id: (i: number) => string;
}

/** Numbers the names in sorted order; no labels if any sample has none. */
export function numberNames({ length, label }: Stated): Labels {
  const names = new Set<string>();
  for (let i = 0; i < length; i++) {
    const name = label(i);
    if (name === undefined) return { labels: undefined, classes: undefined };
    names.add(name);
  }
  const classes = [...names].sort();
  const numbers = new Map(classes.map((name, i) => [name, i]));
  return { labels: Int32Array.from({ length }, (_, i) => numbers.get(label(i) as string) as number), classes };
}

/**
 * Labels as stated by files: kept if all are numbers, else numbered by name. @throws {UniFlowError} `BAD_INPUT` if only some samples have
 * labels.
 */
export function numberLabels(stated: Stated): Labels {
  const { subject, length, label, id } = stated;
  let [labelled, numbers, missing] = [0, true, -1];
  for (let i = 0; i < length; i++) {
    const text = label(i);
    if (text === undefined) missing = missing === -1 ? i : missing;
    else labelled++;
    numbers &&= text !== undefined && /^\d{1,9}$/.test(text);
  }
  if (labelled === 0) return { labels: undefined, classes: undefined };
  if (missing === -1)
    return numbers ? { labels: Int32Array.from({ length }, (_, i) => Number(label(i))), classes: undefined } : numberNames(stated);
  const actual = `${labelled} of ${length}: '${id(missing)}' has none`;
  throw UniFlowError.expected('BAD_INPUT', subject, 'a label for every image, or for none', actual);
}
