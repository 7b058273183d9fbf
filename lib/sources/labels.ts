/** From what names a class to its number. */
import { UniFlowError } from '../errors.js';

/** The labels of a dataset. */
export interface Labels {
  /** Per sample; empty where there are none. */
  labels: readonly number[];
  /** label → name. */
  classes: readonly string[] | undefined;
}

/** Names numbered in their sorted order. */
export function numberNames(names: readonly string[]): Labels {
  const classes = [...new Set(names)].sort();
  const numbers = new Map(classes.map((name, i) => [name, i]));
  return { labels: names.map((name) => numbers.get(name) as number), classes };
}

/** Labels as a file states them: numbers where all are numbers, or names; `ids` say which one lacks it. */
export function numberLabels(subject: string, ids: readonly string[], stated: readonly (string | undefined)[]): Labels {
  const missing = stated.indexOf(undefined);
  if (missing === -1) {
    const texts = stated as readonly string[];
    return texts.every((text) => /^\d{1,9}$/.test(text)) ? { labels: texts.map(Number), classes: undefined } : numberNames(texts);
  }
  const labelled = stated.filter((text) => text !== undefined).length;
  if (labelled === 0) return { labels: [], classes: undefined };
  const actual = `${labelled} of ${stated.length}: '${ids[missing]}' has none`;
  throw UniFlowError.expected('BAD_INPUT', subject, 'a label for every picture, or for none', actual);
}
