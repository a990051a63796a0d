"""Quotas, groups, thirds, flags and diversity in a selection: worked out by hand, and what holds for every table."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from scorer.scores.shares import exact_quotas, largest_remainder, paper_quotas, split_bounds
from scorer.selection.config import BUCKETS, SelectConfig
from scorer.selection.ranking import select_records
from scorer.selection.selection import Selection
from scorer.types import ScorerError

TENTH = Fraction(1, 10)


def table(values: list[float | None]) -> pl.DataFrame:
    status = ["ok" if value is not None else "bad_json" for value in values]
    return pl.DataFrame(
        {"record_id": range(len(values)), "turn": 0, "status": status, "ifd": values},
        schema={"record_id": pl.Int64, "turn": pl.Int32, "status": pl.String, "ifd": pl.Float64},
    )


def groups(keys: list[Any]) -> pl.DataFrame:
    return pl.DataFrame({"record_id": pl.Series(range(len(keys)), dtype=pl.Int64), "group": keys})


def kept(selection: Selection) -> list[int]:
    return selection.kept["record_id"].to_list()


@pytest.mark.parametrize(
    ("total", "sizes", "quotas"),
    [
        (10, [60, 30, 10], [6, 3, 1]),
        (10, [55, 33, 12], [6, 3, 1]),  # 5.5, 3.3, 1.2: the one left goes to .5
        (1, [5, 5, 5], [1, 0, 0]),  # of equal fractions the first
        (2, [1, 2, 2], [0, 1, 1]),  # .4, .8, .8
        (7, [1, 1], [4, 3]),
        (0, [3, 4], [0, 0]),
    ],
)
def test_largest_remainder(total: int, sizes: list[int], quotas: list[int]) -> None:
    assert largest_remainder(total, sizes) == quotas


@pytest.mark.parametrize(
    ("total", "sizes", "room", "quotas"),
    [
        (10, [10, 10], [10, 10], [5, 5]),
        (10, [10, 10], [2, 10], [2, 8]),
        (9, [10, 10, 10], [1, 10, 10], [1, 4, 4]),
        (10, [10, 10, 10], [0, 10, 10], [0, 5, 5]),
        (10, [40, 10, 10], [3, 4, 9], [3, 4, 3]),  # 6.67, 1.67, 1.67; then 7 among equals: 4, 3
        (10, [40, 20, 10], [3, 4, 9], [3, 4, 3]),  # 5.71, 2.86, 1.43; then 4.67, 2.33: the second is short in its turn
        (10, [5, 5], [2, 3], [2, 3]),  # fewer than asked for
    ],
)
def test_what_a_group_lacks_passes_on(total: int, sizes: list[int], room: list[int], quotas: list[int]) -> None:
    assert exact_quotas(total, sizes, room) == quotas


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_papers_parts_are_those_of_array_split(size: int, parts: int) -> None:
    lengths = [len(part) for part in np.array_split(np.arange(size), parts)]
    assert np.diff([0, *split_bounds(size, parts)]).tolist() == lengths
    assert paper_quotas(Fraction(1, parts), [size]) == [lengths[0]]


def test_the_papers_rounding() -> None:
    # round(100 / 15) = 7 parts of 10, 7, 8 and 1: the first part holds 2, 1, 2 and 1
    assert paper_quotas(Fraction(15, 100), [10, 7, 8, 1]) == [2, 1, 2, 1]
    assert paper_quotas(Fraction(1), [10, 7]) == [10, 7]


def test_ten_percent_of_alpaca_is_5200_whatever_the_clusters() -> None:
    draw = np.random.default_rng(0)
    keys = np.minimum(draw.geometric(0.01, 52_002), 999)
    scores = table(draw.random(52_002).tolist())
    exact = select_records(scores, SelectConfig(TENTH, per_cluster=True), groups=groups(keys.tolist()))
    assert exact.kept.height == exact.requested == 5_200
    sizes = Counter(keys.tolist())
    for key, count in Counter(keys[kept(exact)].tolist()).items():
        assert abs(count - sizes[key] / 10) < 1
    paper = select_records(
        scores, SelectConfig(TENTH, per_cluster=True, rounding="paper"), groups=groups(keys.tolist())
    )
    assert Counter(keys[kept(paper)].tolist()) == {key: -(-size // 10) for key, size in sizes.items()}
    assert paper.requested == paper.kept.height > 5_300


# Eight records of group b, four of a, and two that the groups lack.
VALUES: list[float | None] = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.55, 0.15, None, 0.25, 0.5, 0.05]
KEYS = ["b"] * 8 + ["a"] * 4


def test_the_best_of_each_group() -> None:
    scores = table(VALUES)
    # 7 of 14: b 4, a 2, and the two without a group 1
    selection = select_records(scores, SelectConfig(7, per="domain", order="rank"), groups=groups(KEYS))
    assert kept(selection) == [1, 3, 5, 7, 8, 12, 11]
    assert selection.kept["rank"].to_list() == list(range(1, 8))
    lowest = select_records(scores, SelectConfig(7, per="domain", lowest=True), groups=groups(KEYS))
    assert kept(lowest) == [0, 2, 4, 6, 9, 11, 13]
    assert dict(selection.rejected.iter_rows()) == {10: "bad_json"} | dict.fromkeys([0, 2, 4, 6, 9, 13], "below_cut")
    # a paper share of 1/3: ceil(8/3), ceil(4/3), ceil(2/3)
    paper = select_records(scores, SelectConfig(Fraction(1, 3), per="domain", rounding="paper"), groups=groups(KEYS))
    assert (kept(paper), paper.requested) == ([1, 3, 5, 8, 11, 12], 6)


def test_a_group_without_enough_passes_on_only_where_totals_are_exact() -> None:
    scores = table([None, None, None, 0.5, 0.1, 0.2, 0.3, 0.4])
    halves = groups([1, 1, 1, 1, 2, 2, 2, 2])
    assert kept(select_records(scores, SelectConfig(Fraction(1, 2), per_cluster=True), groups=halves)) == [3, 5, 6, 7]
    paper = select_records(scores, SelectConfig(Fraction(1, 2), per_cluster=True, rounding="paper"), groups=halves)
    assert (kept(paper), paper.requested) == ([3, 6, 7], 4)


def test_thirds_of_the_ranking() -> None:
    scores = table([0.1, 0.5, 0.5, 0.2, 0.9, 0.7, 0.3, 1.5])  # seven eligible, ascending: 0 3 6 | 1 2 | 5 4
    for bucket, ids in (("low", [0, 3, 6]), ("mid", [1, 2]), ("high", [4, 5])):
        selection = select_records(scores, SelectConfig(8, bucket=bucket))
        assert kept(selection) == ids
        assert Counter(selection.rejected["reason"].to_list()) == {"other_bucket": 7 - len(ids), "ifd_too_high": 1}
    best = select_records(scores, SelectConfig(1, bucket="low"))
    assert kept(best) == [6]
    assert dict(best.rejected.iter_rows())[0] == "below_cut"
    assert kept(select_records(scores, SelectConfig(1, bucket="low", lowest=True))) == [0]


def test_thirds_inside_groups() -> None:
    scores = table([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8])
    halves = groups(["a", "a", "a", "a", "b", "b", "b"])
    thirds = {b: kept(select_records(scores, SelectConfig(7, bucket=b, per="x"), groups=halves)) for b in BUCKETS}
    assert thirds == {"low": [0, 1, 4], "mid": [2, 5], "high": [3, 6]}


def test_random_inside_groups_is_of_the_seed() -> None:
    scores = table([0.5] * 60)
    keys = groups(["b"] * 40 + ["a"] * 20)
    config = SelectConfig(TENTH, per="x", random=True, seed=7, order="rank")
    drawn = select_records(scores, config, groups=keys)
    draw = Random(7)  # group after group, in the order of their keys
    assert kept(drawn) == [40 + i for i in draw.sample(range(20), 2)] + draw.sample(range(40), 4)
    shuffled = select_records(scores.sample(fraction=1.0, shuffle=True, seed=1), config, groups=keys.reverse())
    assert_frame_equal(shuffled.kept, drawn.kept)
    assert set(kept(select_records(scores, SelectConfig(TENTH, per="x", random=True, seed=8), groups=keys))) != set(
        kept(drawn)
    )


def test_flags_drop_records_for_their_own_reason() -> None:
    scores = table([0.9, 0.8, 1.2, 1.3, 0.7, None, 0.6])
    flags = pl.DataFrame(
        {"record_id": [6, 0, 2, 4, 5], "dull": [None, True, True, False, True], "odd": [True, True, False, False, True]}
    )
    assert kept(select_records(scores, SelectConfig(7), flags=flags)) == [0, 1, 4, 6]  # off by default
    selection = select_records(scores, SelectConfig(7, drop_flagged=("odd", "dull")), flags=flags)
    assert kept(selection) == [1, 4]
    assert dict(selection.rejected.iter_rows()) == {0: "odd", 2: "dull", 3: "ifd_too_high", 5: "bad_json", 6: "odd"}
    with pytest.raises(ScorerError, match="loud"):
        select_records(scores, SelectConfig(7, drop_flagged=("loud",)), flags=flags)


def test_diversity_chooses_from_the_best() -> None:
    asked: list[tuple[list[int], int]] = []

    def spread(ids: pl.Series, size: int) -> list[int]:
        asked.append((ids.to_list(), size))
        return [2, 0][:size]

    scores = table([0.1, 0.9, 0.2, 0.8, 0.7, 0.3, 0.4, 0.5, 0.6, None])
    selection = select_records(scores, SelectConfig(diverse=0.2, pool=0.4, order="rank"), diversify=spread)
    assert asked == [([1, 3, 4, 8], 2)]  # shares of all ten
    assert kept(selection) == [4, 1]
    assert Counter(selection.rejected["reason"].to_list()) == {"not_diverse": 2, "below_cut": 5, "bad_json": 1}
    with pytest.raises(ScorerError, match="5 records can't be kept of the 4"):
        select_records(scores, SelectConfig(diverse=5, pool=4), diversify=spread)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "a", "per_cluster": True}, "not by both"),
        ({"keep": 5, "rounding": "paper"}, "paper's needs a share"),
        ({"rounding": "up"}, "rounding: 'up' is not one of exact, paper"),
        ({"bucket": "top"}, "bucket: 'top' is not one of low, mid, high"),
        ({"pool": "20%"}, "give --diverse too"),
        ({"diverse": 5}, "leave --keep out"),
        ({"keep": None, "diverse": 5, "pool": 0}, "pool: '0'"),
        ({"drop_flagged": "refusal"}, "not a tuple"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        SelectConfig(**{"keep": TENTH, **options})


def test_a_record_in_two_groups_is_refused() -> None:
    twice = pl.DataFrame({"record_id": [0, 0], "group": [1, 2]})
    with pytest.raises(ScorerError, match="two groups"):
        select_records(table([0.5, 0.5]), SelectConfig(1, per_cluster=True), groups=twice)


FEW = st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9, 1.2, None])
RECORDS = st.lists(st.tuples(FEW, st.sampled_from(["a", "b", "c", "d", None])), max_size=40)
CONFIGS = st.builds(
    SelectConfig,
    keep=st.fractions(Fraction(1, 20), 1, max_denominator=20),
    per=st.just("x"),
    lowest=st.booleans(),
    random=st.booleans(),
    rounding=st.sampled_from(["exact", "paper"]),
    bucket=st.sampled_from([None, *BUCKETS]),
    order=st.sampled_from(["input", "rank"]),
)


@settings(max_examples=200, deadline=None)
@given(records=RECORDS, config=CONFIGS, data=st.data())
def test_what_holds_for_every_table(
    records: list[tuple[float | None, str | None]], config: SelectConfig, data: st.DataObject
) -> None:
    scores, keys = table([value for value, _ in records]), groups([key for _, key in records])
    keys = keys.cast({"group": pl.String})
    selection = select_records(scores, config, groups=keys)
    chosen, dropped = kept(selection), selection.rejected["record_id"].to_list()
    assert sorted(chosen + dropped) == list(range(len(records)))  # each record once, in one of the two
    reasons = selection.rejected["reason"].to_list()
    could = len(chosen) + reasons.count("not_drawn" if config.random else "below_cut")
    share = Fraction(str(config.keep))
    if config.rounding == "exact":
        assert selection.requested == int(share * len(records) + Fraction(1, 2))
        assert len(chosen) == min(selection.requested, could)  # exact, whatever the groups
    sizes = Counter(key for _, key in records)
    for key, count in Counter(records[i][1] for i in chosen).items():
        assert count <= sizes[key]
        if config.rounding == "paper":
            assert count <= -(-sizes[key] // round(1 / share))
    assert selection.kept.sort("rank")["rank"].to_list() == list(range(1, len(chosen) + 1))
    order = data.draw(st.permutations(range(len(records))))
    shuffled = select_records(scores[order], config, groups=keys[order[::-1]])
    assert_frame_equal(shuffled.kept, selection.kept)
    assert_frame_equal(shuffled.rejected, selection.rejected)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=12), st.integers(0, 200))
def test_quotas_are_exact(groups: list[tuple[int, int]], total: int) -> None:
    sizes, room = [size for size, _ in groups], [min(size, free) for size, free in groups]
    quotas = exact_quotas(total, sizes, room)
    assert sum(quotas) == min(total, sum(room))
    assert all(0 <= quota <= free for quota, free in zip(quotas, room, strict=True))
    assert sum(largest_remainder(total, sizes)) == total
