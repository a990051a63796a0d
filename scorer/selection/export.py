"""A selection -> the records themselves, as they came.

Knows run directories, raw records and files, and gathers what a selection needs; not how it is made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from scorer.data.dataset import Dataset
from scorer.data.reader import RawRecord
from scorer.data.writer import RecordWriter
from scorer.protocols import PROTOCOLS
from scorer.requirements import require
from scorer.runs.directory import Run, ScoreTable
from scorer.runs.extras import clusters, embedding_parts, embeddings
from scorer.scores.aggregate import KEYS, measures_of, per_record
from scorer.scores.measures import ALONE, LEARNING, SCHEMA
from scorer.scores.shares import parse_keep
from scorer.selection.diversity import facility_location
from scorer.selection.flags import FLAGS, SCORE_FLAGS, STORED, TEXT_FLAGS
from scorer.selection.inputs import column_groups, flags
from scorer.selection.ranking import SelectConfig, Selection, select_records
from scorer.storage.paths import expand, is_remote, to_path
from scorer.types import ScorerError, one_of

SCORES_KEY = "scorer"  # what a record's scores and reason are written under


def select(
    run: Run | str | Path,
    output: str | Path | None = None,
    *,
    keep: str | float | int | None = None,
    by: str | None = None,
    lowest: bool | None = None,
    diverse: str | float | int | None = None,
    pool: str | float | int | None = None,
    with_scores: bool = False,
    rejected: str | Path | None = None,
    **options: Any,
) -> Selection:
    """Choose records of a finished run, and write them to `output` as they came.

    keep: a share ("10%", 0.1) or a number of records; None is 10%, but for `diverse`. by, lowest: what to rank by; None
    is the protocol's own, and the lowest of LP. diverse: instead of `keep`, so many by facility location, from the best
    `pool` (None is 20%).
    with_scores: add each record's scores under the key `scorer`. rejected: a file for every other record, with the
    reason under the same key. options: the other fields of SelectConfig. The formats are those of the suffixes.

    Raises ScorerError where the run is unfinished, where its data changed since, and where a file can't be written.
    """
    run = run if isinstance(run, Run) else Run(run)
    manifest = run.manifest
    if not run.complete:
        raise ScorerError(f"{run.path} is unfinished: run the same `scorer score` command again to finish it")
    ranking = manifest.ranking
    lowest = (by in LEARNING or (ranking["lowest"] and by is None)) if lowest is None else lowest
    by = by or ranking["by"]
    sizes: dict[str, Any] = {"keep": keep, "diverse": diverse, "pool": pool}
    config = check_options(
        manifest.paths, output, **sizes, by=by, lowest=lowest, rejected=rejected, scored=True, **options
    )
    reads_text = config.per is not None or set(config.drop_flagged) & set(TEXT_FLAGS)
    writes = output is not None or rejected is not None
    with run.data if reads_text or writes else nullcontext() as data:
        selection = _choose(run, data, config)
        if data is not None and writes:
            data.check_unchanged()
            _write(data, selection, output, with_scores, rejected)
    return selection


def _choose(run: Run, data: Dataset | None, config: SelectConfig) -> Selection:
    """The selection, given what the configuration asks for beside the scores."""
    with run.snapshot() as shards:
        return _select_from(shards, run, data, config)


def _select_from(shards: ScoreTable, run: Run, data: Dataset | None, config: SelectConfig) -> Selection:
    schema = shards.schema
    one_of("by", config.by, measures_of(schema))
    parts = [] if config.pool is None else embedding_parts(run)
    groups = clusters(run) if config.per_cluster else None
    looked_at = [name for name, _ in SCORE_FLAGS.values()] if config.drop_flagged else []
    names = dict.fromkeys((*KEYS, config.by, "ifd", *looked_at))
    scores = shards.scores([name for name in names if name in schema])  # the others only of what is kept
    flagged = flags(run, data, scores, config.drop_flagged) if config.drop_flagged else None
    if config.per is not None and data is not None:
        groups = column_groups(data, config.per)

    def spread(ids: pl.Series, size: int) -> list[int]:
        return facility_location(embeddings(parts, ids), size)

    selection = select_records(scores, config, groups=groups, flags=flagged, spread=spread)
    kept = selection.kept.select("record_id", "rank")
    rows = shards.collect(lambda table: table.join(kept.lazy(), on="record_id", how="semi"))
    whole = per_record(rows, config.aggregate).drop("reason")
    return replace(selection, kept=kept.join(whole, on="record_id", how="left", maintain_order="left"))


def check_options(
    paths: Sequence[str],
    output: str | Path | None,
    *,
    keep: str | float | int | None = None,
    by: str | None = None,
    lowest: bool | None = None,
    diverse: str | float | int | None = None,
    pool: str | float | int | None = None,
    with_scores: bool = False,
    rejected: str | Path | None = None,
    scored: bool = False,
    **options: Any,
) -> SelectConfig:
    """The configuration of a selection from the data `paths`, as far as it is known before there are scores.

    scored: there are scores, so that `by` may be any column of them, and clusters and embeddings may have been made.
    Raises ScorerError for all that `select` would refuse of its options, so that nobody waits for scores first.
    """
    targets = [str(path) for path in (output, rejected) if path is not None]
    for target in targets:
        RecordWriter(target)
    _check_not_overwriting(targets, paths if scored else [name for path in paths for name in expand(path)])
    if diverse is not None:
        require("--diverse")
    for name in options.get("drop_flagged", ()):
        one_of("drop_flagged", name, FLAGS)
    if not scored:
        if by is not None:
            one_of("by", by, tuple(name for name, dtype in SCHEMA.items() if dtype.is_numeric() and name not in KEYS))
        if diverse is not None or options.get("per_cluster") or set(options.get("drop_flagged", ())) & set(STORED):
            raise ScorerError("clusters and embeddings come after scores: use `scorer score`, `cluster` and `select`")
    if diverse is None:
        if pool is not None:
            raise ScorerError("pool: --from says what --diverse chooses from; give --diverse too")
        keep = "10%" if keep is None else keep
        return SelectConfig(keep=parse_keep(keep), by=by or "ifd", lowest=bool(lowest), **options)
    if keep is not None:
        raise ScorerError("keep: --diverse says how many are kept, and --from of how many; leave --keep out")
    first = parse_keep("20%" if pool is None else pool)
    return SelectConfig(keep=parse_keep(diverse), pool=first, by=by or "ifd", lowest=bool(lowest), **options)


def check_measure(by: str | None, protocol: str) -> None:
    """Raise ScorerError where scores by `protocol` would have no values of the column `by`."""
    if by in ALONE and PROTOCOLS[protocol].alone is None:
        raise ScorerError(f"by: the protocol {protocol} does not score the response alone, and so gives no {by}")


def check_column(data: Sequence[str], column: str | None, limit: int | None) -> None:
    """Raise ScorerError where no record of the files `data` has a value of `column`. Stops reading at the first."""
    if column is None:
        return
    paths = [name for path in data for name in expand(path)]
    with Dataset(paths, limit=limit) as dataset:
        if any(isinstance(raw.value, dict) and raw.value.get(column) is not None for raw in dataset.rows()):
            return
        raise ScorerError(f"per: no record of {', '.join(paths)} has a value of '{column}'")


def _write(
    data: Dataset,
    selection: Selection,
    output: str | Path | None,
    with_scores: bool,
    rejected: str | Path | None,
) -> None:
    """Write the records to one file or both, in one pass over the data.

    Both are finished before one is put in its place: a record that can't be written leaves neither.
    """
    with ExitStack() as files:
        targets: dict[int, _Target] = {}  # by record
        made: list[_Target] = []
        if output is not None:
            made.append(_Target(files.enter_context(RecordWriter(output)), selection.kept, noted=with_scores))
        if rejected is not None:
            made.append(_Target(files.enter_context(RecordWriter(rejected)), selection.rejected, noted=True))
        for target in made:
            targets |= dict.fromkeys(target.ids, target)
        for raw in data.rows():
            if raw.record_id in targets:
                targets[raw.record_id].add(raw)
        for target in made:
            target.finish()


class _Target:
    """A file that is written, the records that go there, and their notes."""

    def __init__(self, writer: RecordWriter, table: pl.DataFrame, *, noted: bool):
        self.writer, self.ids = writer, table["record_id"].to_list()
        self.notes = {row["record_id"]: row for row in table.iter_rows(named=True)} if noted else None
        self.ranked = self.ids != sorted(
            self.ids
        )  # then records are held until the end: the data's order is not theirs
        self.held: dict[int, RawRecord] = {}

    def add(self, raw: RawRecord) -> None:
        if self.ranked:
            self.held[raw.record_id] = raw
        else:
            self._write(raw)

    def finish(self) -> None:
        for record_id in self.ids if self.ranked else ():
            self._write(self.held[record_id])
        self.writer.finish()

    def _write(self, raw: RawRecord) -> None:
        if self.notes is None:
            self.writer.write(raw.value, text=raw.text, source=raw.source)
        else:
            self.writer.write(_noted(raw, self.notes[raw.record_id]), source=raw.source)


def _noted(raw: RawRecord, note: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(raw.value, dict):  # a line that is no JSON object can be rejected only
        return {"record": raw.value, SCORES_KEY: note}
    if SCORES_KEY in raw.value:
        raise ScorerError(f"{raw.source} has a field '{SCORES_KEY}' already: rename it, or write no scores")
    return {**raw.value, SCORES_KEY: note}


def _file(where: str) -> str:
    """What tells a file from others, whatever link leads to it."""
    found = to_path(where)
    return str(found) if is_remote(found) else os.path.realpath(found)


def check_apart(directory: str, outputs: Sequence[str]) -> None:
    """Raise ScorerError where one of the files `outputs` would have to be the run directory, or a folder above it."""
    for output in outputs:
        if f"{_file(directory)}/".startswith(f"{_file(output)}/"):
            raise ScorerError(f"{output}: the run directory {directory} is to be there; write to another file")


def _check_not_overwriting(targets: Sequence[str], inputs: Sequence[str]) -> None:
    files = [_file(target) for target in targets]
    read = {_file(path) for path in inputs}
    for target in files:
        if target in read or files.count(target) > 1:
            raise ScorerError(f"{target} would be overwritten: write to another file")
