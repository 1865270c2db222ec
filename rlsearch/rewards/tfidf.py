"""Cosine of tf-idf vectors, as scikit-learn's TfidfVectorizer with its defaults computes it."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import functools
import math
import re

_WORD = re.compile(r'(?u)\b\w\w+\b')


def cosine(document: str, others: Sequence[str]) -> list[float]:
  """Returns the cosine of the document with each other text, the vectoriser fitted to all of them.

  weight(w, d) = tf(w, d) (1 + ln((1 + n) / (1 + df(w)))), n the number of texts; a text without words has cosine 0.
  """
  return list(_cosine(document, tuple(others)))


@functools.lru_cache(maxsize=4096)
def _cosine(document: str, others: tuple[str, ...]) -> tuple[float, ...]:
  counts = [Counter(_WORD.findall(text.lower())) for text in (document, *others)]
  df = Counter(w for c in counts for w in c)
  idf = {w: 1 + math.log((1 + len(counts)) / (1 + n)) for w, n in df.items()}
  vectors = [{w: n * idf[w] for w, n in c.items()} for c in counts]
  norms = [math.sqrt(sum(x * x for x in v.values())) for v in vectors]
  return tuple(sum(x * v.get(w, 0.0) for w, x in vectors[0].items()) / (norms[0] * norm) if norms[0] * norm else 0.0
               for v, norm in zip(vectors[1:], norms[1:], strict=True))
