"""The engines: token sequences in, NLL sums of their spans out. Each gives the same numbers at another speed.

Knows the contract and which engines there are; not what a record, a file or a score is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from scorer.config import ScoreConfig
from scorer.models import ModelFiles
from scorer.types import ScorerError, SpanNLL, TokenSequence


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


def open_engine(config: ScoreConfig, files: ModelFiles) -> Engine:
    """The engine of a configuration whose engine, dtype, device and batch_tokens have been chosen."""
    match config.engine:
        case "packed":
            from scorer.engines.packed import PackedEngine

            return PackedEngine(config, files)
        case "reference":
            from scorer.engines.reference import ReferenceEngine

            return ReferenceEngine(config, files)
        case other:
            raise ScorerError(f"no engine '{other}'")
