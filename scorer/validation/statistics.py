"""The NLLs of held-out records -> how the fine-tuned models compare, with bootstrap intervals.

Knows arrays and tables only. Every figure is a weighted mean of NLLs a token, one of each record and seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from scorer.agreement.statistics import Bootstrap, Estimate, with_interval
from scorer.types import ScorerError
from scorer.validation.comparison import UNTRAINED, ArmPair, ArmResult, Comparison

BANDS = (("under 30 tokens", 0, 30), ("30 to 79 tokens", 30, 80), ("from 80 tokens", 80, math.inf))
DIFFERENCES = ("nll_per_token", "mean_of_rows", "hardest_third")
RATES = {"win_rate": "mean_of_rows", "win_rate_hardest": "hardest_third"}  # by the figure whose weights they have

Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[Any]  # numbers, or whether a record counts


def compare_arms(results: pl.DataFrame, rows: pl.DataFrame, arms: pl.DataFrame, bootstrap: Bootstrap) -> Comparison:
    """Compare the models of all arms and seeds on the held-out records.

    results: arm String, seed Int64, row Int64, nll Float64 (nats, the sum over the response's tokens) and tokens Int64.
        All arms have the same seeds; or one seed, as UNTRAINED has, which then stands for all.
    rows: row Int64, and where they are known ifd Float64, cluster (integer) and group String, all with nulls.
    arms: arm String, records Int64 and tokens Int64 that were trained on, of each arm and seed.

    Each resample draws as many records and seeds as there are, with replacement and the same for every arm, so that
    differences are paired. With few seeds the intervals are somewhat too narrow.

    Raises ScorerError where no record has a finite NLL from every model.
    """
    names, values, facts = _grid(results)
    facts = facts.join(rows.select(pl.exclude("tokens")), on="row", how="left", maintain_order="left")
    seeds, records = values.shape[1:]
    draws = _Draws(records, seeds, bootstrap)
    weights = {"nll_per_token": facts["tokens"].to_numpy(), "mean_of_rows": np.ones(records), **_ifd_weights(facts)}
    figures = {name: draws.means(values, weight) for name, weight in weights.items()}
    sizes: dict[str, dict[str, int]] = {}
    parts: dict[str, dict[str, Floats]] = {}
    for kind, name, mask in _parts(facts):
        sizes.setdefault(kind, {})[name] = int(mask.sum())
        parts.setdefault(kind, {})[name] = draws.means(values, mask)
    totals = {arm: found for arm, *found in arms.group_by("arm").agg(pl.mean("records", "tokens")).iter_rows()}

    def arm(i: int, name: str) -> ArmResult:
        own: dict[str, Any] = {figure: _estimate(means[i]) for figure, means in figures.items()}
        by = {kind: {part: _estimate(means[i]) for part, means in found.items()} for kind, found in parts.items()}
        trained_on, tokens = totals.get(name, (None, None))
        return ArmResult(name, trained_on, tokens, **own, by=by)

    trained = [i for i, name in enumerate(names) if name != UNTRAINED]
    both = [(i, j) for i in trained for j in trained if i != j]
    first, second = (values[[pair[side] for pair in both]] for side in (0, 1))
    # The means of differences: the difference of two means of equal models may not be 0 to the last digit.
    differences = {name: draws.means(first - second, weights[name]) for name in DIFFERENCES}
    wins = (first < second) + (first == second) / 2
    rates = {name: draws.means(wins, weights[weight]) for name, weight in RATES.items()}

    def pair(number: int, i: int, j: int) -> ArmPair:
        own = {name: _estimate(means[number]) for name, means in (differences | rates).items()}
        return ArmPair(names[i], names[j], **own)

    return Comparison(
        records=records,
        left_out=results["row"].n_unique() - records,
        seeds=seeds,
        sampled=() if not bootstrap.resamples else ("records", "seeds") if seeds > 1 else ("records",),
        sizes=sizes,
        arms=tuple(arm(i, name) for i, name in enumerate(names)),
        pairs=tuple(pair(number, i, j) for number, (i, j) in enumerate(both)),
    )


class _Draws:
    """Resamples of the records and of the seeds, the same for every figure; the first is the sample as it is."""

    def __init__(self, records: int, seeds: int, bootstrap: Bootstrap):
        generator = np.random.default_rng(bootstrap.seed)
        self.records = _copies(generator, bootstrap.resamples, records)  # [1 + b, records]
        self.seeds = _copies(generator, bootstrap.resamples, seeds)  # [1 + b, seeds]

    def means(self, values: Floats, weights: Weights) -> Floats:
        """The mean of `values`, [k, seeds, records], in each resample, [k, 1 + b]; NaN where nothing has weight.

        weights: [records], the same for every seed.
        """
        counted = np.flatnonzero(weights)
        copies = self.records[:, counted] * weights[counted]
        sums = np.einsum("ksb,bs->kb", values[:, :, counted] @ copies.T, self.seeds)
        with np.errstate(invalid="ignore"):
            means: Floats = sums / (copies.sum(axis=1) * self.seeds.shape[1])
        return means


def _copies(generator: np.random.Generator, resamples: int, size: int) -> Floats:
    """How often the sample itself and each resample have each of `size` items: [1 + resamples, size]."""
    drawn = generator.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    copies = np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size)
    return np.concatenate([np.ones((1, size)), copies])


def _estimate(means: Floats) -> Estimate:
    return with_interval(float(means[0]), means[1:])


def _grid(results: pl.DataFrame) -> tuple[list[str], Floats, pl.DataFrame]:
    """The arms as they first appear, their NLLs a token [arms, seeds, records], and row and tokens of the records."""
    finite = pl.when(pl.col("nll").is_finite() & (pl.col("tokens") > 0)).then(pl.col("nll"))
    keyed = results.with_columns(finite.alias("nll"), model=pl.format("{} with seed {}", "arm", "seed"))
    wide = keyed.pivot("model", index=["row", "tokens"], values="nll").drop_nulls().sort("row")
    if wide.is_empty():
        model, count = keyed.group_by("model").agg(pl.count("nll")).sort("nll", "model").row(0)
        raise ScorerError(
            f"{model} gives {count:,} of {results['row'].n_unique():,} held-out records a finite NLL, and no record "
            "has one from every model: where training diverged, lower the learning rate"
        )
    models = keyed.unique(["arm", "seed"], maintain_order=True).group_by("arm", maintain_order=True)
    columns = {str(arm): of.sort("seed")["model"].to_list() for (arm,), of in models}
    seeds = max(map(len, columns.values()))
    sums = [np.broadcast_to(wide.select(names).to_numpy().T, (seeds, len(wide))) for names in columns.values()]
    return [*columns], np.stack(sums) / wide["tokens"].to_numpy(), wide.select("row", "tokens")


def _ifd_weights(facts: pl.DataFrame) -> dict[str, Floats]:
    """The weights [records] of the figures that use ifd; 0 where it is not known."""
    known = "ifd" in facts.columns
    ifd = facts["ifd"].cast(pl.Float64).to_numpy() if known else np.full(len(facts), np.nan)
    finite = np.isfinite(ifd)
    hardest = np.zeros(len(facts))
    hardest[np.argsort(np.where(finite, -ifd, np.inf), kind="stable")[: round(finite.sum() / 3)]] = 1
    return {"ifd_weighted": np.where(finite, ifd, 0), "hardest_third": hardest}


def _parts(facts: pl.DataFrame) -> Iterator[tuple[str, str, Weights]]:
    """Kind and name of each part, and whether each of [records] is in it; the largest clusters and groups first."""
    for name, low, high in BANDS:
        mask = facts["tokens"].is_between(low, high, closed="left")
        if mask.any():
            yield "length", name, mask.to_numpy()
    for kind in ("cluster", "group"):
        if kind in facts.columns:
            sizes = facts.drop_nulls(kind).group_by(kind).len().sort("len", kind, descending=[True, False])
            for name in sizes[kind]:
                yield kind, str(name), (facts[kind] == name).fill_null(False).to_numpy()
