"""Agreement worked out by hand, against scipy, and what holds for every two scorers."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from scorer.agreement.statistics import Bootstrap, agree, tau_b

HALF = [Fraction(1, 2)]
Values = npt.NDArray[np.float64]


def tau_b_of_pairs(x: Values, y: Values) -> float:
    """(P - Q) / sqrt((P + Q + X)(P + Q + Y)), X and Y the pairs that tie in x or y only; every pair looked at."""
    i, j = np.triu_indices(len(x), 1)
    a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
    score = (a * b).sum()
    scale = math.sqrt(int((a != 0).sum()) * int((b != 0).sum()))
    return float(score / scale) if scale else math.nan


def test_tau_by_hand() -> None:
    assert tau_b([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # five pairs agree, one does not
    # (1 1 2 3) and (1 2 2 3): of 6 pairs one ties in each; 4 agree: 4 / sqrt(5 * 5)
    assert tau_b([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(0.8)
    assert math.isnan(tau_b([1, 1, 1], [1, 2, 3]))


FEW = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(FEW)
def test_correlations_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=float).T
    found = agree(x, y, HALF, bootstrap=Bootstrap(3))
    expected = tau_b_of_pairs(x, y)
    if math.isnan(expected):
        assert found.kendall.value is None
        assert found.spearman.value is None
    else:
        assert found.kendall.value == pytest.approx(expected, abs=1e-12)
        assert found.spearman.value == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_overlap_by_hand() -> None:
    x = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    y = np.array([9.0, 8, 1, 2, 3, 7, 6, 5, 0, 4])
    found = agree(x, y, [Fraction(1, 5), Fraction(2, 5), Fraction(1, 100), Fraction(1)])
    # best 2: {0 1} and {0 1}; best 4: {0 1 2 3} and {0 1 5 6}; none; all
    assert [(cut.records, cut.shared) for cut in found.whole] == [(2, 2), (4, 2), (0, 0), (10, 10)]
    assert [cut.overlap.value for cut in found.whole] == [1.0, 0.5, None, 1.0]
    assert [cut.iou.value for cut in found.whole] == [1.0, 2 / 6, None, 1.0]
    lowest = agree(x, -y, [Fraction(2, 5)], lowest=(False, True)).whole[0]
    assert lowest.shared == 2
    assert found.per_cluster is None


def test_overlap_inside_clusters_by_hand() -> None:
    clusters = np.array([7, 7, 7, 7, 3, 3, 3, 3, -1, -1])
    x = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    y = np.array([9.0, 6, 8, 7, 0, 1, 2, 3, 4, 5])
    found = agree(x, y, HALF, clusters=clusters)
    assert found.per_cluster is not None
    # 2 of {0 1} and {0 2}; 2 of {4 5} and {7 6}; 1 of {8} and {9}
    assert (found.per_cluster[0].records, found.per_cluster[0].shared) == (5, 1)
    assert found.per_cluster[0].iou.value == pytest.approx(1 / 9)


def test_what_is_not_finite_in_both_is_left_out() -> None:
    x = np.array([1.0, math.nan, 3, math.inf, 2, 4])
    y = np.array([1.0, 5, math.nan, 2, 2, 4])
    found = agree(x, y, HALF)
    assert (found.records, found.left_out, found.kendall.value) == (3, 3, 1.0)
    nothing = agree(x[:0], y[:0], HALF, clusters=np.zeros(0, dtype=np.int64))
    assert (nothing.records, nothing.spearman.value, nothing.whole[0].records) == (0, None, 0)


def test_intervals_are_seeded_and_hold_the_truth() -> None:
    draw = np.random.default_rng(0)
    rho = 0.8  # of normal variables: tau = 2 / pi asin(rho), Spearman 6 / pi asin(rho / 2)
    tau, spearman = 2 / math.pi * math.asin(rho), 6 / math.pi * math.asin(rho / 2)
    inside = np.zeros(2)
    for seed in range(40):
        x = draw.normal(size=300)
        y = rho * x + math.sqrt(1 - rho**2) * draw.normal(size=300)
        found = agree(x, y, [], bootstrap=Bootstrap(100, seed))
        for i, (figure, truth) in enumerate(((found.kendall, tau), (found.spearman, spearman))):
            assert figure.low is not None
            assert figure.high is not None
            assert figure.low < (figure.value or 0) < figure.high
            inside[i] += figure.low < truth < figure.high
    assert (inside >= 33).all()  # 38 expected of 40
    assert agree(x, y, HALF, bootstrap=Bootstrap(seed=3)) == agree(x, y, HALF, bootstrap=Bootstrap(seed=3))
    assert (
        agree(x, y, HALF, bootstrap=Bootstrap(seed=3)).spearman
        != agree(x, y, HALF, bootstrap=Bootstrap(seed=4)).spearman
    )
    assert agree(x, y, HALF, bootstrap=Bootstrap(0)).spearman.low is None


def test_intervals_of_selections_are_of_their_size() -> None:
    draw = np.random.default_rng(1)
    x = draw.normal(size=2000)
    y = x + draw.normal(size=2000)
    clusters = np.arange(2000) % 40
    cut = agree(x, y, [Fraction(1, 10)], clusters=clusters).whole[0]
    inside = (agree(x, y, [Fraction(1, 10)], clusters=clusters).per_cluster or ())[0]
    again = [
        agree(v := draw.normal(size=2000), v + draw.normal(size=2000), [Fraction(1, 10)], bootstrap=Bootstrap(0)).whole[
            0
        ]
    ]
    for _ in range(99):
        v = draw.normal(size=2000)
        again.append(agree(v, v + draw.normal(size=2000), [Fraction(1, 10)], bootstrap=Bootstrap(0)).whole[0])
    spread = float(np.std([c.overlap.value or 0.0 for c in again]))
    for figure in (cut.overlap, inside.overlap):
        assert figure.low is not None
        assert figure.high is not None
        assert figure.value is not None
        assert figure.low <= figure.value <= figure.high
        assert 0.5 < (figure.high - figure.low) / (2 * 1.96 * spread) < 2


@settings(max_examples=60, deadline=None)
@given(FEW, st.fractions(Fraction(1, 10), 1, max_denominator=10))
def test_what_holds_for_every_two(pairs: list[tuple[int, int]], share: Fraction) -> None:
    x, y = np.array(pairs, dtype=float).T
    clusters = np.arange(len(x)) % 3
    options: dict[str, Any] = {"clusters": clusters, "bootstrap": Bootstrap(3)}
    found, mirrored = agree(x, y, [share], **options), agree(y, x, [share], **options)
    assert found.whole[0].shared == mirrored.whole[0].shared
    for cuts in (found.whole, found.per_cluster or ()):
        cut = cuts[0]
        assert 0 <= cut.shared <= cut.records == int(share * len(x) + Fraction(1, 2))
        if cut.iou.value is not None:
            assert cut.iou.value == pytest.approx(cut.shared / (2 * cut.records - cut.shared))
    same = agree(x, x, [share], **options)
    assert same.whole[0].shared == same.whole[0].records
    top = set(np.lexsort((np.arange(len(x)), -x))[: found.whole[0].records].tolist())
    assert found.whole[0].shared == len(top & set(np.lexsort((np.arange(len(y)), -y))[: len(top)].tolist()))


def test_tau_takes_n_log_n() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=50_000)
    began = time.process_time()
    assert 0.45 < tau_b(x, x + draw.normal(size=50_000)) < 0.55  # 2 / pi asin(sqrt(1/2)) = 0.5
    assert time.process_time() - began < 5  # every pair: 1.25 billion
