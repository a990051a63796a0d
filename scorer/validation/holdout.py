"""The records to compare on: drawn so that they look like the data, and apart from what is trained on.

Knows numbers and texts only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from random import Random

import polars as pl

from scorer.types import ScorerError

SHINGLE = 3  # words
ALIKE = 0.8  # Jaccard similarity of the shingles of two texts that are nearly the same
FEW, COMMON = 2, 0.05  # a shingle of more texts than both, in number and in share, is common
WORD = re.compile(r"[^\W\u2e80-\uffff]+|[^\W\x00-\u2e7f]")  # scripts without spaces have a word a character


def draw(candidates: pl.DataFrame, count: int, seed: int) -> list[int]:
    """The ids of `count` of the candidates (record_id, tokens, and where there are clusters, cluster), ascending.

    A systematic sample in the order of cluster and length: every cluster has its share, and within it the lengths are
    spread evenly. Raises ScorerError where it would be more than half of the candidates.
    """
    total = candidates.height
    if 2 * count > total:
        raise ScorerError(
            f"holdout: {count:,} of {total:,} records that have scores and can be trained on are more than half; give "
            "a smaller --holdout, or --eval FILE"
        )
    random = Random(seed)
    shuffled = candidates.sort("record_id")[random.sample(range(total), total)]  # for equal lengths
    keys = [name for name in ("cluster", "tokens") if name in candidates.columns]
    ordered = shuffled.sort(keys, nulls_last=True, maintain_order=True)["record_id"]
    start = random.random()
    return sorted(ordered.gather([int((start + i) * total / count) for i in range(count)]).to_list())


class Texts:
    """Some texts, to find others that are nearly the same.

    What many of them have in common, such as a system prompt or the words of a task, does not count.
    """

    def __init__(self, texts: Mapping[int, str]):
        shingles = {key: _shingles(text) for key, text in texts.items()}
        counts = Counter(shingle for found in shingles.values() for shingle in found)
        most = max(FEW, COMMON * len(texts))
        self._common = frozenset(shingle for shingle, count in counts.items() if count > most)
        self._sizes: dict[int, int] = {}
        self._holders: dict[int, list[int]] = defaultdict(list)
        for key, found in shingles.items():
            own = self._own(found)
            self._sizes[key] = len(own)
            for shingle in own:
                self._holders[shingle].append(key)

    def _own(self, found: frozenset[int]) -> frozenset[int]:
        return found - self._common or found

    def like(self, text: str) -> int | None:
        """The key of the text most like another, if their similarity is at least ALIKE."""
        found = self._own(_shingles(text))
        shared = Counter(key for shingle in found for key in self._holders.get(shingle, ()))
        similarities = {key: count / (self._sizes[key] + len(found) - count) for key, count in shared.items()}
        best = max(similarities, key=similarities.__getitem__, default=None)
        return best if best is not None and similarities[best] >= ALIKE else None


def _shingles(text: str) -> frozenset[int]:
    words = WORD.findall(text.casefold()) or [text.strip()]
    return frozenset(hash(tuple(words[i : i + SHINGLE])) for i in range(max(1, len(words) - SHINGLE + 1)))
