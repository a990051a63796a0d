"""What the engines do with what goes wrong: which errors are a lack of memory, and what a span says then.

Knows torch's errors and the spans; nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from scorer.types import EngineError, RowStatus, ScorerError, SpanNLL, TokenSequence

# CUDA's libraries and torch's CPU allocator raise plain RuntimeErrors; their text is the only mark.
MEMORY_MARKS = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")


class BatchOutOfMemoryError(Exception):
    """A batch did not fit in memory. Engines catch it; it never leaves them."""


@contextmanager
def engine_faults() -> Iterator[None]:
    """Turn what torch raises in a forward pass into DoesNotFitError, or into EngineError."""
    try:
        yield
    except (MemoryError, RuntimeError, IndexError, ValueError, AssertionError) as error:
        if isinstance(error, MemoryError) or any(mark in str(error) for mark in MEMORY_MARKS):
            raise BatchOutOfMemoryError from error
        raise EngineError(f"the model failed on a batch ({type(error).__name__}: {error})") from error


def check_token_ids(sequences: Sequence[TokenSequence], vocabulary: int) -> None:
    """Raise ScorerError where a token id lies beyond the model's embedding: a tokenizer of another model."""
    largest = max((max(sequence.token_ids) for sequence in sequences), default=0)
    if largest >= vocabulary:
        raise ScorerError(
            f"the tokenizer gives token {largest}, and the model knows {vocabulary}: they do not belong together"
        )


def with_sums(sequences: Iterable[TokenSequence], sums: Iterable[float]) -> list[SpanNLL]:
    """The spans of `sequences`, in order, with their NLL sums; NON_FINITE where one is infinite or undefined."""
    targets = [(sequence, span) for sequence in sequences for span in sequence.targets]
    spans = []
    for (sequence, span), nll in zip(targets, sums, strict=True):
        total, status = (nll, RowStatus.OK) if math.isfinite(nll) else (None, RowStatus.NON_FINITE)
        spans.append(SpanNLL(sequence.record_id, span.turn, sequence.view, total, span.end - span.start, status))
    return spans


def with_counted_sums(results: Iterable[tuple[TokenSequence, Sequence[Sequence[float]]]]) -> list[SpanNLL]:
    """The spans of sequences that another process scored, each with its rows of NLL sum and token count.

    Raises EngineError where a count is not the span's: it did not score what it was asked to.
    """
    spans = []
    for sequence, rows in results:
        own = rows[: len(sequence.targets)]
        counts = [int(row[1]) for row in own]
        if counts != (asked := [span.end - span.start for span in sequence.targets]):
            raise EngineError(f"the engine scored {counts} tokens of a sequence, and not {asked}")
        spans += with_sums([sequence], [row[0] for row in own])
    return spans


def oom_spans(sequence: TokenSequence) -> list[SpanNLL]:
    """The spans of a sequence that does not fit by itself."""
    return [
        SpanNLL(sequence.record_id, span.turn, sequence.view, None, span.end - span.start, RowStatus.OOM)
        for span in sequence.targets
    ]
