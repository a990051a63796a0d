"""The spans that engines return, with their sums or with a status; and the errors of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from scorer.types import EngineError, RowStatus, ScorerError, SpanNLL, TokenSequence

# CUDA's libraries and torch's CPU allocator raise plain RuntimeErrors, which only their text tells apart.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")


class BatchOutOfMemoryError(Exception):
    """A batch did not fit in memory. Engines catch it; it never leaves them."""


@contextmanager
def convert_errors() -> Iterator[None]:
    """Turn the errors of a forward pass into BatchOutOfMemoryError or EngineError."""
    try:
        yield
    except (MemoryError, RuntimeError, IndexError, ValueError, AssertionError) as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
            raise BatchOutOfMemoryError from error
        raise EngineError(f"the model failed on a batch ({type(error).__name__}: {error})") from error


def check_token_ids(sequences: Sequence[TokenSequence], vocab_size: int) -> None:
    """Raise ScorerError where a token id is outside the model's embedding: the tokenizer is another model's."""
    largest = max((max(sequence.token_ids) for sequence in sequences), default=0)
    if largest >= vocab_size:
        raise ScorerError(
            f"the tokenizer gives token id {largest}, but the model's vocabulary has {vocab_size} tokens: "
            "the tokenizer is another model's"
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
    """The spans of sequences that another process scored, from one row of NLL sum and token count for each span.

    Raises EngineError where a count differs from the span's length: other tokens were scored than asked for.
    """
    spans = []
    for sequence, rows in results:
        rows = rows[: len(sequence.targets)]
        counts = [int(row[1]) for row in rows]
        if counts != (expected := [span.end - span.start for span in sequence.targets]):
            raise EngineError(f"the engine scored {counts} tokens of a sequence, not {expected}")
        spans += with_sums([sequence], [row[0] for row in rows])
    return spans


def oom_spans(sequence: TokenSequence) -> list[SpanNLL]:
    """The spans of a sequence that does not fit in memory even by itself."""
    return [
        SpanNLL(sequence.record_id, span.turn, sequence.view, None, span.end - span.start, RowStatus.OOM)
        for span in sequence.targets
    ]
