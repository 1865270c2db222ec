"""BM25 recall of the gold passages with the question as the query.

  python benchmarks/bm25_recall.py DATA/hotpotqa DATA/musique

A folder holds corpus.jsonl and questions.<split>.jsonl.  For each k: recall = share of a question's
gold passages among the k best, all = share of questions with every gold passage there; in percent.
Where a data set has only weak labels (bamboogle, triviaqa), those are used and named.
"""
from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Sequence

from rlsearch.data import corpus, questions
from rlsearch.envs import retrieval
from rlsearch.types import Question

KS = (3, 5, 10)


def load(folder: pathlib.Path) -> list[Question]:
  """Questions of all splits in a folder."""
  files = sorted(folder.glob('questions.*.jsonl'))
  if not files:
    raise ValueError(f'{folder}: found no questions.<split>.jsonl')
  return [q for file in files for q in questions.read(file)]


def recall(retriever: retrieval.Retriever, asked: Sequence[Question], label: str,
           ks: Sequence[int] = KS) -> dict[str, float]:
  """Recall and all-found at each k in percent, over the questions whose meta has `label`."""
  gold = [(q, set(q.meta[label])) for q in asked if label in q.meta]
  if not gold:
    raise ValueError(f'questions: none of {len(asked)} has {label!r}')
  hits = retriever.search([q.text for q, _ in gold], max(ks))
  found = {}
  for k in ks:
    got = [{p.uid for p in row[:k]} & ids for row, (_, ids) in zip(hits, gold)]
    found[f'recall@{k}'] = 100 * sum(
        len(g) / len(ids) for g, (_, ids) in zip(got, gold)) / len(gold)
    found[f'all@{k}'] = 100 * sum(g == ids for g, (_, ids) in zip(got, gold)) / len(gold)
  return found


def main() -> None:
  """Prints one table row a folder and label."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folders', nargs='+', type=pathlib.Path)
  parser.add_argument('--title_weight', type=int, default=1)
  args = parser.parse_args()
  names = [f'{name}@{k}' for k in KS for name in ('recall', 'all')]
  print('| data | label | passages | questions |', ' | '.join(names), '| ms a query |')
  print('|---' * (5 + len(names)) + '|')
  for folder in args.folders:
    asked = load(folder)
    retriever = retrieval.bm25(corpus.read(folder / 'corpus.jsonl'),
                               title_weight=args.title_weight, cache_size=0)
    for label in ('gold_passages', 'weak_passages'):
      count = sum(label in q.meta for q in asked)
      if count:
        start = time.perf_counter()
        row = recall(retriever, asked, label)
        took = 1000 * (time.perf_counter() - start) / count
        print(f'| {folder.name} | {label} | {retriever.size} | {count} |',
              ' | '.join(f'{row[name]:.1f}' for name in names), f'| {took:.2f} |')


if __name__ == '__main__':
  main()
