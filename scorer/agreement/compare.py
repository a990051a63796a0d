"""Runs, score tables or selected files -> how far they agree, two by two.

Knows files and run directories; the statistics are scorer.agreement.statistics's.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import polars as pl

from scorer.agreement.statistics import Agreement, agree
from scorer.data.dataset import Dataset
from scorer.data.reader import read_table
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.extras import clusters, has_clusters
from scorer.scores.aggregate import KEYS, measures_of, per_record
from scorer.scores.measures import LEARNING
from scorer.scores.shares import parse_keep
from scorer.storage.atomic import check_writable, replacing
from scorer.storage.paths import is_folder, to_path
from scorer.types import ScorerError

SHARES = "1%,3%,5%,10%,15%"
IGNORED = "scorer"  # the key under which a selection adds scores


@dataclass(frozen=True, slots=True)
class Scored:
    """A column of a run or a table: record_id Int64 and value Float64, by record_id; the end of it that is better."""

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
    """Two selected files: how many records each holds, how many are in both; iou = shared / (those of either)."""

    first: str
    second: str
    records: tuple[int, int]
    shared: int
    iou: float | None


def compare(
    sources: Sequence[str | Path],
    *,
    by: str | Sequence[str] | None = None,
    lowest: bool | None = None,
    at: str | Sequence[str | float | Fraction] = SHARES,
    resamples: int = 200,
    seed: int = 42,
    output: str | Path | None = None,
) -> list[Pair] | list[Contents]:
    """Compare two or more sources, each with each: runs and score tables by a measure, selected files by content.

    sources: run directories, or Parquet, CSV, JSON or JSON Lines files with `record_id` and the column; or else
    selected files, whose records are compared as they are, but for the key `scorer`, each as often as it occurs.
    by: a column, or one for each source; None is the run's own, or a table's only one. lowest: which end is better;
    None is the run's own end for its own column, the lowest of LP, and the highest of all else. at: shares of the
    records. The first run's clusters, where it has them, are those of `Agreement.per_cluster`. output: a JSON file of
    what is returned.

    Raises ScorerError where the sources do not hold the same record ids, saying how many differ.
    """
    if len(sources) < 2:
        raise ScorerError("compare: name two or more runs, score tables or selected files")
    shares = [_share(value) for value in (at.split(",") if isinstance(at, str) else at)]
    if resamples < 0 or seed < 0:
        raise ScorerError("compare: resamples and seed are whole numbers of at least 0")
    paths = [to_path(source) for source in sources]
    scored = [is_folder(path) or _is_table(path) for path in paths]
    if any(scored) and not all(scored):
        odd = paths[scored.index(False)]
        raise ScorerError(
            f"{odd}: has no record_id: compare runs and score tables, or selected files, not one with both"
        )
    result: list[Pair] | list[Contents]
    if output is not None:
        check_writable(to_path(output))
    if all(scored):
        require("compare")
        columns = _columns(by, len(paths))
        loaded = [_load(path, column, lowest) for path, column in zip(paths, columns, strict=True)]
        run = Run(paths[0])
        groups = clusters(run) if is_folder(paths[0]) and has_clusters(run) else None
        result = [_pair(a, b, shares, groups, resamples, seed) for a, b in combinations(loaded, 2)]
    else:
        if by is not None:
            raise ScorerError(f"by: {paths[0]} has no record_id; without --by, selected files are compared by content")
        held = [(str(path), _contents(path)) for path in paths]
        result = [_overlap(*a, *b) for a, b in combinations(held, 2)]
    if output is not None:
        with replacing(to_path(output)) as temporary:
            text = json.dumps([asdict(row) for row in result], indent=2, ensure_ascii=False, default=float)
            temporary.write_text(text + "\n", encoding="utf-8")
    return result


def _share(value: str | float | Fraction) -> Fraction:
    share = parse_keep(value)
    if isinstance(share, int):
        raise ScorerError(f"at: {value!r} is a number of records; give shares such as 10%")
    return share


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


def _load(path: Path, by: str | None, lowest: bool | None) -> Scored:
    if not is_folder(path):
        table = _read_table(path)
        return _scored(path, table, _column(path, table.schema, by), lowest)
    run = Run(path)
    ranking = run.manifest.ranking
    if not run.complete:
        raise ScorerError(f"{path} is unfinished: run the same command again to finish it")
    if lowest is None and ranking["lowest"] and by in (None, ranking["by"]):
        lowest = True
    with run.snapshot() as shards:
        by = _column(path, shards.schema, by or ranking["by"])
        table = per_record(shards.scores([*KEYS, by]))  # the only columns of it that are read
    return _scored(path, table, by, lowest)


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


def _scored(path: Path, table: pl.DataFrame, by: str, lowest: bool | None) -> Scored:
    values = table.select(pl.col("record_id").cast(pl.Int64), value=pl.col(by).cast(pl.Float64)).sort("record_id")
    if missing := values["record_id"].null_count():
        raise ScorerError(f"{path}: {missing:,} rows have no record_id")
    if twice := values.height - values["record_id"].n_unique():
        raise ScorerError(f"{path}: {twice:,} rows repeat the record_id of another")
    return Scored(str(path), by, by in LEARNING if lowest is None else lowest, values)


def _read_table(path: Path) -> pl.DataFrame:
    """A table of one row a record; of one row a turn, where it says turn and status."""
    rows = read_table(path)
    return per_record(rows) if {"record_id", "turn", "status"} <= set(rows.columns) else rows


def _pair(a: Scored, b: Scored, shares: list[Fraction], groups: pl.DataFrame | None, resamples: int, seed: int) -> Pair:
    gone = a.values.join(b.values, on="record_id", how="anti").height
    new = b.values.join(a.values, on="record_id", how="anti").height
    if gone or new:
        raise ScorerError(
            f"{b.name}: {gone:,} of the {a.values.height:,} records of {a.name} are not in it, and {new:,} of its own "
            "are not there: compare scores of the same data"
        )
    numbers = None
    if groups is not None:
        found = a.values.select("record_id").join(groups, on="record_id", how="left", maintain_order="left")
        numbers = found["group"].fill_null(-1).to_numpy()  # without a cluster: one of their own
    agreement = agree(
        a.values["value"].fill_null(float("nan")).to_numpy(),
        b.values["value"].fill_null(float("nan")).to_numpy(),
        shares,
        lowest=(a.lowest, b.lowest),
        clusters=numbers,
        resamples=resamples,
        seed=seed,
    )
    return Pair(a.name, b.name, (a.by, b.by), (a.lowest, b.lowest), agreement)


def _contents(path: Path) -> Counter[bytes]:
    counts: Counter[bytes] = Counter()
    for raw in Dataset([path]).rows():
        value = raw.value
        if isinstance(value, dict):
            value = {key: v for key, v in value.items() if key != IGNORED}
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
        counts[hashlib.sha256(text.encode()).digest()] += 1
    return counts


def _overlap(first: str, a: Counter[bytes], second: str, b: Counter[bytes]) -> Contents:
    shared, either = (a & b).total(), (a | b).total()
    return Contents(first, second, (a.total(), b.total()), shared, shared / either if either else None)
