"""The arrays between tokenizer and score table, by hand."""

from __future__ import annotations

import numpy as np

from scorer.tokens import bounds_of, concatenate, ranges
from tests.lib.tokens import Span, TokenSequence, View, token_batch

TWO_TURNS = TokenSequence(3, View.CONDITIONED, [5, 6, 7, 8, 9], (Span(0, 1, 2), Span(1, 3, 5)))
ALONE = TokenSequence(3, View.ALONE, [7, 8, 9], (Span(1, 1, 3),))


def test_ranges_and_bounds() -> None:
    assert ranges(np.array([7, 0, 3]), np.array([2, 0, 3])).tolist() == [7, 8, 3, 4, 5]
    assert ranges(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []
    assert bounds_of(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
    assert bounds_of(np.empty(0, np.int64)).tolist() == [0]


def test_what_a_sequence_holds() -> None:
    batch = token_batch([TWO_TURNS, ALONE])
    assert batch.lengths.tolist() == [5, 3]
    assert batch.span_offsets.tolist() == [0, 2, 3]
    assert (batch.ids(0).tolist(), batch.ids(1).tolist()) == ([5, 6, 7, 8, 9], [7, 8, 9])
    assert (batch.bounds(0).tolist(), batch.bounds(1).tolist()) == ([[1, 2], [3, 5]], [[1, 3]])


def test_a_span_for_each_token() -> None:
    batch = token_batch([TWO_TURNS, ALONE]).by_token()
    assert batch.sequences.tolist() == [0, 0, 0, 1, 1]
    assert batch.rows.tolist() == [0, 1, 1, 1, 1]
    assert batch.views.tolist() == [0, 0, 0, 1, 1]
    assert batch.starts.tolist() == [1, 3, 4, 1, 2]
    assert batch.ends.tolist() == [2, 4, 5, 2, 3]


def test_batches_end_to_end() -> None:
    one, other = token_batch([TWO_TURNS]), token_batch([ALONE, TWO_TURNS])
    joined = concatenate([one, other])
    assert joined.token_ids.tolist() == [5, 6, 7, 8, 9, 7, 8, 9, 5, 6, 7, 8, 9]
    assert joined.offsets.tolist() == [0, 5, 8, 13]
    assert joined.sequences.tolist() == [0, 0, 1, 2, 2]
    assert joined.starts.tolist() == [1, 3, 1, 1, 3]
