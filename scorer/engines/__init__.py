"""The engines turn token sequences into NLL sums of their spans: the same numbers, at different speeds.

This module is their contract; scorer.engines.choose lists them. None knows records, files or measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from scorer.tokens import SpanScores, TokenBatch


class Engine(Protocol):
    """The interface of every engine. Opening one loads its model; closing it frees the memory."""

    def score(self, batches: Iterable[TokenBatch | None]) -> Iterator[SpanScores]:
        """Yield the scores of every span of every TokenBatch, some spans at a time, in any order.

        A TokenBatch without spans gives one SpanScores without spans.

        An engine asks for the next TokenBatch before it is done with those before, so that the device never waits. None
        in the place of one means that none is there yet: the engine goes on with what it has, and asks again. Sequences
        of different batches are not computed together, so that a TokenBatch has the same scores whatever comes before.

        Sums are added in float64. Raises EngineError where the engine itself fails.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...
