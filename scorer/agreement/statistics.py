"""How far two scorers agree: rank correlations and overlaps of their selections, with bootstrap intervals.

Knows arrays only; neither files nor tables.
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

TAU_RESAMPLES = 50  # tau-b takes ten times as long as all else, and a standard deviation needs fewer draws
LEVEL = 0.95
NORMAL = 1.959964  # standard deviations at LEVEL

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic and its confidence interval at LEVEL; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two selections of the same share have in common: each holds `records`, and `shared` are in both.

    overlap is shared / records; iou is intersection over union.
    """

    share: Fraction
    records: int
    shared: int
    overlap: Estimate
    iou: Estimate


@dataclass(frozen=True, slots=True)
class Agreement:
    """What two scorers of the same records have in common.

    records, left_out: how many have a finite value from both, and how many do not. whole: the selections from all
    records at each share. per_cluster: the selections with a quota for each cluster, by largest remainder; None without
    clusters.
    """

    records: int
    left_out: int
    spearman: Estimate
    kendall: Estimate
    whole: tuple[Overlap, ...]
    per_cluster: tuple[Overlap, ...] | None


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are drawn; without resamples there are none."""

    resamples: int = 200
    seed: int = 42


def agree(
    first: Floats,
    second: Floats,
    at: Sequence[Fraction],
    *,
    lowest: tuple[bool, bool] = (False, False),
    clusters: Ints | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> Agreement:
    """Compare two scorers' values, [n] each, of the same records in the order of their ids (by which ties break).

    Spearman is Pearson's correlation of mid-ranks, Kendall is tau-b. A selection at a share holds
    floor(share * n + 1/2) records: the highest values, or where `lowest` the lowest, with no limit on any measure.

    Each resample draws n records with replacement. The intervals of Spearman and of the overlaps, whose selections are
    made anew, are percentiles; that of tau-b is 1.96 standard deviations over at most TAU_RESAMPLES resamples. For
    `per_cluster`, clusters are drawn instead of records.
    """
    finite = np.isfinite(first) & np.isfinite(second)
    x, y = first[finite], second[finite]
    orders = [np.argsort(v if low else -v, kind="stable") for v, low in zip((x, y), lowest, strict=True)]
    sizes = [math.floor(share * len(x) + Fraction(1, 2)) for share in at]
    ranks = [np.unique(v, return_inverse=True)[1] for v in (x, y)]
    once = np.ones(len(x), dtype=np.int64)
    generator = np.random.default_rng(bootstrap.seed)
    rhos: list[float] = []
    resampled: list[list[int]] = []
    for _ in range(bootstrap.resamples if len(x) else 0):
        counts = np.bincount(generator.integers(len(x), size=len(x)), minlength=len(x))
        rhos.append(_spearman(ranks, counts))
        resampled.append(_shared(orders, sizes, counts))
    by_share = np.array(resampled, dtype=np.int64).reshape(len(resampled), len(sizes)).T
    whole = [
        _overlap(share, size, shared, drawn, np.full_like(drawn, size))
        for share, size, shared, drawn in zip(at, sizes, _shared(orders, sizes, once), by_share, strict=True)
    ]
    per_cluster = None
    if clusters is not None:
        labels = np.unique(clusters[finite], return_inverse=True)[1]
        shares = zip(at, sizes, strict=True)
        per_cluster = tuple(_overlap_per_cluster(orders, labels, *share, bootstrap) for share in shares)
    spearman = with_interval(_spearman(ranks, once), rhos)
    kendall = _kendall(ranks[0], ranks[1], bootstrap)
    return Agreement(len(x), len(first) - len(x), spearman, kendall, tuple(whole), per_cluster)


def tau_b(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Kendall's tau-b of two [n] arrays in O(n log n); NaN where one is constant."""
    from scipy.stats import kendalltau

    x, y = np.asarray(first), np.asarray(second)
    if (x == x[:1]).all() or (y == y[:1]).all():  # scipy divides by zero for two of them
        return math.nan
    return float(kendalltau(x, y).statistic)


def _kendall(first: Ints, second: Ints, bootstrap: Bootstrap) -> Estimate:
    value = tau_b(first, second)
    if math.isnan(value):
        return Estimate(None)
    generator = np.random.default_rng(bootstrap.seed)
    draws = [generator.integers(len(first), size=len(first)) for _ in range(min(bootstrap.resamples, TAU_RESAMPLES))]
    taus = np.array([tau_b(first[rows], second[rows]) for rows in draws])
    taus = taus[np.isfinite(taus)]
    if len(taus) < 2:
        return Estimate(value)
    half = NORMAL * float(taus.std(ddof=1))
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half))


def _spearman(ranks: Sequence[Ints], counts: Ints) -> float:
    """Spearman's correlation of a sample that has each record `counts` times; `ranks` number the values, ascending."""
    centred = []
    for rank in ranks:
        copies = np.bincount(rank, weights=counts)
        mid_ranks = (np.cumsum(copies) - (copies - 1) / 2)[rank]
        centred.append(mid_ranks - np.average(mid_ranks, weights=counts) if len(counts) else mid_ranks)
    a, b = centred
    scale = math.sqrt(float((counts * a * a).sum()) * float((counts * b * b).sum()))
    return float((counts * a * b).sum()) / scale if scale else math.nan


def _shared(orders: Sequence[Ints], sizes: Sequence[int], counts: Ints) -> list[int]:
    """How many records two selections of each size share, in a sample that has each record `counts` times."""
    copies = [counts[order] for order in orders]
    before = [np.cumsum(count) - count for count in copies]
    shared = []
    for size in sizes:
        selected = np.zeros((2, len(counts)), dtype=np.int64)  # copies of each record in the two selections
        for row, order, count, earlier in zip(selected, orders, copies, before, strict=True):
            end = np.searchsorted(earlier, size)
            row[order[:end]] = np.minimum(count[:end], size - earlier[:end])
        shared.append(int(selected.min(axis=0).sum()))
    return shared


def _overlap_per_cluster(
    orders: Sequence[Ints], labels: Ints, share: Fraction, size: int, bootstrap: Bootstrap
) -> Overlap:
    """The overlap of selections that take a quota from each cluster; `labels` number the clusters from 0."""
    sizes = np.bincount(labels)
    k = len(sizes)
    quotas = np.array(largest_remainder(size, sizes.tolist()) if k else [], dtype=np.int64)
    both = np.ones(len(labels), dtype=bool)
    for order in orders:
        grouped = order[np.argsort(labels[order], kind="stable")]
        rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[labels[grouped]]
        both[grouped[rank >= quotas[labels[grouped]]]] = False
    shared = np.bincount(labels[both], minlength=k)
    drawn = np.random.default_rng(bootstrap.seed).integers(max(k, 1), size=(bootstrap.resamples if k else 0, k))
    return _overlap(share, size, int(shared.sum()), shared[drawn].sum(axis=1), quotas[drawn].sum(axis=1))


def _overlap(share: Fraction, size: int, shared: int, drawn: Ints, drawn_sizes: Ints) -> Overlap:
    """drawn, drawn_sizes: what the selections share in each resample, and how many records each then holds."""
    if not size:
        return Overlap(share, 0, 0, Estimate(None), Estimate(None))
    filled = drawn_sizes > 0
    drawn, drawn_sizes = drawn[filled], drawn_sizes[filled]
    overlap = with_interval(shared / size, drawn / drawn_sizes)
    iou = with_interval(shared / (2 * size - shared), drawn / (2 * drawn_sizes - drawn))
    return Overlap(share, size, shared, overlap, iou)


def with_interval(value: float, drawn: Sequence[float] | Floats) -> Estimate:
    """A statistic with the percentile interval of its resamples `drawn`, [b]; NaN is not defined, there and here."""
    values = np.asarray(drawn, dtype=np.float64)
    values = values[np.isfinite(values)]
    if math.isnan(value) or not len(values):
        return Estimate(None if math.isnan(value) else value)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))
