"""Fine-tuned models compared by hand-checkable NLLs: figures, intervals, words, and the way through JSON."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from scorer.agreement.statistics import Bootstrap, Estimate
from scorer.console import show_validation
from scorer.types import ScorerError
from scorer.validation.comparison import ArmPair, Comparison, Verdicts, verdict
from scorer.validation.statistics import compare_arms
from scorer.validation.tables import sentences, tables

TOKENS = [10, 20, 40, 80]
NLLS = {  # a token, of the four records
    ("untrained", 0): [4.0, 4.0, 4.0, 4.0],
    ("selected", 1): [1.0, 2.0, 3.0, 2.0],
    ("selected", 2): [1.0, 2.0, 1.0, 2.0],
    ("random", 1): [2.0, 2.0, 2.0, 2.0],
    ("random", 2): [2.0, 3.0, 2.0, 2.0],
}
ROWS = pl.DataFrame(
    {"row": [0, 1, 2, 3], "ifd": [0.9, 0.5, None, 0.7], "cluster": [5, 5, None, 2], "group": ["b", "a", "b", "b"]}
)
ARMS = pl.DataFrame(
    {
        "arm": ["selected", "selected", "random", "random"],
        "seed": [1, 2, 1, 2],
        "records": 6,
        "tokens": [90, 90, 50, 70],
    }
)


def long(nlls: dict[tuple[str, int], Any], tokens: Any) -> pl.DataFrame:
    """The table of results, from NLLs a token."""
    frames = [
        pl.DataFrame({"arm": arm, "seed": seed, "row": range(len(tokens)), "nll": np.multiply(of, tokens)})
        for (arm, seed), of in nlls.items()
    ]
    return pl.concat(frame.with_columns(tokens=pl.Series(tokens)) for frame in frames)


def compared(resamples: int = 200, seed: int = 42) -> Comparison:
    return compare_arms(long(NLLS, TOKENS), ROWS, ARMS, Bootstrap(resamples, seed))


def pair_of(found: Comparison, arm: str, against: str) -> ArmPair:
    (pair,) = (pair for pair in found.pairs if (pair.arm, pair.against) == (arm, against))
    return pair


def test_two_arms_by_hand() -> None:
    found = compared()
    assert (found.records, found.left_out, found.seeds, found.sampled) == (4, 0, 2, ("records", "seeds"))
    untrained, selected, random = found.arms
    assert [arm.arm for arm in found.arms] == ["untrained", "selected", "random"]
    assert [(arm.records, arm.tokens) for arm in found.arms] == [(None, None), (6, 90), (6, 60)]
    # (10 + 40 + 120 + 160) and (10 + 40 + 40 + 160) of 150 tokens; 8 and 6 of 4 records
    assert selected.nll_per_token.value == pytest.approx((330 + 250) / 300)
    assert selected.mean_of_rows.value == 1.75
    assert selected.hardest_third.value == 1.0  # one of the three with ifd: record 0
    assert selected.ifd_weighted.value == pytest.approx((0.9 * 1 + 0.5 * 2 + 0.7 * 2) / 2.1)
    assert {name: of.value for name, of in selected.by["length"].items()} == {
        "under 30 tokens": 1.5,
        "30 to 79 tokens": 2.0,
        "from 80 tokens": 2.0,
    }
    assert {name: of.value for name, of in random.by["cluster"].items()} == {"5": 2.25, "2": 2.0}
    assert found.sizes["cluster"] == {"5": 2, "2": 1}
    assert found.sizes["group"] == {"b": 3, "a": 1}
    assert random.by["group"]["a"].value == 2.5
    assert untrained.mean_of_rows == Estimate(4.0, 4.0, 4.0)


def test_pairs_by_hand() -> None:
    found = compared()
    assert [(pair.arm, pair.against) for pair in found.pairs] == [("selected", "random"), ("random", "selected")]
    assert found.baseline == "random"
    assert found.against_baseline == [found.pairs[0]]
    pair, back = found.pairs
    assert pair.mean_of_rows.value == 1.75 - 2.125
    assert back.mean_of_rows.value == 2.125 - 1.75
    assert pair.nll_per_token.value == pytest.approx((580 - 300 - 320) / 300)
    # seed 1: win, tie, loss, tie; seed 2: win, win, win, tie
    assert pair.win_rate.value == (1 + 0.5 + 0 + 0.5 + 1 + 1 + 1 + 0.5) / 8
    assert back.win_rate.value == 1 - pair.win_rate.value
    assert pair.win_rate_hardest == Estimate(1.0, 1.0, 1.0)
    assert pair.hardest_third == Estimate(-1.0, -1.0, -1.0)
    assert pair.mean_of_rows.low is not None
    assert pair.mean_of_rows.low < pair.mean_of_rows.value < (pair.mean_of_rows.high or 0)


def test_a_constant_difference_has_no_width() -> None:
    draw = np.random.default_rng(0)
    base = {("a", seed): draw.uniform(1, 4, 50) for seed in range(3)}
    shifted = {("b", seed): of + 0.25 for (_, seed), of in base.items()}
    found = compare_arms(long(base | shifted, [8] * 50), ROWS.head(0), ARMS, Bootstrap(100))
    pair = pair_of(found, "a", "b")
    for figure in (pair.mean_of_rows, pair.nll_per_token):
        assert [figure.value, figure.low, figure.high] == pytest.approx([-0.25] * 3)
    assert pair.win_rate == Estimate(1.0, 1.0, 1.0)
    assert pair.hardest_third == pair.win_rate_hardest == Estimate(None)  # no ifd is known
    wide = found.arms[0].mean_of_rows
    assert (wide.high or 0) - (wide.low or 0) > 0.1
    assert found.baseline == "b"  # the last


def test_equal_models_do_not_differ() -> None:
    draw = np.random.default_rng(0)
    same = {seed: draw.uniform(1, 4, 97) for seed in range(3)}
    nlls = {(arm, seed): of for arm in "abcde" for seed, of in same.items()}
    found = compare_arms(long(nlls, draw.integers(1, 99, 97)), ROWS.head(0), ARMS, Bootstrap(100))
    assert len(found.pairs) == 20
    for pair in found.pairs:
        assert pair.mean_of_rows == pair.nll_per_token == Estimate(0.0, 0.0, 0.0)
        assert pair.win_rate == Estimate(0.5, 0.5, 0.5)


def test_intervals_hold_the_truth() -> None:
    """A difference of 0.1 on average, where records vary more than seeds, and seeds are many."""
    draw, inside = np.random.default_rng(0), 0
    for _ in range(40):
        level = draw.normal(2, 1, 100)
        a, b = ({seed: level + draw.normal(0, 0.1) + draw.normal(0, 0.5, 100) for seed in range(8)} for _ in "ab")
        nlls = {("a", seed): of for seed, of in a.items()} | {("b", seed): of + 0.1 for seed, of in b.items()}
        found = compare_arms(long(nlls, [50] * 100), ROWS.head(0), ARMS, Bootstrap(200))
        figure = pair_of(found, "b", "a").mean_of_rows
        inside += (figure.low or 0) < 0.1 < (figure.high or 0)
    assert inside >= 33  # 38 expected of 40


def test_draws_are_seeded_and_none_or_of_records_alone() -> None:
    assert compared(seed=3) == compared(seed=3)
    assert compared(seed=3).pairs != compared(seed=4).pairs
    bare = compared(resamples=0)
    assert bare.sampled == ()
    assert all(of.low is None for pair in bare.pairs for of in (pair.mean_of_rows, pair.win_rate))
    one = {key: of for key, of in NLLS.items() if key[1] < 2}
    found = compare_arms(long(one, TOKENS), ROWS, ARMS, Bootstrap(50))
    assert (found.seeds, found.sampled) == (1, ("records",))
    assert [*sentences(found)][-1].endswith("over records alone: one seed does not show how much training varies")
    assert [*sentences(bare)] == ["without resamples there are no intervals, which would tell a difference from chance"]


def test_records_without_a_finite_nll_everywhere_are_left_out() -> None:
    nlls = NLLS | {("random", 2): [math.nan, 3.0, 2.0, 2.0], ("selected", 1): [1.0, math.inf, 3.0, 2.0]}
    results = long(nlls, TOKENS).filter((pl.col("arm") != "untrained") | (pl.col("row") != 3))
    found = compare_arms(results, ROWS, ARMS, Bootstrap(10))
    assert (found.records, found.left_out) == (1, 3)
    assert found.arms[1].mean_of_rows.value == 2.0
    assert "3 more records have no finite NLL from every model, and are left out" in [*sentences(found)]
    diverged = long(NLLS | {("random", 2): [math.nan] * 4}, TOKENS)
    with pytest.raises(ScorerError, match=r"random with seed 2 gives 0 of 4 held-out .* lower the learning rate"):
        compare_arms(diverged, ROWS, ARMS, Bootstrap(10))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.2, -0.1, "better"),
        (0.1, 0.2, "worse"),
        (-0.1, 0.1, "no difference seen"),
        (0.0, 0.0, "no difference seen"),
        (None, None, "not known without an interval"),
    ],
)
def test_verdicts_in_words(low: float | None, high: float | None, words: str) -> None:
    assert verdict(Estimate(0.0, low, high)) == words


def test_records_and_tokens_may_contradict_each_other() -> None:
    # three short records are better by 1, one long record is worse by 1
    tokens = [10, 10, 10, 1000] * 25
    nlls = {("selected", 1): [1.0, 1.0, 1.0, 3.0] * 25, ("random", 1): [2.0] * 100}
    found = compare_arms(long(nlls, tokens), ROWS.head(0), ARMS, Bootstrap(200))
    assert next(sentences(found)) == (
        "selected against random: better by the mean of rows, worse by NLL a token: "
        "in the one each record counts once, in the other each token"
    )


def test_through_json_and_back() -> None:
    found = compared()
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values == found.to_dict()
    assert Comparison.from_dict(values) == found
    judged = replace(found, verdicts=(Verdicts("a", "b", 1, 0, 2, 0, {"timed_out": 3}, 1.0),))
    assert Comparison.from_dict(json.loads(json.dumps(judged.to_dict()))) == judged
    wrong: Any
    for wrong in (
        None,
        [],
        {},
        values | {"records": "4"},
        values | {"records": True},
        values | {"sampled": "records"},
        values | {"arms": [{"arm": "selected"}]},
        values | {"pairs": [values["pairs"][0] | {"win_rate": {"value": math.nan, "low": None, "high": None}}]},
    ):
        with pytest.raises(ValueError, match=r"lacks|is not"):
            Comparison.from_dict(wrong)


def test_tables() -> None:
    judged = Verdicts("selected", "random", 5, 1, 2, 3, {"timeout": 2}, 1.273)
    shown = tables(replace(compared(resamples=0), verdicts=(judged,)), full=False)
    assert [table.rows for table in shown] == [
        [
            ["untrained", "none", "none", "4.0000", "4.0000", "4.0000"],
            ["selected", "6", "90", "1.9333", "1.7500", "1.0000"],
            ["random", "6", "60", "2.0667", "2.1250", "2.0000"],
        ],
        [
            ["under 30 tokens", "2", "4.0000", "1.5000", "2.2500"],
            ["30 to 79 tokens", "1", "4.0000", "2.0000", "2.0000"],
            ["from 80 tokens", "1", "4.0000", "2.0000", "2.0000"],
        ],
        [["selected", "-0.1333", "-0.3750", "68.8%"]],
        [["selected", "random", "5", "1", "2", "3", "2 timeout", "1.273"]],
    ]
    assert shown[2].title.startswith("against random: ")
    arms, lengths, against, clusters, groups = tables(compared(), full=True)
    assert arms.rows[0][-1] == "4.0000 (4.0000 to 4.0000)"
    assert against.rows[0][-2:] == ["-1.0000 (-1.0000 to -1.0000)", "100.0% (100.0 to 100.0)"]
    assert [row[:2] for row in clusters.rows] == [["5", "2"], ["2", "1"]]
    assert [table.title for table in (lengths, groups)] == ["mean of rows by length", "mean of rows by group"]


def test_what_the_console_shows(capsys: pytest.CaptureFixture[str]) -> None:
    nlls = {("a\n" * 30 if arm == "selected" else arm, seed): of for (arm, seed), of in NLLS.items()}
    show_validation(compare_arms(long(nlls, TOKENS), ROWS, ARMS, Bootstrap(200)))
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["NLL a token of 4 held-out records, in nats: low is good"]
    assert lines[4] == ["random", "6", "60", "2.0667", "2.1250", "2.0000"]
    arm = "a\\n" * 30  # on one line, however long
    assert lines[3][0] == lines[12][0] == arm
    assert lines[12][3].startswith("68.8% (")
    assert lines[13:] == [
        [f"{arm} against random: no difference seen by the mean of rows, no difference seen by NLL a token"],
        ["the intervals are 95%, over records and seeds"],
    ]
    alone = {key: of for key, of in NLLS.items() if key[0] == "selected"}
    show_validation(compare_arms(long(alone, TOKENS), ROWS.head(0), ARMS, Bootstrap(10)))
    assert "against" not in capsys.readouterr().out


def test_a_usual_validation_takes_about_a_second() -> None:
    draw = np.random.default_rng(0)
    nlls = {(arm, seed): draw.uniform(1, 4, 500) for arm in "abcdef" for seed in range(3)}
    rows = pl.DataFrame({"row": range(500), "ifd": draw.uniform(size=500), "cluster": draw.integers(0, 30, 500)})
    began = time.process_time()
    found = compare_arms(long(nlls, draw.integers(1, 200, 500)), rows, ARMS, Bootstrap(1000))
    assert len(found.pairs) == 30
    assert time.process_time() - began < 10
