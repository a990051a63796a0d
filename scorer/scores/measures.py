"""Sums and counts -> the score table. All formulas of the measures are here.

Knows neither models nor files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import polars as pl

from scorer.types import SCORED, EncodedTurn, EngineError, RowStatus, SpanNLL, View

SCHEMA = {
    "record_id": pl.Int64,
    "turn": pl.Int32,
    "status": pl.String,
    "prompt_tokens": pl.Int32,
    "response_tokens": pl.Int32,
    "alone_tokens": pl.Int32,
    "nll_conditioned": pl.Float64,
    "nll_alone": pl.Float64,
    "ppl_conditioned": pl.Float64,
    "ppl_alone": pl.Float64,
    "ifd": pl.Float64,
    "ifd_loss": pl.Float64,
}
MEASURES = ("nll_conditioned", "nll_alone", "ppl_conditioned", "ppl_alone", "ifd", "ifd_loss")
LEARNING = ("lp1", "lp1_approx")  # the measures of `learning_table`
ALONE = ("alone_tokens", "nll_alone", "ppl_alone", "ifd", "ifd_loss")  # null under a protocol without an alone view
CONDITIONED = ("prompt_tokens", "response_tokens", "nll_conditioned", "ppl_conditioned")


def score_table(turns: Sequence[EncodedTurn], spans: Iterable[SpanNLL], *, two_views: bool) -> pl.DataFrame:
    """The score table of `turns`, in their order, with columns SCHEMA.

    NLL sums are in nats; ppl = exp(nll / tokens); ifd = ppl_conditioned / ppl_alone (arXiv 2402.00530, section 2.1);
    ifd_loss = mean conditioned NLL / mean alone NLL (arXiv 2308.12032, equation 3). Without `two_views` the alone
    columns and the ratios are null. Raises EngineError where a turn to be scored has no span.
    """
    found = {(s.record_id, s.turn, s.view): s for s in spans}
    return pl.DataFrame([_row(turn, found, two_views) for turn in turns], schema=SCHEMA, orient="row")


def learning_table(epochs: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The score table of LP, from the score tables before training and after each epoch; P0, P1 .. Pn are perplexities.

    epochs: two or more tables with the same (record_id, turn) and with columns SCHEMA. lp1 = (P0 - P1) / (P0 - Pn) and
    lp1_approx = (P0 - P1) / P0 (Small2Large, arXiv 2402.10430, section 3). Columns: SCHEMA as before training, without
    the alone view, in the same order of rows; ppl_0 .. ppl_n, lp1, lp1_approx Float64; rose Boolean: P1 > P0, so that
    lp1_approx is below 0; not_learned Boolean: P0 <= Pn, so that lp1 is null. With one epoch lp1 and not_learned are
    null. A row that any table did not score has that table's status and no values.
    """
    last = len(epochs) - 1
    table = epochs[0].with_columns(ppl_0="ppl_conditioned")
    for i, epoch in enumerate(epochs[1:], 1):
        values = epoch.select("record_id", "turn", pl.col("status").alias(f"status_{i}"), ppl="ppl_conditioned")
        table = table.join(
            values.rename({"ppl": f"ppl_{i}"}), on=("record_id", "turn"), how="left", maintain_order="left"
        )
    statuses = [pl.col("status"), *(pl.col(f"status_{i}") for i in range(1, last + 1))]
    first, second, end = pl.col("ppl_0"), pl.col("ppl_1"), pl.col(f"ppl_{last}")
    table = table.with_columns(
        fault=pl.coalesce(pl.when(~status.is_in(SCORED)).then(status) for status in statuses),
        lp1=pl.when(pl.lit(last > 1) & (first > end)).then((first - second) / (first - end)),
        lp1_approx=(first - second) / first,
        rose=second > first,
        not_learned=pl.when(pl.lit(last > 1)).then(first <= end),
    )
    infinite = ~(pl.col("lp1_approx").is_finite() & pl.col("lp1").is_finite().fill_null(True))
    table = table.with_columns(
        fault=pl.coalesce("fault", pl.when(infinite).then(pl.lit(RowStatus.NON_FINITE.value))),
        truncated=pl.any_horizontal(status == RowStatus.TRUNCATED.value for status in statuses),
    )
    scored = pl.when("truncated").then(pl.lit(RowStatus.TRUNCATED.value)).otherwise(pl.lit(RowStatus.OK.value))
    ppls = [f"ppl_{i}" for i in range(last + 1)]
    kept = [name for name in SCHEMA if name not in ("record_id", "turn", "status", "prompt_tokens")]
    return table.select(
        "record_id",
        "turn",
        pl.coalesce("fault", scored).alias("status"),
        "prompt_tokens",
        *(_unless_fault(pl.col(name) if name in CONDITIONED else pl.lit(None, SCHEMA[name]), name) for name in kept),
        *(_unless_fault(pl.col(name), name) for name in (*ppls, *LEARNING, "rose", "not_learned")),
    )


def _unless_fault(value: pl.Expr, name: str) -> pl.Expr:
    return pl.when(pl.col("fault").is_null()).then(value).alias(name)


def _row(turn: EncodedTurn, found: dict[tuple[int, int, View], SpanNLL], two_views: bool) -> tuple[object, ...]:
    key = (turn.record_id, turn.turn, str(turn.status), turn.prompt_tokens)
    if not turn.status.scored:
        return (*key, *[None] * 8)
    views = (View.CONDITIONED, View.ALONE) if two_views else (View.CONDITIONED,)
    spans = [found.get((turn.record_id, turn.turn, view)) for view in views]
    if None in spans:
        raise EngineError(f"the engine gave no score for record {turn.record_id}, turn {turn.turn}")
    fault = next((s.status for s in spans if s is not None and s.status != RowStatus.OK), None)
    counts = [s.tokens for s in spans if s is not None]
    sums = [s.nll_sum for s in spans if s is not None and s.nll_sum is not None]
    if fault is None:
        measures = _measures(sums, counts)
        if all(m is None or math.isfinite(m) for m in measures):
            return (*key, counts[0], counts[1] if two_views else None, *measures)
        fault = RowStatus.NON_FINITE
    return (turn.record_id, turn.turn, str(fault), turn.prompt_tokens, *[None] * 8)


def _measures(sums: Sequence[float], counts: Sequence[int]) -> tuple[float | None, ...]:
    """MEASURES of one turn, from one view's sums and counts or from both."""
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    ppls = [_exp(mean) for mean in means]
    if len(sums) == 1:
        return (sums[0], None, ppls[0], None, None, None)
    ifd_loss = means[0] / means[1] if means[1] else math.inf
    return (*sums, *ppls, _exp(means[0] - means[1]), ifd_loss)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709.0 else math.inf  # float64 ends at exp(709.78)
