"""Finished run directories with the scores that a test wants; everything in them is as `scorer score` writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from scorer.data.dataset import inspect_input
from scorer.runs.directory import CLUSTERS, Run
from scorer.runs.manifest import Manifest
from scorer.runs.writer import RunWriter
from scorer.scores.measures import SCHEMA


def make_run(path: Path, rows: list[dict[str, Any]], **columns: list[Any]) -> Run:
    """The run `path` of the records `rows` (written to PATH.jsonl), one turn each; columns of the score table by name.

    `status` is ok unless given; what SCHEMA has not is added.
    """
    data = path.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return run_of(path, [data], [len(rows)], **columns)


def run_of(path: Path, data: Sequence[Path], counts: Sequence[int], **columns: list[Any]) -> Run:
    """The run `path` of the files `data`, which hold `counts` records, one turn each; as `make_run`."""
    total = sum(counts)
    given = {"record_id": range(total), "turn": [0] * total, "status": ["ok"] * total} | columns
    schema = SCHEMA | {name: pl.Float64 for name in columns if name not in SCHEMA}
    empty = [None] * total
    table = pl.DataFrame({name: given.get(name, empty) for name in schema}, schema=schema)
    entries = tuple(map(inspect_input, data))
    run = RunWriter(path)
    with run.locked():
        manifest = Manifest(
            identity={
                "config": {"limit": None, "columns": None, "shard_rows": max(1, total)},
                "inputs": [entry.identity for entry in entries],
            },
            inputs=entries,
            input_records=tuple(counts),
            ranking={"by": "ifd", "lowest": False},
            records=total,
        )
        run.write_manifest(manifest)
        run.write_shard(0, table)
        run.finish(manifest)
    return Run(path)


def edit_manifest(run: Path, **values: Any) -> None:
    """Replace fields of a run's manifest, as a scorer that had found them would have written it."""
    RunWriter(run).write_manifest(replace(Run(run).manifest, **values))


def write_clusters(run: Run, table: dict[str, Any], name: str = CLUSTERS) -> None:
    """Write clusters, or flags, as `scorer cluster` would."""
    RunWriter(run.path).write_extra(name, pl.DataFrame(table))
