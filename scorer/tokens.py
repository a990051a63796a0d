"""Token sequences, the spans to score in them, and their scores, as NumPy arrays.

From the tokenizer to the score table there is no Python object for a token or a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scorer.types import RowStatus

Array = NDArray[Any]  # dtype and shape are said where it is used

STATUSES = tuple(RowStatus)
CODES = {status: code for code, status in enumerate(STATUSES)}  # a status in an array is its index in STATUSES
HASHED_SEQUENCES = 128  # at a time: a few hundred kilobytes, which stay in the processor's cache
CONDITIONED, ALONE = 0, 1  # the views of a response: after its prompt, and without it


@dataclass(frozen=True, slots=True, eq=False)
class TurnTable:
    """The R rows of a score table, before their scores."""

    record_ids: Array  # int64 [R], ascending
    turns: Array  # int32 [R], from 0 in each record
    statuses: Array  # uint8 [R]
    prompt_tokens: Array  # int32 [R]: tokens of the conditioned view before the response; -1 where there is none
    # What is said of the record and the response, see scorer.scores.measures.SCHEMA: texts or None, but the last bool.
    formats: Array  # object [R]
    responses: Array
    left_out: Array
    special_tokens: Array

    def __len__(self) -> int:
        return len(self.record_ids)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The input of an engine: Q token sequences, and in them S spans to score.

    A span is the tokens `starts` to `ends` (exclusive) of its sequence; `starts` is at least 1. Spans are in the order
    of their sequences, ascend within one, and don't overlap. Every sequence has at least one.
    """

    token_ids: Array  # int32 [T]: the sequences end to end
    offsets: Array  # int64 [Q + 1]: the bounds of the sequences in `token_ids`
    record_ids: Array  # int64 [Q]; the sequences of a record are neighbours
    sequences: Array  # int64 [S]: the sequence of each span
    rows: Array  # int64 [S]: the row of the score table
    views: Array  # uint8 [S]: CONDITIONED or ALONE
    starts: Array  # int64 [S]
    ends: Array  # int64 [S]

    def __len__(self) -> int:
        return len(self.record_ids)

    @property
    def lengths(self) -> Array:
        """The tokens of each sequence: int64 [Q]."""
        return np.diff(self.offsets)

    @cached_property
    def span_offsets(self) -> Array:
        """The bounds of the spans of each sequence: int64 [Q + 1]."""
        return np.searchsorted(self.sequences, np.arange(len(self) + 1))

    @cached_property
    def span_hashes(self) -> Array:
        """A hash of each span and the tokens before it, which decide its score: uint64 [S].

        Multilinear: the sum of the tokens + 1, each times a random number of its position, modulo 2^64.
        """
        lengths, bounds = self.lengths.tolist(), self.offsets
        keys = np.random.PCG64(0).random_raw(2 * max(lengths, default=0) + 2).reshape(-1, 2)
        of_tokens = np.ascontiguousarray(keys[:, 0])
        sums = np.zeros(len(self.token_ids) + 1, np.uint64)
        for start in range(0, len(self), HASHED_SEQUENCES):
            some = slice(bounds[start], bounds[min(start + HASHED_SEQUENCES, len(self))])
            terms = self.token_ids[some].astype(np.uint64)
            terms += np.uint64(1)
            terms *= np.concatenate([of_tokens[:length] for length in lengths[start : start + HASHED_SEQUENCES]])
            terms[:1] += sums[some.start : some.start + 1]  # of arrays, whose sums may overflow
            np.cumsum(terms, out=sums[some.start + 1 : some.stop + 1])
        first = self.offsets[self.sequences]
        hashes: Array = sums[first + self.ends] - sums[first] + keys[self.starts, 1]
        return hashes

    def by_token(self) -> TokenBatch:
        """The same sequences with a span for each token of each span: their sums are the NLLs of the tokens."""
        counts = self.ends - self.starts
        starts = ranges(self.starts, counts)
        sequences, rows, views = (np.repeat(values, counts) for values in (self.sequences, self.rows, self.views))
        return replace(self, sequences=sequences, rows=rows, views=views, starts=starts, ends=starts + 1)

    def ids(self, sequence: int) -> Array:
        """The tokens of one sequence: int32 [length]."""
        return self.token_ids[self.offsets[sequence] : self.offsets[sequence + 1]]

    def spans(self, sequences: Array) -> tuple[Array, Array]:
        """The indices of the spans of some sequences, end to end, and how many each sequence has: int64."""
        counts = np.diff(self.span_offsets)[sequences]
        return ranges(self.span_offsets[sequences], counts), counts

    def bounds(self, sequence: int) -> Array:
        """The [start, end] of each span of one sequence: int64 [spans, 2]."""
        return self._bounds[self.span_offsets[sequence] : self.span_offsets[sequence + 1]]

    @cached_property
    def _bounds(self) -> Array:
        return np.stack((self.starts, self.ends), axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class SpanScores:
    """The output of an engine for K spans: the sum over a span of -log p(token | all before it), in nats."""

    batch: TokenBatch
    spans: Array  # int64 [K]: indices of the spans
    nll_sums: Array  # float64 [K]; means nothing where the status is not OK
    statuses: Array  # uint8 [K]: OK, NON_FINITE, or OOM where the sequence does not fit in memory


def ranges(starts: Array, counts: Array) -> Array:
    """`counts[i]` integers from `starts[i]` on, for each i, end to end: int64 [sum of counts]."""
    before = np.cumsum(counts) - counts
    numbers: Array = np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
    return numbers


def bounds_of(counts: Array) -> Array:
    """0, and the running sum of `counts`: int64 [len(counts) + 1]."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The sequences of one or more batches as one. `rows` stay those of each batch's own score table."""
    first = bounds_of(np.array([len(batch) for batch in batches]))
    joined = {
        name: np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("token_ids", "record_ids", "rows", "views", "starts", "ends")
    }
    return TokenBatch(
        offsets=bounds_of(np.concatenate([batch.lengths for batch in batches])),
        sequences=np.concatenate([batch.sequences + start for batch, start in zip(batches, first, strict=False)]),
        **joined,
    )
