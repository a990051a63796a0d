"""Sums and counts to the score table: every column by hand, and every way in which there is no score."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

import numpy as np
import polars as pl
import pytest

from scorer.scores import measures
from scorer.scores.measures import MEASURES, SCHEMA
from scorer.tokens import CODES
from scorer.types import EngineError, RowStatus
from tests.lib.tokens import EncodedTurn, Span, SpanNLL, TokenSequence, View, token_batch, turn_table

NULLS = dict.fromkeys(("response_tokens", "alone_tokens", *MEASURES))


def span(view: View, nll: float, tokens: int, *, record: int = 0, turn: int = 0) -> SpanNLL:
    return SpanNLL(record, turn, view, nll, tokens)


def both(conditioned: float, alone: float, tokens: int = 1, *, record: int = 0, turn: int = 0) -> list[SpanNLL]:
    return [
        span(View.CONDITIONED, conditioned, tokens, record=record, turn=turn),
        span(View.ALONE, alone, tokens, record=record, turn=turn),
    ]


def score_table(turns: list[EncodedTurn], spans: Iterable[SpanNLL], *, two_views: bool) -> pl.DataFrame:
    """The table of spans that each are a sequence of their own."""
    spans = list(spans)
    sequences = [
        TokenSequence(s.record_id, s.view, [0] * (s.tokens + 1), (Span(s.turn, 1, s.tokens + 1),)) for s in spans
    ]
    batch = token_batch(sequences, [(turn.record_id, turn.turn) for turn in turns])
    sums = np.array([math.nan if s.nll_sum is None else s.nll_sum for s in spans], np.float64)
    statuses = np.array([CODES[s.status] for s in spans], np.uint8)
    return measures.score_table(turn_table(turns), batch, sums, statuses, two_views=two_views)


def row(turn: EncodedTurn, spans: list[SpanNLL], *, two_views: bool = True) -> dict[str, object]:
    return score_table([turn], spans, two_views=two_views).drop(*measures.LABELS, "tokens_hash").row(0, named=True)


@pytest.mark.parametrize("status", ["ok", "truncated"])
def test_every_column_by_hand(status: str) -> None:
    """Four tokens of probability 1/2 after the prompt; three of 1/8 alone."""
    spans = [span(View.CONDITIONED, 4 * math.log(2), 4), span(View.ALONE, 3 * math.log(8), 3)]
    assert row(EncodedTurn(0, 0, RowStatus(status), 11), spans) == pytest.approx(
        {
            "record_id": 0,
            "turn": 0,
            "status": status,
            "prompt_tokens": 11,
            "response_tokens": 4,
            "alone_tokens": 3,
            "nll_conditioned": 2.772588722239781,
            "nll_alone": 6.238324625039508,
            "ppl_conditioned": 2.0,
            "ppl_alone": 8.0,
            "ifd": 0.25,  # 2 / 8
            "ifd_loss": 1 / 3,  # log 2 / log 8
        }
    )


def test_conditioned_only() -> None:
    spans = [span(View.CONDITIONED, 4 * math.log(2), 4)]
    assert row(EncodedTurn(0, 0, RowStatus.OK, 11), spans, two_views=False) == pytest.approx(
        {
            "record_id": 0,
            "turn": 0,
            "status": "ok",
            "prompt_tokens": 11,
            "response_tokens": 4,
            "alone_tokens": None,
            "nll_conditioned": 2.772588722239781,
            "nll_alone": None,
            "ppl_conditioned": 2.0,
            "ppl_alone": None,
            "ifd": None,
            "ifd_loss": None,
        }
    )


def test_a_certain_response_has_an_ifd() -> None:
    """Zero is a sum like any other in the conditioned view: perplexity 1, and a ratio of losses of 0."""
    found = row(EncodedTurn(0, 0, RowStatus.OK, 1), both(0.0, math.log(4)))
    assert (found["ppl_conditioned"], found["ifd_loss"], found["status"]) == (1.0, 0.0, "ok")
    assert found["ifd"] == pytest.approx(0.25)


@pytest.mark.parametrize("status", [s for s in RowStatus if not s.scored])
@pytest.mark.parametrize("two_views", [True, False])
def test_every_other_status_has_nulls(status: RowStatus, two_views: bool) -> None:
    found = row(EncodedTurn(5, 2, status, 9), [], two_views=two_views)
    assert found == {"record_id": 5, "turn": 2, "status": status.value, "prompt_tokens": 9} | NULLS
    assert row(EncodedTurn(5, 2, status), [], two_views=two_views)["prompt_tokens"] is None


@pytest.mark.parametrize("view", list(View))
@pytest.mark.parametrize("status", ["oom", "non_finite"])
def test_a_fault_of_the_engine_in_either_view_takes_the_row(view: View, status: str) -> None:
    whole = both(1.0, 1.0, 3, record=5, turn=2)
    spans = [replace(s, nll_sum=None, status=RowStatus(status)) if s.view == view else s for s in whole]
    found = row(EncodedTurn(5, 2, RowStatus.TRUNCATED, 9), spans)
    assert found == {"record_id": 5, "turn": 2, "status": status, "prompt_tokens": 9} | NULLS


@pytest.mark.parametrize(
    ("conditioned", "alone"),
    [
        (710.0, 1.0),  # exp(710) is more than float64 holds
        (1.0, 710.0),
        (1e308, 1.0),
        (math.inf, 1.0),
        (1.0, math.inf),
        (math.nan, 1.0),
        (1.0, math.nan),
        (1.0, 0.0),  # the ratio of the losses has no value
        (0.0, 0.0),
    ],
)
def test_measures_that_are_not_finite(conditioned: float, alone: float) -> None:
    found = row(EncodedTurn(0, 0, RowStatus.OK, 9), both(conditioned, alone))
    assert found == {"record_id": 0, "turn": 0, "status": "non_finite", "prompt_tokens": 9} | NULLS


def test_the_largest_perplexity_stays() -> None:
    found = row(EncodedTurn(0, 0, RowStatus.OK, 9), both(708.0, 1.0))
    assert found["status"] == "ok"
    assert found["ppl_conditioned"] == pytest.approx(math.exp(708.0))
    found = row(EncodedTurn(0, 0, RowStatus.OK, 9), [span(View.CONDITIONED, 710.0, 1)], two_views=False)
    assert found["status"] == "non_finite"
    found = row(EncodedTurn(0, 0, RowStatus.OK, 9), [span(View.CONDITIONED, 710.0, 2)], two_views=False)
    assert found["status"] == "ok"  # the mean is 355


@pytest.mark.parametrize("present", [[], [View.CONDITIONED], [View.ALONE]])
def test_a_missing_span_is_an_error(present: list[View]) -> None:
    turns = [EncodedTurn(0, 0, RowStatus.OK, 9), EncodedTurn(4, 1, RowStatus.OK, 9)]
    spans = both(1.0, 2.0) + [span(view, 1.0, 1, record=4, turn=1) for view in present]
    with pytest.raises(EngineError, match="record 4, turn 1"):
        score_table(turns, spans, two_views=True)


def test_a_missing_conditioned_span_is_an_error_without_two_views() -> None:
    with pytest.raises(EngineError, match="record 0, turn 0"):
        score_table([EncodedTurn(0, 0, RowStatus.OK, 9)], [span(View.ALONE, 1.0, 1)], two_views=False)


def test_spans_are_joined_by_key_in_any_order() -> None:
    turns = [
        EncodedTurn(3, 0, RowStatus.OK, 1),
        EncodedTurn(3, 1, RowStatus.TRUNCATED, 2),
        EncodedTurn(4, 0, RowStatus.EMPTY_RESPONSE),
        EncodedTurn(9, 0, RowStatus.OK, 3),
    ]
    spans = [
        *both(1.0, 2.0, record=3),
        *both(3.0, 4.0, record=3, turn=1),
        *both(5.0, 6.0, record=9),
    ]
    table = score_table(turns, spans, two_views=True)
    assert table["record_id"].to_list() == [3, 3, 4, 9]
    assert table["turn"].to_list() == [0, 1, 0, 0]
    assert table["nll_conditioned"].to_list() == [1.0, 3.0, None, 5.0]
    assert table["nll_alone"].to_list() == [2.0, 4.0, None, 6.0]
    for order in permutations(spans):
        assert score_table(turns, iter(order), two_views=True).equals(table)


@pytest.mark.parametrize("turns", [[], [EncodedTurn(0, 0, RowStatus.BAD_JSON)]])
def test_the_schema_does_not_depend_on_the_rows(turns: list[EncodedTurn]) -> None:
    """Shards of nulls only, or of nothing, go together with all others."""
    assert score_table(turns, [], two_views=True).schema == pl.Schema(SCHEMA)
    assert score_table(turns, [], two_views=False).schema == pl.Schema(SCHEMA)
