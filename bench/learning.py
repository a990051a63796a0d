"""Small2Large end to end: fine-tune, score each epoch, cluster, select, report. Uses a GPU where there is one.

Checks that every scored row has a finite lp1_approx, and that training lowers the median perplexity.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from scorer.clusters.cluster import cluster
from scorer.config import Training
from scorer.learning.learn import learn
from scorer.reporting.report import report
from scorer.selection.export import select

QUANTILES = (0.1, 0.5, 0.9)


def run(data: str, rows: int, model: str, epochs: int) -> dict[str, Any]:
    """Measure and print; returns the report."""
    console = Console(stderr=True)
    seconds: dict[str, float] = {}

    def timed(name: str, began: float) -> None:
        seconds[name] = round(time.monotonic() - began, 1)
        console.print(f"{name}: {seconds[name]:,.1f} s")

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        began = time.monotonic()
        learned = learn([data], directory / "run", training=Training(epochs=epochs), model=model, limit=rows)
        timed("learn", began)
        scores = learned.scores()
        scored = scores.filter(pl.col("status").is_in(["ok", "truncated"]))
        finite = scored["lp1_approx"].is_finite().all() and not scored["lp1_approx"].null_count()
        if not finite:
            raise SystemExit("a scored row has no lp1_approx; nothing is reported")
        medians = [float(scored[f"ppl_{epoch}"].median()) for epoch in range(epochs + 1)]  # type: ignore[arg-type]
        fell = float((scored["ppl_1"] < scored["ppl_0"]).mean())  # type: ignore[arg-type]
        if not medians[-1] < medians[0]:
            raise SystemExit(f"training did not lower the median perplexity: {medians}; nothing is reported")
        began = time.monotonic()
        cluster(learned)
        timed("cluster", began)
        began = time.monotonic()
        kept = select(learned, directory / "best.json", keep="10%", per_cluster=True).kept
        timed("select", began)
        began = time.monotonic()
        report([learned.path], directory / "report.html")
        timed("report", began)
        size = (directory / "report.html").stat().st_size
    result = {
        "model": model,
        "data": Path(data).name,
        "rows": rows,
        "scored_rows": scored.height,
        "epochs": epochs,
        "median_perplexity_by_epoch": medians,
        "share_of_rows_that_fell": fell,
        "lp1_approx_quantiles": {str(q): scored["lp1_approx"].quantile(q) for q in QUANTILES},
        "kept": kept.height,
        "report_bytes": size,
        "seconds": seconds,
    }
    console.print(result)
    return result
