"""Sums and counts -> the score table. All formulas of the measures are here.

Knows neither models nor files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from scorer.tokens import ALONE, CODES, CONDITIONED, STATUSES, Array, TokenBatch, TurnTable
from scorer.types import SCORED, EngineError, RowStatus

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
    "format": pl.String,  # a name in scorer.data.columns.FORMATS; null for a record that fits none
    "response": pl.String,  # chosen, rejected, reasoning, answer and so on; null for what is simply the response
    "left_out": pl.String,  # columns and other parts of the record that are not read, such as "images,tools"
    "special_tokens": pl.Boolean,  # whether the text of the record holds some
    "tokens_hash": pl.UInt64,  # equal where the scored tokens, and those before them, are equal; null without a score
}
LABELS = ("format", "response", "left_out", "special_tokens")
MEASURES = ("nll_conditioned", "nll_alone", "ppl_conditioned", "ppl_alone", "ifd", "ifd_loss")
LEARNING = ("lp1", "lp1_approx")  # the measures of `learning_table`
OK = CODES[RowStatus.OK]
VIEW_KEY = np.uint64(0x9E3779B97F4A7C15)  # any odd number: the two views are hashed apart
SCORED_CODES = [code for status, code in CODES.items() if status.scored]
# Null without an alone view.
ALONE_COLUMNS = ("alone_tokens", "nll_alone", "ppl_alone", "ifd", "ifd_loss")
CONDITIONED_COLUMNS = ("prompt_tokens", "response_tokens", "nll_conditioned", "ppl_conditioned")


def score_table(
    turns: TurnTable, batch: TokenBatch, nll_sums: Array, statuses: Array, *, two_views: bool
) -> pl.DataFrame:
    """The score table of `turns`, in their order, with columns SCHEMA.

    nll_sums (float64 [S], in nats) and statuses (uint8 [S]) are those of the spans of `batch`; ppl = exp(nll / tokens);
    ifd = ppl_conditioned / ppl_alone (arXiv 2402.00530, section 2.1); ifd_loss = mean conditioned NLL / mean alone NLL
    (arXiv 2308.12032, equation 3). Without `two_views` the alone columns and the ratios are null. Raises EngineError
    where a turn to be scored lacks a span.
    """
    rows = len(turns)
    nll, tokens, fault = np.full((2, rows), np.nan), np.zeros((2, rows), np.int32), np.full((2, rows), OK)
    where = (batch.views, batch.rows)
    nll[where], tokens[where], fault[where] = nll_sums, batch.ends - batch.starts, statuses
    hashes = np.zeros((2, rows), np.uint64)
    hashes[where] = batch.span_hashes
    used = (CONDITIONED, ALONE) if two_views else (CONDITIONED,)
    scored = np.isin(turns.statuses, SCORED_CODES)
    if (lacking := np.flatnonzero(scored & (tokens[list(used)] == 0).any(axis=0))).size:
        record_id, turn = turns.record_ids[lacking[0]], turns.turns[lacking[0]]
        raise EngineError(f"the engine gave no score for record {record_id}, turn {turn}")
    codes = turns.statuses.copy()
    for view in reversed(used):  # the conditioned view's fault counts first
        failed = scored & (fault[view] != OK)
        codes[failed] = fault[view][failed]
    table = pl.DataFrame(
        {
            "record_id": turns.record_ids,
            "turn": turns.turns,
            "status": pl.Series(STATUSES, dtype=pl.String).gather(codes),
            "prompt_tokens": turns.prompt_tokens,
            "response_tokens": tokens[CONDITIONED],
            "alone_tokens": tokens[ALONE],
            "nll_conditioned": nll[CONDITIONED],
            "nll_alone": nll[ALONE],
            "format": pl.Series(turns.formats.tolist(), dtype=pl.String),
            "response": pl.Series(turns.responses.tolist(), dtype=pl.String),
            "left_out": pl.Series(turns.left_out.tolist(), dtype=pl.String),
            "special_tokens": turns.special_tokens,
            "tokens_hash": hashes[CONDITIONED] + VIEW_KEY * hashes[ALONE],
        }
    )
    mean_conditioned = pl.col("nll_conditioned") / pl.col("response_tokens")
    mean_alone = pl.col("nll_alone") / pl.col("alone_tokens")
    table = table.with_columns(
        prompt_tokens=pl.when(pl.col("prompt_tokens") >= 0).then("prompt_tokens"),
        ppl_conditioned=_exp(mean_conditioned),
        ppl_alone=_exp(mean_alone),
        ifd=_exp(mean_conditioned - mean_alone),
        ifd_loss=mean_conditioned / mean_alone,
    )
    if not two_views:
        table = table.with_columns(pl.lit(None, SCHEMA[name]).alias(name) for name in ALONE_COLUMNS)
    finite = pl.all_horizontal(pl.col(MEASURES).is_finite().fill_null(True))
    is_scored = pl.col("status").is_in(SCORED)
    table = table.with_columns(
        status=pl.when(is_scored & ~finite).then(pl.lit(RowStatus.NON_FINITE.value)).otherwise("status")
    )
    scores = ("response_tokens", "alone_tokens", *MEASURES, "tokens_hash")
    return table.with_columns(pl.when(is_scored).then(pl.col(scores))).select(*SCHEMA)


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
        ppl, status = pl.col("ppl_conditioned").alias(f"ppl_{i}"), pl.col("status").alias(f"status_{i}")
        values = epoch.select("record_id", "turn", status, ppl)
        table = table.join(values, on=("record_id", "turn"), how="left", maintain_order="left")
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
    table = table.with_columns(fault=pl.coalesce("fault", pl.when(infinite).then(pl.lit(RowStatus.NON_FINITE.value))))
    truncated = pl.any_horizontal(status == RowStatus.TRUNCATED.value for status in statuses)
    scored = pl.when(truncated).then(pl.lit(RowStatus.TRUNCATED.value)).otherwise(pl.lit(RowStatus.OK.value))
    ppls = [f"ppl_{i}" for i in range(last + 1)]
    kept = [name for name in SCHEMA if name not in ("record_id", "turn", "status", "prompt_tokens", *LABELS)]
    return table.select(
        "record_id",
        "turn",
        pl.coalesce("fault", scored).alias("status"),
        "prompt_tokens",
        *(_unless_fault(pl.col(n) if n in CONDITIONED_COLUMNS else pl.lit(None, SCHEMA[n]), n) for n in kept),
        *(_unless_fault(pl.col(name), name) for name in (*ppls, *LEARNING, "rose", "not_learned")),
        *(name for name in LABELS if name in table.columns),
    )


def _unless_fault(value: pl.Expr, name: str) -> pl.Expr:
    return pl.when(pl.col("fault").is_null()).then(value).alias(name)


def _exp(x: pl.Expr) -> pl.Expr:
    return pl.when(x < 709.0).then(x.exp()).otherwise(math.inf)  # float64 ends at exp(709.78)
