"""The scores that engines return for spans, and the errors of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from scorer.faults import one_line
from scorer.tokens import CODES, Array, SpanScores, TokenBatch
from scorer.types import EngineError, RowStatus, ScorerError

OK, NON_FINITE, OOM = (CODES[status] for status in (RowStatus.OK, RowStatus.NON_FINITE, RowStatus.OOM))

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
        raise EngineError(f"the model failed on a batch ({one_line(error)})") from error


def check_token_ids(batch: TokenBatch, vocab_size: int) -> None:
    """Raise ScorerError where a token id is outside the model's embedding: the tokenizer is another model's."""
    largest = batch.token_ids.max(initial=0)
    if largest >= vocab_size:
        raise ScorerError(
            f"the tokenizer gives token id {largest}, but the model's vocabulary has {vocab_size} tokens: "
            "the tokenizer is another model's"
        )


def with_sums(batch: TokenBatch, spans: Array, nll_sums: Array) -> SpanScores:
    """The scores of some spans, NON_FINITE where a sum is infinite or undefined."""
    statuses = np.where(np.isfinite(nll_sums), OK, NON_FINITE).astype(np.uint8)
    return SpanScores(batch, spans, nll_sums, statuses)


def with_counted_sums(batch: TokenBatch, sequences: Array, sums: Sequence[Array]) -> SpanScores:
    """The scores of sequences that another process scored, from float64 [>= spans, 2]: NLL sum and token count.

    Raises EngineError where a count differs from the span's length: other tokens were scored than asked for.
    """
    spans, counts = batch.spans(sequences)
    found = np.concatenate([rows[:count] for rows, count in zip(sums, counts.tolist(), strict=True)])
    expected = batch.ends[spans] - batch.starts[spans]
    if not np.array_equal(found[:, 1], expected):
        raise EngineError(f"the engine scored {found[:, 1].sum():g} tokens of some sequences, not {expected.sum()}")
    return with_sums(batch, spans, found[:, 0])


def oom_scores(batch: TokenBatch, sequence: Array) -> SpanScores:
    """The scores of a sequence, int64 [1], that does not fit in memory even by itself."""
    spans, _ = batch.spans(sequence)
    return SpanScores(batch, spans, np.full(len(spans), np.nan), np.full(len(spans), OOM, np.uint8))


def no_scores(batch: TokenBatch) -> SpanScores:
    """The scores of a TokenBatch without spans."""
    return with_sums(batch, np.empty(0, np.int64), np.empty(0))
