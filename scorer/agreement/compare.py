"""Runs, score tables or selected files -> how far they agree, pair by pair.

Knows files and run directories; the statistics are in scorer.agreement.statistics.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Unpack

import polars as pl

from scorer.agreement.config import CompareConfig
from scorer.agreement.statistics import Agreement, Bootstrap, agree
from scorer.data.dataset import Dataset
from scorer.files.reader import read_table
from scorer.keywords import CompareKeywords
from scorer.options import from_options, keywords
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.extras import clusters, has_clusters
from scorer.scores.aggregate import KEYS, check_ids, check_same_ids, measures_of, per_record
from scorer.scores.measures import LEARNING
from scorer.selection.export import SCORES_KEY, check_not_overwriting
from scorer.storage.atomic import replacing
from scorer.storage.outputs import check_writable
from scorer.storage.paths import is_folder, to_path
from scorer.types import ScorerError


@dataclass(frozen=True, slots=True)
class Scores:
    """A column of a run or a table: record_id Int64 and value Float64, by record_id; lowest: low values are better."""

    name: str
    by: str
    lowest: bool
    values: pl.DataFrame


@dataclass(frozen=True, slots=True)
class Pair:
    """Two scorers, by name, column and end (lowest: low values are better), and their agreement."""

    first: str
    second: str
    by: tuple[str, str]
    lowest: tuple[bool, bool]
    agreement: Agreement


@dataclass(frozen=True, slots=True)
class Contents:
    """Two selected files: how many records each holds, how many are in both, and intersection over union."""

    first: str
    second: str
    records: tuple[int, int]
    shared: int
    iou: float | None


@keywords(CompareConfig)
def compare(
    sources: Sequence[str | Path], output: str | Path | None = None, **options: Unpack[CompareKeywords]
) -> list[Pair] | list[Contents]:
    """Compare two or more sources, each with each: runs and score tables by a measure, selected files by content.

    sources: run directories, or Parquet, CSV, JSON or JSON Lines files with `record_id` and the column; or else
    selected files, whose records are compared without the key `scorer`, each as often as it occurs. output: a JSON file
    to write the result to. `Agreement.per_cluster` uses the clusters of the first run, where it has them.

    Raises ScorerError where the sources do not hold the same record ids, saying how many differ.
    """
    if isinstance(sources, str | Path) or len(sources) < 2:
        raise ScorerError("compare: name two or more runs, score tables or selected files")
    config = from_options(CompareConfig, options)
    paths = [to_path(source) for source in sources]
    scored = [is_folder(path) or _is_table(path) for path in paths]
    if any(scored) and not all(scored):
        odd = paths[scored.index(False)]
        raise ScorerError(
            f"{odd}: has no record_id: compare runs and score tables, or selected files, not both at once"
        )
    if output is not None:
        check_writable(to_path(output))
        inputs = [path for source in paths if is_folder(source) for path in Run(source).manifest.paths]
        check_not_overwriting([str(output)], [*map(str, paths), *inputs])
    result: list[Pair] | list[Contents]
    if all(scored):
        require("compare")
        columns = _columns(config.by, len(paths))
        loaded = [_load(path, column, config.lowest) for path, column in zip(paths, columns, strict=True)]
        run = Run(paths[0])
        groups = clusters(run) if is_folder(paths[0]) and has_clusters(run) else None
        result = [_pair(a, b, groups, config) for a, b in combinations(loaded, 2)]
    else:
        if config.by is not None:
            raise ScorerError(f"by: {paths[0]} has no record_id; without --by, selected files are compared by content")
        result = [_contents(*two) for two in combinations([(str(path), _digests(path)) for path in paths], 2)]
    if output is not None:
        with replacing(to_path(output)) as temporary:
            text = json.dumps([asdict(row) for row in result], indent=2, ensure_ascii=False, default=float)
            temporary.write_text(text + "\n", encoding="utf-8")
    return result


def _columns(by: str | Sequence[str] | None, count: int) -> Sequence[str | None]:
    names: Sequence[str | None] = by.split(",") if isinstance(by, str) else by or [None]
    if len(names) not in (1, count):
        raise ScorerError(f"by: name one column, or one for each of the {count}, not {len(names)}")
    return [*names] * count if len(names) == 1 else [*names]


def _is_table(path: Path) -> bool:
    if path.suffix.lower() == ".csv":
        return True
    first = next(Dataset([path], limit=1).rows()).value
    return isinstance(first, dict) and "record_id" in first


def _load(path: Path, by: str | None, lowest: bool | None) -> Scores:
    if is_folder(path):
        run = Run(path)
        ranking = run.manifest.ranking
        if lowest is None and ranking["lowest"] and by in (None, ranking["by"]):
            lowest = True
        with run.snapshot(finished=True) as shards:
            by = _column(path, shards.schema, by or ranking["by"])
            names = [name for name in (*KEYS, "response", by) if name in shards.schema]
            table = per_record(shards.scores(names))  # no other column is read
    else:
        table = read_table(path)
        if {*KEYS} <= {*table.columns}:
            table = per_record(table)
        by = _column(path, table.schema, by)
    values = table.select(pl.col("record_id").cast(pl.Int64), value=pl.col(by).cast(pl.Float64)).sort("record_id")
    check_ids(str(path), values, ["record_id"])
    return Scores(str(path), by, by in LEARNING if lowest is None else lowest, values)


def _column(path: Path, schema: pl.Schema, by: str | None) -> str:
    """The column to compare by: `by`, or the only measure. Raises ScorerError where the table has no such column."""
    if "record_id" not in schema or not schema["record_id"].is_integer():
        raise ScorerError(f"{path}: it has no column record_id of whole numbers")
    measures = measures_of(schema)
    if by is None and len(measures) == 1:
        by = measures[0]
    if by is None or by not in measures:
        asked = "which column is meant?" if by is None else f"there is no column of numbers '{by}';"
        raise ScorerError(f"{path}: {asked} --by takes one of {', '.join(measures)}")
    return by


def _pair(a: Scores, b: Scores, groups: pl.DataFrame | None, config: CompareConfig) -> Pair:
    check_same_ids(a.name, a.values, b.name, b.values, ["record_id"])
    labels = None
    if groups is not None:
        found = a.values.select("record_id").join(groups, on="record_id", how="left", maintain_order="left")
        labels = found["group"].fill_null(-1).to_numpy()  # records without a cluster form one
    first, second = (scores.values["value"].fill_null(float("nan")).to_numpy() for scores in (a, b))
    lowest, bootstrap = (a.lowest, b.lowest), Bootstrap(config.resamples, config.seed)
    agreement = agree(first, second, config.shares, lowest=lowest, clusters=labels, bootstrap=bootstrap)
    return Pair(a.name, b.name, (a.by, b.by), lowest, agreement)


def _digests(path: Path) -> Counter[bytes]:
    """How often the file holds each record, by a digest of its content."""
    counts: Counter[bytes] = Counter()
    for raw in Dataset([path]).rows():
        value = raw.value
        if isinstance(value, dict):
            value = {key: v for key, v in value.items() if key != SCORES_KEY}
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
        counts[hashlib.sha256(text.encode()).digest()] += 1
    return counts


def _contents(first: tuple[str, Counter[bytes]], second: tuple[str, Counter[bytes]]) -> Contents:
    (name, a), (other, b) = first, second
    shared, either = (a & b).total(), (a | b).total()
    return Contents(name, other, (a.total(), b.total()), shared, shared / either if either else None)
