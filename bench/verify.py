"""What it costs a run to prove itself: hashing every shard, against scoring and against selecting."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bench.lib.rows import encoded, longest
from scorer.config import DEFAULT_MODEL
from scorer.data.dataset import Dataset
from scorer.models.find import find_model
from scorer.runs.directory import inspect_shards
from scorer.runs.manifest import Manifest
from scorer.runs.writer import RunWriter
from scorer.scores.measures import SCHEMA
from scorer.selection.export import select

SHARD_ROWS = 1000


def run(rows: int, repeats: int, rows_per_second: float) -> dict[str, Any]:
    """Measure on a made-up run of `rows` records that scored `rows_per_second`; returns the report."""
    with tempfile.TemporaryDirectory() as folder:
        made = _made_up(Path(folder), rows)
        files, manifest = made.shards(), made.manifest
        size = sum(path.stat().st_size for path in files)

        def verify() -> None:
            infos, faults = inspect_shards(files, manifest)
            if faults or sum(info.rows for info in infos) != rows:
                raise SystemExit(f"{len(faults)} shards are faulty")

        def choose() -> None:
            if select(made.path, Path(folder) / "kept.jsonl", keep=0.1, max_ifd=None).kept.height != rows // 10:
                raise SystemExit("another number of records is kept")

        seconds = {"verify": _median(verify, repeats), "select": _median(choose, repeats)}
    files_of_model = find_model(DEFAULT_MODEL)
    sample = encoded("examples/alpaca.json", 153, files_of_model, longest(files_of_model))
    hashing = _median(lambda: replace(sample.batch).span_hashes, 20)  # a copy: the property is kept
    scoring = rows / rows_per_second
    # A run is verified where it is resumed, when all is scored, and once more where equal scores were copied then.
    result = {
        "rows": rows,
        "shard_rows": SHARD_ROWS,
        "megabytes": size / 1e6,
        "seconds": seconds,
        "of_select": seconds["verify"] / seconds["select"],
        "rows_per_second_of_score": rows_per_second,
        "of_score": 3 * seconds["verify"] / scoring,
        "token_hash_us_a_row": hashing / 153 * 1e6,
        "token_hash_of_score": hashing / 153 * rows_per_second,
    }
    print({name: round(value, 4) for name, value in result.items() if isinstance(value, float)})
    return result


def _median(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _made_up(folder: Path, rows: int) -> RunWriter:
    """A complete run of records that each are a short line, with one turn."""
    data = folder / "data.jsonl"
    with data.open("w") as file:
        file.writelines(f'{{"instruction": "What is {i}?", "output": "It is {i}."}}\n' for i in range(rows))
    run, draw = RunWriter(folder / "run"), np.random.default_rng(0)
    with Dataset([data]) as dataset, run.locked():
        dataset.inspect()
        manifest = Manifest(
            identity={
                "config": {"limit": None, "shard_rows": SHARD_ROWS},
                "inputs": [entry.identity for entry in dataset.inputs],
            },
            inputs=dataset.inputs,
            input_records=dataset.counts,
            ranking={"by": "ifd", "lowest": False},
            records=rows,
        )
        run.write_manifest(manifest)
        for index in range(manifest.shard_count):
            run.write_shard(index, _shard(draw, index, manifest.records_of(index)))
        run.finish(manifest)
    return run


def _shard(draw: np.random.Generator, index: int, rows: int) -> pl.DataFrame:
    columns: dict[str, pl.Series] = {
        "record_id": pl.int_range(index * SHARD_ROWS, index * SHARD_ROWS + rows, dtype=pl.Int64, eager=True),
        "turn": pl.zeros(rows, pl.Int32, eager=True),
        "status": pl.select(pl.repeat("ok", rows)).to_series(),
    }
    for name, dtype in list(SCHEMA.items())[3:]:
        if name == "tokens_hash":
            columns[name] = pl.Series(draw.integers(0, 2**64, rows, np.uint64))
        elif dtype.is_numeric():
            values = draw.integers(1, 500, rows) if name.endswith("tokens") else draw.random(rows)
            columns[name] = pl.Series(values, dtype=dtype)
        else:
            known: Any = {"format": "alpaca", "special_tokens": False}.get(name)
            columns[name] = pl.Series([known] * rows, dtype=dtype)
    return pl.DataFrame(columns)
