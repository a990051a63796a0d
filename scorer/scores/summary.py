"""A score table -> the summary that is shown after a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)  # as many as an 80-column terminal holds
COLUMNS = ("ifd", "ifd_loss", "lp1", "lp1_approx", "ppl_conditioned", "ppl_alone", "prompt_tokens", "response_tokens")


@dataclass(frozen=True, slots=True)
class Summary:
    """Rows by status, QUANTILES of the COLUMNS that have values, and the bias of IFD by length.

    `length_bias` is Spearman's correlation of IFD with the number of response tokens; None for fewer than three rows.
    """

    status: dict[str, int]
    quantiles: dict[str, list[float]]
    length_bias: float | None


def summarise(scores: pl.DataFrame) -> Summary:
    scored = scores.filter(pl.any_horizontal(pl.col("response_tokens", "ppl_conditioned").is_not_null()))
    columns = [name for name in COLUMNS if name in scored.columns and scored[name].count()]
    pairs = scored.drop_nulls("ifd")
    bias = pairs.select(pl.corr("ifd", "response_tokens", method="spearman")).item() if pairs.height > 2 else None
    return Summary(
        _counted(scores["status"]),
        {name: [float(scored[name].quantile(q, "linear") or 0.0) for q in QUANTILES] for name in columns},
        None if bias is None or bias != bias else bias,
    )


def count_rows(scores: pl.DataFrame) -> dict[str, Any]:
    """The counts of a manifest: rows by status; records by format, by what is left out, and with special tokens."""
    records = scores.unique("record_id", keep="first", maintain_order=True)
    left_out = scores.select("record_id", pl.col("left_out").str.split(",")).explode("left_out").drop_nulls().unique()
    return {
        "status": _counted(scores["status"]),
        "formats": _counted(records["format"].drop_nulls()),
        "left_out": _counted(left_out["left_out"]),
        "special_tokens": int(records["special_tokens"].sum()),
    }


def _counted(values: pl.Series) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    name = values.name
    counts = values.to_frame().group_by(name).len().sort("len", name, descending=[True, False])
    return dict(counts.iter_rows())
