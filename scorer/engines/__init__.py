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

        An engine asks for the next TokenBatch before it is done with those before, so that the device never waits. None
        in the place of one means that none is there yet while others are unfinished: the engine yields what is done
        next, and asks again. A TokenBatch without spans gives one SpanScores without spans. The packed and the
        reference engine compute no sequences of two batches together, so that a batch has the same bits whatever comes
        before it.

        Sums are added in float64; those of `TokenBatch.by_token()` are the NLLs of single tokens. Raises EngineError
        where the engine itself fails.
        """

    def close(self) -> None:
        """Free the model."""
