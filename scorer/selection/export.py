"""Selects records of a run, and writes them unchanged.

Knows run directories, raw records and files; scorer.selection.ranking decides which records are kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import polars as pl
import pyarrow as pa
from polars import selectors

from scorer.data.dataset import Dataset
from scorer.data.moved import unchecked
from scorer.data.subset import Subset
from scorer.files.inputs import input_files
from scorer.files.raw import RawRecord
from scorer.files.upload import canonical, check_output, on_hub, uploading
from scorer.files.writer import FLAT, RecordWriter
from scorer.keywords import SelectKeywords
from scorer.options import from_options, keywords
from scorer.protocols import PROTOCOLS
from scorer.requirements import require
from scorer.runs.directory import Run, ScoreTable
from scorer.runs.extras import clusters, embedding_parts, embeddings
from scorer.scores.aggregate import KEYS, OTHER_RESPONSE, measures_of, per_record
from scorer.scores.measures import ALONE_COLUMNS, LEARNING, SCHEMA
from scorer.selection.config import SelectConfig
from scorer.selection.convert import DATASET_INFO, ConvertedRows, check_dataset_info, update_dataset_info
from scorer.selection.diversity import facility_location
from scorer.selection.flags import FLAGS, SCORE_FLAGS, STORED, TEXT_FLAGS
from scorer.selection.inputs import column_groups, flags
from scorer.selection.ranking import select_records
from scorer.selection.selection import Selection
from scorer.storage.outputs import check_outside_runs
from scorer.storage.paths import is_remote, to_path
from scorer.types import RowStatus, ScorerError, one_of

SCORES_KEY = "scorer"  # the key of a record's scores and reason


@keywords(SelectConfig)
def select(
    run: Run | str | Path,
    output: str | Path | None = None,
    *,
    data: Sequence[str | Path] = (),
    **options: Unpack[SelectKeywords],
) -> Selection:
    """Choose records of a finished run, and write them to `output`: unchanged, or in the form that is asked for.

    data: where the files that were scored lie now, in their order, if they were moved; or the data of a run that was
    joined from tables. `by` and `lowest` default to the ranking of the run's protocol, and `lowest` is True for LP. The
    ends of `output` and `rejected` choose their kinds: a suffix, or a "/". Either may be on the Hugging Face hub, as
    hf://datasets/ORG/NAME[@BRANCH]/PATH: see `scorer.files.upload`.

    Raises ScorerError where the run is unfinished, where its data changed since, and where a file can't be written;
    EngineError where the hub can't be reached.
    """
    config = from_options(SelectConfig, options)
    run = run if isinstance(run, Run) else Run(run)
    manifest = run.manifest
    data = named_files(data)
    check_options(list(map(str, data)) or manifest.paths, output, config, scored=True)
    config = ranked_as(config, manifest.ranking)
    writes = output is not None or config.rejected is not None
    reads_text = config.per is not None or set(config.drop_flagged) & set(TEXT_FLAGS)
    opened = run.data_at(data) if writes or reads_text or data else nullcontext()
    with run.snapshot(finished=True) as scores, opened as records:
        chosen = choose(scores, run, records, config)
        kept = _with_scores(chosen.kept.select("record_id", "rank"), scores, config)
        not_known = unchecked(manifest.inputs, records.inputs) if records is not None and data else ()
        selection = replace(chosen, kept=kept, unchecked=not_known, _open=partial(run.data_at, data))
        if records is not None and writes:
            records.check_unchanged()
            if config.form is not None:
                selection = _convertible(records, selection, config.form)
            _write_all(records, scores, selection, output, config)
    return selection


def named_files(data: Sequence[str | Path]) -> list[str]:
    """The files that are named in the place of a run's own. Raises ScorerError where it is no list of paths."""
    if isinstance(data, str | Path):
        raise ScorerError(f"data: {str(data)!r} is not a list of paths; write [{str(data)!r}]")
    return [file for path in data for file in input_files(str(path))]


def ranked_as(config: SelectConfig, ranking: Mapping[str, Any]) -> SelectConfig:
    """The configuration with the column and the end of a manifest's ranking, unless it names its own."""
    lowest = config.lowest
    if lowest is None:
        lowest = config.by in LEARNING or (ranking["lowest"] and config.by is None)
    return replace(config, by=config.by or ranking["by"], lowest=lowest)


def choose(
    shards: ScoreTable,
    run: Run,
    data: Dataset | None,
    config: SelectConfig,
    among: pl.Series | None = None,
) -> Selection:
    """Read what the configuration needs, and select: from all records, or as if the run had those of `among` alone.

    data: needed for `per`, and for flags of texts.
    """
    schema = shards.schema
    one_of("by", config.column, measures_of(schema))
    parts = [] if config.diverse is None else embedding_parts(run)
    groups = clusters(run) if config.per_cluster else None
    flag_columns = [name for name, _ in SCORE_FLAGS.values()] if config.drop_flagged else []
    names = dict.fromkeys((*KEYS, "response", config.column, "ifd", *flag_columns))
    scores = shards.scores([name for name in names if name in schema])  # other columns are read for kept records only
    if among is not None:
        scores = scores.filter(pl.col("record_id").is_in(among.implode()))
    flagged = flags(run, data, scores, config.drop_flagged) if config.drop_flagged else None
    if config.per is not None and data is not None:
        groups = column_groups(data, config.per)

    def diversify(ids: pl.Series, size: int) -> list[int]:
        return facility_location(embeddings(parts, ids), size)

    return select_records(scores, config, groups=groups, flags=flagged, diversify=diversify)


def _with_scores(table: pl.DataFrame, shards: ScoreTable, config: SelectConfig) -> pl.DataFrame:
    """A table of records, and every measure of each."""
    ids = table.lazy().select("record_id")
    rows = shards.collect(lambda scores: scores.join(ids, on="record_id", how="semi"))
    whole = per_record(rows, config.aggregate, config.response).drop("reason")
    return table.join(whole, on="record_id", how="left", maintain_order="left")


def check_options(
    paths: Sequence[str], output: str | Path | None, config: SelectConfig, *, scored: bool = False
) -> None:
    """Raise ScorerError for options that `select` would refuse, as far as that is known before there are scores.

    scored: the data `paths` have scores, so that `by` may be any column of them, and clusters and embeddings may exist.
    """
    targets = [str(path) for path in (output, config.rejected) if path is not None]
    for target in targets:
        check_output(target)
    check_not_overwriting(targets, paths)
    if config.random and config.bucket is None and (config.by is not None or config.lowest is not None):
        raise ScorerError("random: records are drawn from all, whatever their scores; leave out --by and --lowest")
    if config.form is not None and output is None:
        raise ScorerError("form: kept records are converted where they are written; give an output too")
    if config.form is not None and config.dataset_info and output is not None:
        check_dataset_info(output, config.form)
        check_not_overwriting([*targets, str(to_path(output).parent / DATASET_INFO)], paths)
    if config.diverse is not None:
        require("--diverse")
    for name in config.drop_flagged:
        one_of("drop_flagged", name, FLAGS)
    if not scored:
        if config.by is not None:
            one_of("by", config.by, measures_of(pl.Schema(SCHEMA)))
        if config.diverse is not None or config.per_cluster or set(config.drop_flagged) & set(STORED):
            raise ScorerError("clusters and embeddings come after scores: use `scorer score`, `cluster` and `select`")


def check_measure(by: str | None, protocol: str) -> None:
    """Raise ScorerError where scores by `protocol` would have no values of the column `by`."""
    if by in ALONE_COLUMNS and PROTOCOLS[protocol].alone is None:
        raise ScorerError(f"by: the protocol {protocol} does not score the response alone, and so gives no {by}")


def _write_all(
    data: Dataset, shards: ScoreTable, selection: Selection, output: str | Path | None, config: SelectConfig
) -> None:
    """Write the files that are asked for: both or neither, since both are complete before either is in its place.

    What goes to the hub is uploaded before a file here is renamed: of the two, an upload is the likelier to fail.
    """
    rejected = selection.rejected
    if config.rejected is not None and config.with_scores:
        rejected = _with_scores(rejected, shards, config)
    kept = Subset(data, selection.kept["record_id"].to_list())
    unread = rejected.filter(pl.col("reason").is_in([RowStatus.BAD_JSON.value, OTHER_RESPONSE]))["record_id"].to_list()
    converted = None if config.form is None else ConvertedRows(kept, config.form)
    outputs = (
        (output, converted or kept, selection.kept if config.with_scores else None),
        (config.rejected, Subset(data, rejected["record_id"].to_list(), broken=unread), rejected),
    )
    targets = [str(path) for path, *_ in outputs if path is not None]
    with ExitStack() as here, uploading(targets) as copies, ExitStack() as staged:
        for path, rows, notes in outputs:
            if path is not None:
                copy = copies.get(str(path))
                writer = RecordWriter(path) if copy is None else RecordWriter(copy, named=str(path))
                _write((here if copy is None else staged).enter_context(writer), rows, notes)
    if output is not None and converted is not None and config.dataset_info:
        update_dataset_info(output, converted.form, converted.keys)


def _convertible(data: Dataset, selection: Selection, form: str) -> Selection:
    """The selection without the records that the form can't hold: those are rejected."""
    rows = ConvertedRows(Subset(data, selection.kept["record_id"].to_list()), form)
    left_out = pl.col("record_id").is_in(rows.unconvertible())
    more = selection.kept.filter(left_out).select("record_id", reason=pl.lit("not_convertible"))
    rejected = pl.concat([selection.rejected, more]).sort("record_id")
    return replace(selection, kept=selection.kept.filter(~left_out), rejected=rejected)


def _write(writer: RecordWriter, rows: Subset | ConvertedRows, notes: pl.DataFrame | None) -> None:
    """Write rows, each with its row of `notes` under SCORES_KEY."""
    if writer.is_table:
        table = rows.table(writer.name, wrapped=notes is not None)
        writer.write_table(table if notes is None else _noted_table(table, notes, flat=writer.kind in FLAT))
    elif notes is None:
        for raw in rows.records():
            writer.write(raw.value, text=raw.text, source=raw.source)
    else:
        finite = notes.with_columns(pl.when(selectors.float().is_finite()).then(selectors.float()))  # as JSON needs
        for raw, note in zip(rows.records(), finite.iter_rows(named=True), strict=True):
            value, text = _noted(raw, note)
            writer.write(value, text=text, source=raw.source)
    writer.finish()


def _noted(raw: RawRecord, note: dict[str, Any]) -> tuple[Any, str | None]:
    """A record with its note, and as text if it has one: every other key and number stays as it was written."""
    if not isinstance(raw.value, dict):  # a line that is no JSON object
        return {"record": raw.value, SCORES_KEY: note}, None
    if SCORES_KEY in raw.value:
        raise _taken(raw.source)
    value = {**raw.value, SCORES_KEY: note}
    if raw.text is None:
        return value, None
    inside = raw.text.strip()[1:-1].rstrip()
    return value, f"{{{inside}{', ' if raw.value else ''}{json.dumps(SCORES_KEY)}: {json.dumps(note)}}}"


def _noted_table(table: pa.Table, notes: pl.DataFrame, *, flat: bool) -> pa.Table:
    """The table with the notes as one more column, or if `flat` a column for each field of theirs."""
    added = (
        notes.rename(lambda name: f"{SCORES_KEY}.{name}")
        if flat
        else notes.select(pl.struct(pl.all()).alias(SCORES_KEY))
    )
    for name, column in zip(added.columns, added.to_arrow().columns, strict=True):
        if name in table.column_names:
            raise _taken("the data", name)
        table = table.append_column(name, column)
    return table


def _taken(where: str, name: str = SCORES_KEY) -> ScorerError:
    return ScorerError(f"{where} has a field '{name}' already: rename it, or write no scores")


def _file(where: str) -> str:
    """The path without symbolic links, by which two names of one file compare equal."""
    if on_hub(where):
        return canonical(where)
    found = to_path(where)
    return str(found) if is_remote(found) else os.path.realpath(found)


def check_apart(directory: str, outputs: Sequence[str]) -> None:
    """Raise ScorerError where one of the files `outputs` is of the run directory, or is it, or a folder above it."""
    for output in outputs:
        if not on_hub(output):
            check_outside_runs(to_path(output), to_path(directory))
        if f"{_file(directory)}/".startswith(f"{_file(output)}/"):
            raise ScorerError(f"{output}: the run directory {directory} would be there; write to another file")


def check_not_overwriting(targets: Sequence[str], inputs: Sequence[str]) -> None:
    files = [_file(target) for target in targets]
    read = {_file(path) for path in inputs}
    for target in files:
        if target in read or files.count(target) > 1:
            raise ScorerError(f"{target} would be overwritten: write to another file")
