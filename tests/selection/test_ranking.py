"""Selections worked out by hand, and the promises that hold for every table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from scorer.config import AGGREGATES
from scorer.protocols import PROTOCOLS
from scorer.scores.shares import parse_keep
from scorer.selection.config import ORDERS, SelectConfig
from scorer.selection.ranking import select_records
from scorer.selection.selection import Selection
from scorer.types import RowStatus, ScorerError

SCHEMA = {
    "record_id": pl.Int64,
    "turn": pl.Int32,
    "status": pl.String,
    "prompt_tokens": pl.Int64,
    "response_tokens": pl.Int64,
    "alone_tokens": pl.Int64,
    "nll_conditioned": pl.Float64,
    "nll_alone": pl.Float64,
    "ppl_conditioned": pl.Float64,
    "ppl_alone": pl.Float64,
    "ifd": pl.Float64,
    "ifd_loss": pl.Float64,
}


def table(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Rows of {column: value}, the rest of the columns null; turn 0 and status ok unless given."""
    return pl.DataFrame([{"turn": 0, "status": "ok", **row} for row in rows], schema=SCHEMA)


def by_ifd(values: Sequence[float | None]) -> pl.DataFrame:
    return table([{"record_id": i, "ifd": value} for i, value in enumerate(values)])


def kept(selection: Selection) -> list[int]:
    return selection.kept["record_id"].to_list()


def reasons(selection: Selection) -> dict[int, str]:
    return dict(selection.rejected.iter_rows())


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("10%", Fraction(1, 10)),
        (" 12.5% ", Fraction(1, 8)),
        ("100%", Fraction(1)),
        ("1.0", Fraction(1)),
        (1.0, Fraction(1)),
        (".1", Fraction(1, 10)),
        (0.1, Fraction(1, 10)),
        (1e-05, Fraction(1, 100_000)),
        (Fraction(1, 3), Fraction(1, 3)),
        ("5000", 5000),
        ("1", 1),
        (5000, 5000),
    ],
)
def test_parse_keep(text: Any, keep: int | Fraction) -> None:
    assert parse_keep(text) == keep
    assert type(parse_keep(text)) is type(keep)


NOT_TEXTS = ("0%", "0", "0.0", "-5", "-5%", "abc", "", "%", "1.5", "100.1%", "1e3", "1e999999999", "1_000", "٥")
NOT_KEEPS = (0, -1, 0.0, 1.5, -0.1, math.nan, math.inf, True, None, Fraction(0), Fraction(4, 3))


@pytest.mark.parametrize("text", [*NOT_TEXTS, "9" * 5000, *NOT_KEEPS])
def test_parse_keep_refuses_and_names_the_two_forms(text: Any) -> None:
    with pytest.raises(ScorerError, match=r"keep: .*10%.*5000"):
        parse_keep(text)


@pytest.mark.parametrize(
    ("keep", "total", "requested"),
    [
        ("10%", 4, 0),
        ("10%", 5, 1),
        ("10%", 14, 1),
        ("10%", 15, 2),
        ("10%", 25, 3),  # round() would give 2
        ("10%", 52002, 5200),
        ("0.7%", 500, 4),  # 3.5; in binary floats 0.7 / 100 * 500 is 3.4999999999999996
        ("100%", 7, 7),
        ("3", 7, 3),
    ],
)
def test_a_share_counts_exactly_halves_up(keep: str, total: int, requested: int) -> None:
    selection = select_records(by_ifd([0.5] * total), SelectConfig(parse_keep(keep)))
    assert (selection.requested, selection.total) == (requested, total)
    assert kept(selection) == list(range(requested))  # all tie, so the first records win


def test_failed_records_count_in_the_total() -> None:
    rows = [{"record_id": i, "status": "ok" if i < 5 else "bad_json", "ifd": 0.5 if i < 5 else None} for i in range(10)]
    assert select_records(table(rows), SelectConfig(Fraction(3, 10))).requested == 3


def test_the_highest_are_kept_in_input_order_with_their_ranks() -> None:
    scores = by_ifd([0.5, 0.9, 0.7, 0.9, 0.1])
    selection = select_records(scores, SelectConfig(3))
    assert selection.kept.select("record_id", "rank", "ifd").rows() == [(1, 1, 0.9), (2, 3, 0.7), (3, 2, 0.9)]
    assert reasons(selection) == {0: "below_cut", 4: "below_cut"}
    assert kept(select_records(scores, SelectConfig(3, order="rank"))) == [1, 3, 2]


def test_ties_break_by_record_id_in_both_directions() -> None:
    scores = by_ifd([0.9, 0.5, 0.5, 0.5, 0.1])
    assert kept(select_records(scores, SelectConfig(2, order="rank"))) == [0, 1]
    assert kept(select_records(scores, SelectConfig(3, lowest=True, order="rank"))) == [4, 1, 2]


def test_the_frames_have_the_promised_columns() -> None:
    scores = by_ifd([0.5, 0.6]).with_columns(lp1=pl.Series([0.3, 0.2]), note=pl.lit("text is no measure"))
    selection = select_records(scores, SelectConfig(1, by="lp1", lowest=True))
    assert selection.kept.columns == ["record_id", "rank", *list(SCHEMA)[3:], "lp1"]
    assert selection.kept.schema["record_id"] == selection.kept.schema["rank"] == pl.Int64
    assert selection.rejected.schema == {"record_id": pl.Int64, "reason": pl.String}
    assert kept(selection) == [1]


def test_every_reason() -> None:
    scores = table(
        [
            {"record_id": 0, "ifd": 0.8},
            {"record_id": 1, "ifd": 0.7},
            {"record_id": 2, "ifd": 1.0},
            {"record_id": 3, "ifd": 1.5},
            {"record_id": 4, "ifd": None},
            {"record_id": 5, "ifd": math.nan},
            {"record_id": 6, "ifd": math.inf},
            {"record_id": 7, "status": "truncated", "ifd": 0.9},
            {"record_id": 8, "status": "empty_response"},
            {"record_id": 9, "turn": 0, "status": "prompt_too_long"},
            {"record_id": 9, "turn": 1, "status": "empty_response"},
        ]
    )
    selection = select_records(scores, SelectConfig(2))
    assert kept(selection) == [0, 7]
    assert reasons(selection) == {
        1: "below_cut",
        2: "ifd_too_high",
        3: "ifd_too_high",
        4: "null_score",
        5: "null_score",
        6: "null_score",
        8: "empty_response",
        9: "prompt_too_long",
    }


def test_max_ifd_limits_a_ranking_by_something_else() -> None:
    scores = table(
        [
            {"record_id": 0, "ifd": 1.2, "ppl_alone": 30.0},
            {"record_id": 1, "ifd": 0.9, "ppl_alone": 20.0},
            {"record_id": 2, "ifd": 0.8, "ppl_alone": 10.0},
            {"record_id": 3, "ifd": None, "ppl_alone": 40.0},  # not known to lie below the limit
        ]
    )
    assert kept(select_records(scores, SelectConfig(2, by="ppl_alone", order="rank"))) == [3, 0]  # unless it is given
    limited = select_records(scores, SelectConfig(1, by="ppl_alone", max_ifd=1))
    assert kept(limited) == [1]
    assert reasons(limited) == {0: "ifd_too_high", 2: "below_cut", 3: "null_score"}
    assert kept(select_records(scores, SelectConfig(2, by="ppl_alone", max_ifd=0.85))) == [2]
    assert kept(select_records(scores, SelectConfig(2, by="ppl_alone", max_ifd=None, order="rank"))) == [3, 0]


def test_a_table_without_ifd_has_no_limit() -> None:
    scores = table([{"record_id": i, "ppl_conditioned": 10.0 + i} for i in range(3)])
    assert kept(select_records(scores, SelectConfig(2, by="ppl_conditioned"))) == [1, 2]
    assert kept(select_records(scores.drop("ifd"), SelectConfig(2, by="ppl_conditioned"))) == [1, 2]
    assert set(reasons(select_records(scores, SelectConfig(2, by="ifd"))).values()) == {"null_score"}


def test_fewer_than_asked_for_keeps_all_that_can_be_ranked() -> None:
    selection = select_records(by_ifd([0.5, 1.5, None, 0.6]), SelectConfig(100))
    assert kept(selection) == [0, 3]
    assert selection.requested == 100
    empty = select_records(by_ifd([]), SelectConfig(Fraction(1, 2)))
    assert (empty.total, empty.requested, empty.kept.height, empty.rejected.height) == (0, 0, 0, 0)
    failed = select_records(table([{"record_id": 0, "status": "bad_json"}]), SelectConfig(1, random=True))
    assert (reasons(failed), failed.drawn_from) == ({0: "bad_json"}, 0)


TURNS: list[dict[str, Any]] = [
    {"record_id": 0, "turn": 0, "ifd": 0.75, "response_tokens": 10},
    {"record_id": 0, "turn": 1, "ifd": 0.25, "response_tokens": 20},
    {"record_id": 0, "turn": 2, "status": "empty_response"},
    {"record_id": 1, "turn": 0, "status": "empty_response"},
    {"record_id": 1, "turn": 1, "ifd": 0.375, "response_tokens": 7},
]


@pytest.mark.parametrize(
    ("aggregate", "ifd", "tokens", "best"),
    [("mean", 0.5, 30, 0), ("min", 0.25, 30, 1), ("max", 0.75, 30, 0), ("last", 0.25, 30, 1)],
)
def test_aggregates_over_the_scored_turns(aggregate: str, ifd: float, tokens: int, best: int) -> None:
    selection = select_records(table(TURNS[::-1]), SelectConfig(2, aggregate=aggregate))
    rows = selection.kept.select("record_id", "ifd", "response_tokens").rows()
    assert rows == [(0, ifd, tokens), (1, 0.375, 7)]  # counts are sums
    assert selection.kept.schema["response_tokens"] == pl.Int64
    assert selection.kept["alone_tokens"].to_list() == [None, None]  # no turn has one
    assert kept(select_records(table(TURNS), SelectConfig(1, aggregate=aggregate))) == [best]


def test_the_limit_holds_for_the_aggregated_ifd() -> None:
    turns = table([{"record_id": 0, "turn": 0, "ifd": 1.5}, {"record_id": 0, "turn": 1, "ifd": 0.25}])
    assert kept(select_records(turns, SelectConfig(1))) == [0]
    assert reasons(select_records(turns, SelectConfig(1, aggregate="max"))) == {0: "ifd_too_high"}


def test_a_turn_without_a_value_is_left_out() -> None:
    rows: list[dict[str, Any]] = [
        {"record_id": 0, "turn": turn, "ifd": ifd} for turn, ifd in enumerate([0.25, math.nan, 0.75, None])
    ]
    for aggregate, ifd in (("mean", 0.5), ("min", 0.25), ("max", 0.75)):
        assert select_records(table(rows), SelectConfig(1, aggregate=aggregate)).kept["ifd"].to_list() == [ifd]
    assert reasons(select_records(table(rows), SelectConfig(1, aggregate="last"))) == {0: "null_score"}


def test_random_is_the_same_for_a_seed_and_only_then() -> None:
    scores = by_ifd([0.5] * 98 + [1.5, None])
    config = SelectConfig(10, random=True, order="rank", max_ifd=1.0)
    drawn = select_records(scores, config)
    # random.Random(42).sample(range(98), 10)
    assert kept(drawn) == [81, 14, 3, 94, 35, 31, 28, 17, 13, 86]
    assert drawn.kept["rank"].to_list() == list(range(1, 11))
    assert_frame_equal(select_records(scores.reverse(), config).kept, drawn.kept)
    other = select_records(scores, SelectConfig(10, random=True, seed=43, max_ifd=1.0))
    assert set(kept(other)) != set(kept(drawn))
    limited = select_records(scores, SelectConfig(100, random=True, max_ifd=1.0))
    assert (kept(limited), limited.drawn_from) == (list(range(98)), 98)
    assert reasons(limited) == {98: "ifd_too_high", 99: "null_score"}


def test_random_draws_what_has_no_score() -> None:
    statuses = ["ok", "ok", "empty_response", "bad_json", "not_text", "ok"]
    rows = [{"record_id": i, "status": s, "ifd": 0.5 + i if s == "ok" else None} for i, s in enumerate(statuses)]
    everything = select_records(table(rows), SelectConfig("100%", random=True))
    assert (kept(everything), everything.drawn_from) == ([0, 1, 2, 4, 5], 5)
    assert reasons(everything) == {3: "bad_json"}
    [only] = kept(one := select_records(table(rows), SelectConfig(1, random=True)))
    assert reasons(one) == {i: "bad_json" if i == 3 else "not_drawn" for i in range(6) if i != only}
    third = select_records(table(rows), SelectConfig("100%", random=True, bucket="low"))
    assert (kept(third), third.drawn_from) == ([0], 1)  # thirds of what can be ranked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.5}, "keep: '1.5'"),
        ({"keep": 0}, "keep: '0'"),
        ({"aggregate": "median"}, "aggregate: 'median' is not one of mean, min, max, last"),
        ({"order": "best"}, "order: 'best' is not one of input, rank"),
        ({"max_ifd": 0}, "max_ifd: 0"),
        ({"max_ifd": math.nan}, "max_ifd: nan"),
        ({"max_ifd": "no"}, "max_ifd: 'no'"),
        ({"seed": -1}, "seed: -1"),
        ({"random": 7}, "random: 7"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        SelectConfig(**{"keep": 1, **options})


def test_a_wrong_table_or_column_is_refused() -> None:
    scores = by_ifd([0.5])
    for name in ("ifdd", "status", "record_id"):
        with pytest.raises(ScorerError, match=f"by: '{name}' is not one of prompt_tokens, .*, ifd, ifd_loss$"):
            select_records(scores, SelectConfig(1, by=name))
    with pytest.raises(ScorerError, match="no column turn, status"):
        select_records(scores.drop("turn", "status"), SelectConfig(1))
    with pytest.raises(ScorerError, match="turn 0 of record 0 occurs twice"):
        select_records(pl.concat([scores, scores]), SelectConfig(1))


def test_every_protocol_ranks_by_a_column_of_the_table() -> None:
    scores = table([{"record_id": 0}])
    for protocol in PROTOCOLS.values():
        assert select_records(scores, SelectConfig(1, by=protocol.rank_by, lowest=protocol.lowest)).total == 1


# Few values, so that ties abound; 1/3 and 0.1 make sums that depend on their order.
VALUES = st.sampled_from([0.1, 0.2, 1 / 3, 0.5, 0.7, 1.0, 1.1, None, math.nan, math.inf])
STATUSES = st.sampled_from([RowStatus.OK, RowStatus.OK, RowStatus.TRUNCATED, RowStatus.EMPTY_RESPONSE, RowStatus.OOM])
RECORDS = st.lists(st.lists(st.tuples(STATUSES, VALUES, VALUES), min_size=1, max_size=4), max_size=25)
CONFIGS = st.builds(
    SelectConfig,
    keep=st.one_of(st.integers(1, 30), st.fractions(Fraction(1, 50), 1, max_denominator=50)),
    by=st.sampled_from(["ifd", "ppl_conditioned"]),
    lowest=st.booleans(),
    max_ifd=st.sampled_from(["auto", None, 1.0, 0.5]),
    random=st.booleans(),
    seed=st.integers(0, 3),
    aggregate=st.sampled_from(list(AGGREGATES)),
    order=st.sampled_from(ORDERS),
)


@settings(max_examples=150, deadline=None)
@given(records=RECORDS, config=CONFIGS, data=st.data())
def test_what_holds_for_every_table(
    records: list[list[tuple[RowStatus, float | None, float | None]]], config: SelectConfig, data: st.DataObject
) -> None:
    rows = [
        {
            "record_id": i,
            "turn": turn,
            "status": status.value,
            "ifd": ifd if status.scored else None,
            "ppl_conditioned": ppl if status.scored else None,
        }
        for i, turns in enumerate(records)
        for turn, (status, ifd, ppl) in enumerate(turns)
    ]
    selection = select_records(table(rows), config)
    chosen, dropped = selection.kept["record_id"].to_list(), selection.rejected["record_id"].to_list()

    assert sorted(chosen + dropped) == list(range(len(records)))  # each record once, in one of the two
    assert dropped == sorted(dropped)
    assert selection.total == len(records)

    counts = selection.rejected["reason"].value_counts()
    passed_over = dict(counts.iter_rows()).get("not_drawn" if config.random else "below_cut", 0)
    assert len(chosen) == min(selection.requested, len(chosen) + passed_over)
    if isinstance(config.keep, Fraction):
        assert -Fraction(1, 2) < selection.requested - config.keep * len(records) <= Fraction(1, 2)

    ranked = selection.kept.sort("rank")
    assert ranked["rank"].to_list() == list(range(1, len(chosen) + 1))
    expected = ranked if config.order == "rank" else ranked.sort("record_id")
    assert_frame_equal(selection.kept, expected)
    if not config.random:
        values = [float(v) for v in ranked[config.column]]
        assert all(map(math.isfinite, values))
        pairs = [(v if config.lowest else -v, i) for v, i in zip(values, ranked["record_id"], strict=True)]
        assert pairs == sorted(pairs)
    for i, reason in selection.rejected.iter_rows():
        failed = not any(status.scored for status, _, _ in records[i])
        if not config.random:
            assert (reason == records[i][0][0]) == failed

    shuffled = select_records(table(data.draw(st.permutations(rows))), config)
    assert_frame_equal(shuffled.kept, selection.kept, check_exact=True)
    assert_frame_equal(shuffled.rejected, selection.rejected)


PAIRS = pl.DataFrame(
    {
        "record_id": [0, 0, 1, 1, 2, 3, 3],
        "turn": [0, 1, 0, 1, 0, 0, 1],
        "status": ["ok", "ok", "ok", "empty_response", "ok", "empty_response", "ok"],
        "response": ["chosen", "rejected", "chosen", "rejected", None, "chosen", "rejected"],
        "response_tokens": pl.Series([5, 9, 7, None, 3, None, 4], dtype=pl.Int32),
        "ifd": [0.9, 0.4, 0.5, None, 0.7, None, 0.8],
    }
)


@pytest.mark.parametrize(
    ("response", "kept", "reasons"),
    [
        (None, {0: 0.9, 2: 0.7, 1: 0.5}, {3: "empty_response"}),  # a plain response counts as chosen ones do
        ("chosen", {0: 0.9, 1: 0.5}, {2: "other_response", 3: "empty_response"}),
        ("rejected", {3: 0.8, 0: 0.4}, {1: "empty_response", 2: "other_response"}),
        ("margin", {0: 0.5}, {1: "empty_response", 2: "other_response", 3: "empty_response"}),
    ],
)
def test_responses_of_preference_data(response: str | None, kept: dict[int, float], reasons: dict[int, str]) -> None:
    found = select_records(PAIRS, SelectConfig(keep="100%", response=response, order="rank"))
    ranked = dict(found.kept.select("record_id", "ifd").iter_rows())
    assert list(ranked) == list(kept)
    assert list(ranked.values()) == pytest.approx(list(kept.values()))
    assert dict(found.rejected.iter_rows()) == reasons
    if response == "margin":
        assert found.kept["response_tokens"].to_list() == [5]


def test_a_response_that_no_turn_is() -> None:
    with pytest.raises(ScorerError, match="no turn here is reasoning; they are chosen, rejected"):
        select_records(PAIRS, SelectConfig(response="reasoning"))
    with pytest.raises(ScorerError, match="no turn here is margin; they are plain responses"):
        select_records(PAIRS.drop("response"), SelectConfig(response="margin"))


def test_reasoning_and_answer_are_ranked_together_or_alone() -> None:
    scores = PAIRS.head(2).with_columns(response=pl.Series(["reasoning", "answer"]))
    for response, value in ((None, 0.65), ("reasoning", 0.9), ("answer", 0.4)):
        found = select_records(scores, SelectConfig(keep=1, response=response))
        assert found.kept["ifd"].to_list() == pytest.approx([value])
