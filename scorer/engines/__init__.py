"""The engines: token sequences in, NLL sums of their spans out. Each gives the same numbers at another speed.

This is their contract; scorer.engines.choose says which there are. None knows what a record, a file or a score is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from scorer.types import SpanNLL, TokenSequence


class Engine(Protocol):
    """What every engine does. Opening one loads its model; closing it gives the memory back."""

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[list[SpanNLL]]:
        """The SpanNLL of every target of every sequence, a batch at a time, in any order.

        Sums are in nats, added in float64. A sequence that does not fit in memory gives spans of status OOM, one with
        infinite or undefined sums NON_FINITE. Raises EngineError where the engine itself fails.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...
