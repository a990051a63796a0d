"""How far two scorers agree: rank correlations, and what their selections share, with bootstrap intervals.

Pure numbers: it knows neither files nor tables. A larger or a smaller value is better as the caller says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from scorer.scores.shares import largest_remainder

TAU_RESAMPLES = 50  # tau-b takes ten times as long as all else, and its interval needs a deviation only
LEVEL = 0.95
NORMAL = 1.959964  # standard deviations at LEVEL

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A statistic, and its interval at LEVEL; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """The selections of one share of the records: how many each holds, how many both hold.

    overlap is shared / records; iou is shared / (records of either).
    """

    share: Fraction
    records: int
    shared: int
    overlap: Figure
    iou: Figure


@dataclass(frozen=True, slots=True)
class Agreement:
    """What two scorers of the same records have in common; `records` have a finite value of both, `left_out` have not.

    per_cluster: each share is selected inside clusters, by largest remainder; None without clusters.
    """

    records: int
    left_out: int
    spearman: Figure
    kendall: Figure
    whole: tuple[Cut, ...]
    per_cluster: tuple[Cut, ...] | None


def agree(
    first: Floats,
    second: Floats,
    at: Sequence[Fraction],
    *,
    lowest: tuple[bool, bool] = (False, False),
    clusters: Ints | None = None,
    resamples: int = 200,
    seed: int = 42,
) -> Agreement:
    """Compare two scorers' values, [n] each, of the same records in the order of their ids (by which ties break).

    Spearman is Pearson's correlation of mid-ranks, Kendall is tau-b. A selection at a share holds
    floor(share * n + 1/2) records: the best of all, with no limit on any measure.

    Intervals, by `resamples` draws of n records with replacement: the percentiles of Spearman and of what the
    selections, made anew, share. Of tau-b: 1.96 standard deviations over at most TAU_RESAMPLES draws. Per cluster,
    clusters are drawn instead of records.
    """
    finite = np.isfinite(first) & np.isfinite(second)
    x, y = first[finite], second[finite]
    orders = [np.argsort(v if low else -v, kind="stable") for v, low in zip((x, y), lowest, strict=True)]
    sizes = [math.floor(share * len(x) + Fraction(1, 2)) for share in at]
    ranks = [np.unique(v, return_inverse=True)[1] for v in (x, y)]
    once = np.ones(len(x), dtype=np.int64)
    draw = np.random.default_rng(seed)
    rhos: list[float] = []
    shares: list[list[int]] = []
    for _ in range(resamples if len(x) else 0):
        counts = np.bincount(draw.integers(len(x), size=len(x)), minlength=len(x))
        rhos.append(_spearman(ranks, counts))
        shares.append(_shared(orders, sizes, counts))
    cuts = []
    for i, (share, size, shared) in enumerate(zip(at, sizes, _shared(orders, sizes, once), strict=True)):
        cuts.append(_cut(share, size, shared, np.array([row[i] for row in shares]), np.full(len(shares), size)))
    per_cluster = None
    if clusters is not None:
        number = np.unique(clusters[finite], return_inverse=True)[1]
        per_cluster = tuple(_cut_inside(orders, number, *cut, resamples, seed) for cut in zip(at, sizes, strict=True))
    spearman = _interval(_spearman(ranks, once), rhos)
    kendall = _kendall(ranks[0], ranks[1], min(resamples, TAU_RESAMPLES), seed)
    return Agreement(len(x), len(first) - len(x), spearman, kendall, tuple(cuts), per_cluster)


def tau_b(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Kendall's tau-b of two [n] arrays in O(n log n), NaN where one is constant."""
    from scipy.stats import kendalltau

    x, y = np.asarray(first), np.asarray(second)
    if (x == x[:1]).all() or (y == y[:1]).all():  # scipy divides by zero for two of them
        return math.nan
    return float(kendalltau(x, y).statistic)


def _kendall(first: Ints, second: Ints, resamples: int, seed: int) -> Figure:
    value = tau_b(first, second)
    if math.isnan(value):
        return Figure(None)
    draw = np.random.default_rng(seed)
    drawn = [draw.integers(len(first), size=len(first)) for _ in range(resamples)]
    taus = np.array([tau_b(first[rows], second[rows]) for rows in drawn])
    taus = taus[np.isfinite(taus)]
    if len(taus) < 2:
        return Figure(value)
    half = NORMAL * float(taus.std(ddof=1))
    return Figure(value, max(-1.0, value - half), min(1.0, value + half))


def _spearman(ranks: Sequence[Ints], counts: Ints) -> float:
    """Spearman's correlation of a sample that has each record `counts` times; `ranks` number the values, ascending."""
    centred = []
    for numbers in ranks:
        held = np.bincount(numbers, weights=counts)
        middle = (np.cumsum(held) - (held - 1) / 2)[numbers]
        centred.append(middle - np.average(middle, weights=counts) if len(counts) else middle)
    a, b = centred
    scale = math.sqrt(float((counts * a * a).sum()) * float((counts * b * b).sum()))
    return float((counts * a * b).sum()) / scale if scale else math.nan


def _shared(orders: Sequence[Ints], sizes: Sequence[int], counts: Ints) -> list[int]:
    """How many records two selections of each size share, in a sample that has each record `counts` times."""
    sums = [np.cumsum(counts[order]) for order in orders]
    result = []
    for size in sizes:
        members = []
        for order, total in zip(orders, sums, strict=True):
            end = int(np.searchsorted(total, size)) + 1 if size else 0
            member = np.zeros(len(counts), dtype=np.int64)
            member[order[:end]] = counts[order[:end]]
            if end:
                member[order[end - 1]] -= total[end - 1] - size
            members.append(member)
        result.append(int(np.minimum(*members).sum()))
    return result


def _cut_inside(orders: Sequence[Ints], number: Ints, share: Fraction, size: int, resamples: int, seed: int) -> Cut:
    """The cut of selections made inside the clusters that `number` each record, from 0."""
    sizes = np.bincount(number)
    quotas = np.array(largest_remainder(size, sizes.tolist()) if len(sizes) else [], dtype=np.int64)
    both = np.ones(len(number), dtype=bool)
    for order in orders:
        grouped = order[np.argsort(number[order], kind="stable")]
        place = np.arange(len(number)) - (np.cumsum(sizes) - sizes)[number[grouped]]
        both[grouped[place >= quotas[number[grouped]]]] = False
    shared = np.bincount(number[both], minlength=len(sizes))
    drawn = np.random.default_rng(seed).integers(max(len(sizes), 1), size=(resamples if len(sizes) else 0, len(sizes)))
    return _cut(share, size, int(shared.sum()), shared[drawn].sum(axis=1), quotas[drawn].sum(axis=1))


def _cut(share: Fraction, size: int, shared: int, drawn: Ints, drawn_sizes: Ints) -> Cut:
    if not size:
        return Cut(share, 0, 0, Figure(None), Figure(None))
    some = drawn_sizes > 0
    drawn, drawn_sizes = drawn[some], drawn_sizes[some]
    overlap = _interval(shared / size, drawn / drawn_sizes)
    return Cut(share, size, shared, overlap, _interval(shared / (2 * size - shared), drawn / (2 * drawn_sizes - drawn)))


def _interval(value: float, drawn: Sequence[float] | Floats) -> Figure:
    if math.isnan(value):
        return Figure(None)
    values = np.asarray(drawn, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return Figure(value)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(value, float(low), float(high))
