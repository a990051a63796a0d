"""The packed engine against the reference engine: a tiny random model of every family, in float32 and bfloat16.

On CUDA attention, head and sums are other code than on a CPU, where the tests compare the engines.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from bench.engines import FLOAT32_TOLERANCE, relative_error, rounding_error
from bench.lib.families import CONFIGS, make
from bench.lib.rows import Rows, encoded, longest, timed
from scorer.config import ScoreConfig
from scorer.engines.choose import open_engine, resolve_config
from scorer.models.find import ModelFiles
from scorer.models.load import choose_device
from scorer.types import ScorerError

ENGINES = ("packed", "reference")


def run(names: Sequence[str], data: str, rows: int) -> dict[str, Any]:
    """Compare and print; returns the report. names: keys of CONFIGS, all of them if empty."""
    console, found = Console(stderr=True), {}
    for name in names or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            files = make(name, Path(folder))
            try:
                found[name] = _compare(files, encoded(data, rows, files, longest(files)))
            except ScorerError as error:
                found[name] = {"right": False, "message": str(error)}
        console.print(f"{name}: {'right' if found[name]['right'] else found[name]}")
    wrong = [name for name, own in found.items() if not own["right"]]
    return {"device": choose_device("auto"), "data": Path(data).name, "rows": rows, "families": found, "wrong": wrong}


def _compare(files: ModelFiles, rows: Rows) -> dict[str, Any]:
    """The errors of the packed engine against the reference in float32, and what they may be.

    In bfloat16, half as much again as the reference's own error in bfloat16.
    """
    exact = _scores("reference", "float32", files, rows)
    float32 = relative_error(_scores("packed", "float32", files, rows), exact)
    bfloat16, usual = (rounding_error(_scores(engine, "bfloat16", files, rows), exact) for engine in ENGINES)
    allowed = 1.5 * usual + 1e-3
    return {
        "right": float32 <= FLOAT32_TOLERANCE and bfloat16 <= allowed,
        "float32": {"largest_relative_error": float32, "allowed": FLOAT32_TOLERANCE},
        "bfloat16": {"mean_error": bfloat16, "allowed": allowed},
    }


def _scores(engine: str, dtype: str, files: ModelFiles, rows: Rows) -> pl.DataFrame:
    config = resolve_config(ScoreConfig(model=str(files.path), engine=engine, dtype=dtype), files)
    with closing(open_engine(config, files)) as opened:
        return timed(opened, rows)[0]
