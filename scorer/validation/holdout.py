"""The records to compare on: drawn so that they look like the data, and apart from what is trained on.

Knows numbers and texts only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from random import Random

import polars as pl

from scorer.scores.shares import exact_quotas
from scorer.types import ScorerError

LENGTH_PARTS = 4  # of the records by length: a quarter of what is drawn comes from each
SHINGLE = 3  # words
ALIKE = 0.8  # Jaccard similarity of the shingles of two texts that are nearly the same
WORD = re.compile(r"[^\W\u2e80-\uffff]+|[^\W\x00-\u2e7f]")  # scripts without spaces have a word a character


def draw(candidates: pl.DataFrame, count: int, seed: int) -> list[int]:
    """The ids of `count` of the candidates (record_id, tokens, and where there are clusters, group), ascending.

    They have the shares of lengths and clusters that all candidates have, as nearly as whole numbers allow. Raises
    ScorerError where it would be more than half of them.
    """
    if 2 * count > candidates.height:
        raise ScorerError(
            f"holdout: {count:,} of {candidates.height:,} records that can be trained on are more than half; give a "
            "smaller --holdout, or --eval FILE"
        )
    part = (pl.col("tokens").rank("ordinal") - 1) * LENGTH_PARTS // candidates.height
    keys = ["part", *(["group"] if "group" in candidates.columns else [])]
    strata = candidates.with_columns(part=part).sort("record_id").group_by(keys).agg("record_id").sort(keys)
    groups = strata["record_id"].to_list()
    sizes = list(map(len, groups))
    random = Random(seed)
    drawn = [random.sample(ids, quota) for ids, quota in zip(groups, exact_quotas(count, sizes, sizes), strict=True)]
    return sorted(record_id for ids in drawn for record_id in ids)


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
