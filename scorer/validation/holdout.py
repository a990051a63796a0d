"""The records to compare on: drawn so that they look like the data, and apart from what is trained on.

Knows numbers and texts only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from random import Random

import polars as pl

from scorer.types import ScorerError

SHINGLE = 3  # words
ALIKE = 0.8  # Jaccard similarity of the shingles of two texts that are nearly the same
WORD = re.compile(r"[^\W\u2e80-\uffff]+|[^\W\x00-\u2e7f]")  # scripts without spaces have a word a character


def draw(candidates: pl.DataFrame, count: int, seed: int) -> list[int]:
    """The ids of `count` of the candidates (record_id, tokens, and where there are clusters, cluster), ascending.

    A systematic sample in the order of cluster and length: every cluster has its share, and within it the lengths are
    spread evenly. Raises ScorerError where it would be more than half of the candidates.
    """
    total = candidates.height
    if 2 * count > total:
        raise ScorerError(
            f"holdout: {count:,} of {total:,} records that can be trained on are more than half; give a smaller "
            "--holdout, or --eval FILE"
        )
    random = Random(seed)
    shuffled = candidates.sort("record_id")[random.sample(range(total), total)]  # for equal lengths
    keys = [name for name in ("cluster", "tokens") if name in candidates.columns]
    ordered = shuffled.sort(keys, nulls_last=True, maintain_order=True)["record_id"]
    start = random.random()
    return sorted(ordered.gather([int((start + i) * total / count) for i in range(count)]).to_list())


class Texts:
    """Some texts, to find others that are nearly the same."""

    def __init__(self, texts: Mapping[int, str]):
        self._sizes: dict[int, int] = {}
        self._holders: dict[int, list[int]] = defaultdict(list)
        for key, text in texts.items():
            found = _shingles(text)
            self._sizes[key] = len(found)
            for shingle in found:
                self._holders[shingle].append(key)

    def like(self, text: str) -> int | None:
        """The key of the text most like another, if their similarity is at least ALIKE."""
        found = _shingles(text)
        shared = Counter(key for shingle in found for key in self._holders.get(shingle, ()))
        best = max(shared, key=lambda key: self._similarity(shared[key], key, len(found)), default=None)
        if best is None or self._similarity(shared[best], best, len(found)) < ALIKE:
            return None
        return best

    def _similarity(self, shared: int, key: int, size: int) -> float:
        return shared / (self._sizes[key] + size - shared)


def overlaps(texts: Texts, others: Iterable[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    """The pairs (id of one of `others`, key of the text that it is nearly the same as)."""
    for record_id, text in others:
        if (key := texts.like(text)) is not None:
            yield record_id, key


def _shingles(text: str) -> frozenset[int]:
    words = WORD.findall(text.casefold())
    return frozenset(hash(tuple(words[i : i + SHINGLE])) for i in range(max(1, len(words) - SHINGLE + 1)))
