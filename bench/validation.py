"""What a finished validation found, for the pages: its figures, computed once more from the NLLs that it kept.

Checks that they are those of its validation.json, and that the conditioned NLLs of the untrained target fell.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl

from scorer.validation.comparison import UNTRAINED, Comparison
from scorer.validation.directory import read_validation

RECIPE = ("learning_rate", "epochs", "batch_size", "max_length", "lora")


def run(folder: str, data: str) -> dict[str, Any]:
    """Read the folder of a validation of the file `data`, and check it; returns the report."""
    content = read_validation(Path(folder))
    if not content["results"]:
        raise SystemExit(f"{folder} is unfinished; nothing is reported")
    found = Comparison.from_dict(content["results"])
    for arm in found.arms:
        tables = [pl.read_parquet(path) for path in sorted(Path(folder).glob(f"arms/{_name(arm.arm)}/nll.parquet"))]
        per_row = pl.concat(tables).select(pl.col("nll") / pl.col("tokens")).to_series()
        if arm.mean_of_rows.value is None or not math.isclose(per_row.mean(), arm.mean_of_rows.value, rel_tol=1e-9):  # type: ignore[arg-type]
            raise SystemExit(f"the NLLs of {arm.arm} are not those of the results; nothing is reported")
    before, *after = (arm.mean_of_rows.value or math.nan for arm in found.arms)
    if not all(value < before for value in after):
        raise SystemExit("a training did not lower the NLL of the held-out responses; nothing is reported")
    config = content["identity"]["config"]
    return {
        "data": Path(data).name,
        "target": content["target"],
        "recipe": {name: config[name] for name in RECIPE},
        "equal": config["equal"],
        "seeds": content["seeds"],
        "results": found.to_dict(),
    }


def _name(arm: str) -> str:
    return arm if arm == UNTRAINED else f"{arm}-[0-9]*"
