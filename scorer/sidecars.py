"""What stands beside a run's scores: its clusters, embeddings and flags, and the columns of its data, by record id.

    RUN/clusters.parquet                record_id Int64, cluster Int64
    RUN/embeddings/part-00000.npy ...   float32 [n, d], rows of length 1, in the order of record_id
    RUN/flags.parquet                   record_id Int64, Boolean columns

Reads only: it does not know how they are made, nor what they are for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from scorer.files import first_line, read_raw
from scorer.guards import SCORE_FLAGS, TEXT_FLAGS, score_flags, text_flags
from scorer.places import exists, fetched
from scorer.records import read_records
from scorer.rundir import CLUSTERS, EMBEDDINGS, FLAGS, Run
from scorer.types import ScorerError


def has_clusters(run: Run) -> bool:
    """Whether the run was clustered."""
    return exists(run.path / CLUSTERS)


def clusters(run: Run) -> pl.DataFrame:
    """record_id Int64, group Int64. Raises ScorerError where the run was not clustered."""
    return _table(run, CLUSTERS, ["cluster"]).rename({"cluster": "group"})


def column_groups(run: Run, column: str) -> pl.DataFrame:
    """record_id Int64, group String: the value of a column of the data, of anything but text its JSON; null if absent.

    Raises ScorerError where no record has the column.
    """
    ids, values = [], []
    for raw in _raw(run):
        value = raw.value.get(column) if isinstance(raw.value, dict) else None
        ids.append(raw.record_id)
        values.append(
            value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        )
    if not any(value is not None for value in values):
        raise ScorerError(f"per: no record of {', '.join(_paths(run))} has a value of '{column}'")
    return pl.DataFrame({"record_id": ids, "group": values}, schema={"record_id": pl.Int64, "group": pl.String})


def embedding_parts(run: Run) -> list[Any]:
    """The embeddings of all records, float32 [n, d] a part, mapped into memory.

    Raises ScorerError where the run has none, or not one of every record.
    """
    run.require_disk("choosing by embeddings")
    parts: list[Any] = []
    while (path := run.path / EMBEDDINGS / f"part-{len(parts):05d}.npy").exists():
        try:
            parts.append(np.load(path, mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise ScorerError(f"{path} can't be read: run `scorer cluster {run.path}` again ({error})") from error
    count, records = sum(map(len, parts)), run.manifest["records"]
    if not parts or count != records:
        held = f"holds {count:,} of {records:,}" if parts else "has no"
        raise ScorerError(f"{run.path} {held} embeddings: run `scorer cluster {run.path}` first")
    return parts


def embeddings(parts: Sequence[Any], ids: pl.Series) -> npt.NDArray[np.float32]:
    """The embeddings [len(ids), d] of the records `ids` (ascending); no others are held in memory."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    wanted = ids.to_numpy()
    bounds = np.searchsorted(wanted, np.concatenate([[0], ends]))
    rows = [
        part[wanted[a:b] - (end - len(part))] for part, a, b, end in zip(parts, bounds, bounds[1:], ends, strict=False)
    ]
    return np.ascontiguousarray(np.concatenate(rows), dtype=np.float32)


def flags(run: Run, scores: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """record_id, and a Boolean column for each of `names`, which are of scorer.guards.FLAGS.

    Raises ScorerError where a flag needs what the run does not have.
    """
    of_scores = [name for name in names if name in SCORE_FLAGS]
    of_text = [name for name in names if name in TEXT_FLAGS]
    stored = [name for name in names if name not in SCORE_FLAGS and name not in TEXT_FLAGS]
    table = scores.select("record_id").unique().sort("record_id")
    found = []
    if of_scores:
        found.append(score_flags(scores, of_scores))
    if of_text:
        config = run.manifest["identity"]["config"]
        records = read_records(_paths(run), columns=config["columns"], limit=config["limit"])
        found.append(text_flags(records, of_text))
    if stored:
        found.append(_table(run, FLAGS, stored, " --flags"))
    for frame in found:
        table = table.join(frame, on="record_id", how="left", maintain_order="left")
    return table


def _table(run: Run, name: str, columns: list[str], option: str = "") -> pl.DataFrame:
    path, command = run.path / name, f"`scorer cluster {run.path}{option}`"
    if not exists(path):
        raise ScorerError(f"{path}: no such file; make it with {command}")
    try:
        with fetched(path) as file:
            return pl.read_parquet(file, glob=False, hive_partitioning=False).select("record_id", *columns)
    except (pl.exceptions.PolarsError, OSError) as error:
        why = first_line(error)
        raise ScorerError(f"{path} can't be read; run {command} again ({why})") from error


def _paths(run: Run) -> list[str]:
    return [entry["path"] for entry in run.manifest["inputs"]]


def _raw(run: Run) -> Any:
    paths: Sequence[str | Path] = _paths(run)
    return read_raw(paths, limit=run.manifest["identity"]["config"]["limit"])
