"""All of `scorer score` with random weights: from a JSON Lines file to a finished run, and what the device did.

The rows are tokenised by a real tokenizer, of the embedded model where it is in the cache, else of bytes.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.host import STAGE_ROWS, encoder_of, repeat, stage_costs
from bench.lib.profile import device_figures
from bench.lib.rows import WARM_UP, any_tokenizer
from bench.lib.shapes import fill, outline
from scorer.models.load import choose_device
from scorer.runs.directory import Run
from scorer.runs.run import score

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def run(data: str, rows: int, shape: str) -> dict[str, Any]:
    """Measure and print; returns the report."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, other = folder / shape, folder / "tokenizer"
        for made in (model, other):
            made.mkdir()
        fill(outline(shape, model), choose_device("auto"))
        tokenizer = any_tokenizer(other)
        for part in TOKENIZER_FILES:
            shutil.copy(tokenizer.path / part, model)
        path, few, some = (folder / f"{part}.jsonl" for part in ("rows", "few", "some"))
        for file, count in ((path, rows), (few, min(rows, WARM_UP)), (some, min(rows, STAGE_ROWS))):
            repeat(data, count, file)

        def scored(source: Path, run: str) -> Run:
            return score(source, folder / run, model=str(model), engine="packed", progress=False)

        scored(few, "first")  # compiles the kernels
        start = time.perf_counter()
        manifest = scored(path, "timed").manifest
        whole = time.perf_counter() - start
        figures = device_figures(lambda: scored(path, "profiled").manifest.seconds)
        encoder = encoder_of(str(model))
        stages = stage_costs(some, min(rows, STAGE_ROWS), encoder)
    result = {
        "model": shape,
        "data": Path(data).name,
        "rows": rows,
        "tokenizer": f"{tokenizer.name}, by {encoder.bulk.name}",
        "device": manifest.environments[0]["device"],
        "dtype": manifest.config["dtype"],
        "status": dict(manifest.status),
        "tokens": manifest.tokens,
        "seconds": manifest.seconds,  # from the first batch to the last shard
        "seconds_with_loading": whole,
        "rows_per_second": rows / manifest.seconds,
        "tokens_per_second": manifest.tokens / manifest.seconds,
        **figures,
        "host_stages": stages,  # microseconds a row
        "host_held_us": sum(stage["held_us"] for stage in stages.values()),
    }
    console.print({name: value for name, value in result.items() if name != "host_stages"})
    return result
