"""The engines turn token sequences into NLL sums of their spans: the same numbers, at different speeds.

This module is their contract; scorer.engines.choose lists them. None knows records, files or scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from scorer.types import SpanNLL, TokenSequence


class Engine(Protocol):
    """The interface of every engine. Opening one loads its model; closing it frees the memory."""

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[list[SpanNLL]]:
        """Yield the SpanNLL of every target of every sequence, a batch at a time, in any order.

        Sums are in nats, added in float64. A span has status OOM where its sequence does not fit in memory, and
        NON_FINITE where its sum is infinite or undefined. Raises EngineError where the engine itself fails.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...
