"""Time and memory to select per cluster from a synthetic score table."""

from __future__ import annotations

import resource
import time
from fractions import Fraction
from typing import Any

import numpy as np
import polars as pl

from scorer.scores.measures import SCHEMA
from scorer.selection.config import SelectConfig
from scorer.selection.ranking import select_records


def run(rows: int, clusters: int) -> dict[str, Any]:
    """Keep a tenth of `rows` records per cluster, and check how many are kept; returns the report."""
    draw = np.random.default_rng(0)
    scores = _table(draw, rows)
    groups = pl.DataFrame({"record_id": scores["record_id"], "group": draw.integers(0, clusters, rows)})
    before = _peak()
    began = time.perf_counter()
    selection = select_records(scores, SelectConfig(Fraction(1, 10), max_ifd=None, per_cluster=True), groups=groups)
    seconds = time.perf_counter() - began
    kept = groups.join(selection.kept, on="record_id", how="semi")["group"].value_counts()["count"]
    every = groups["group"].value_counts()["count"]
    if selection.kept.height != selection.requested or int(kept.sum()) != round(rows / 10):
        raise SystemExit(f"{selection.kept.height:,} records kept of {selection.requested:,}")
    print(f"{rows:,} rows, {clusters:,} clusters: {seconds:.1f} s, peak {_peak():,.0f} MiB (the table: {before:,.0f})")
    return {
        "rows": rows,
        "clusters": clusters,
        "seconds": seconds,
        "peak_mib": _peak(),
        "peak_mib_before": before,
        "largest_cluster": every.max(),
    }


def _table(draw: np.random.Generator, rows: int) -> pl.DataFrame:
    """A table with one turn a record and no nulls."""
    columns: dict[str, pl.Series] = {
        "record_id": pl.int_range(rows, dtype=pl.Int64, eager=True),
        "turn": pl.zeros(rows, pl.Int32, eager=True),
        "status": pl.select(pl.repeat("ok", rows)).to_series(),
    }
    for name, dtype in list(SCHEMA.items())[3:]:
        values = draw.integers(1, 500, rows) if name.endswith("tokens") else draw.random(rows)
        columns[name] = pl.Series(values, dtype=dtype)
    return pl.DataFrame(columns)


def _peak() -> float:
    """Peak memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
