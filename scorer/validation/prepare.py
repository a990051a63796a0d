"""What a validation trains and compares on: the held-out records, and a training set for each arm and seed.

Raises every error that can be known before a model is trained. Knows runs and selections; neither training nor results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import polars as pl

from scorer.data.dataset import Dataset
from scorer.encoding.encoder import Encoder
from scorer.files.inputs import input_files
from scorer.runs.directory import Run, ScoreTable
from scorer.runs.extras import clusters, has_clusters
from scorer.runs.progress import Progress
from scorer.scores.aggregate import per_record
from scorer.scores.shares import to_count
from scorer.selection.config import SelectConfig
from scorer.selection.export import choose, ranked_as
from scorer.selection.inputs import column_groups
from scorer.types import ScorerError
from scorer.validation.arms import Arm, Plan, TrainingSet, training_sets
from scorer.validation.config import HOLDOUT, ValidateConfig
from scorer.validation.holdout import Texts, draw
from scorer.validation.samples import Sample, chosen, measure, trainable

LEAST_HELD_OUT = 10  # fewer say nothing


@dataclass(frozen=True, slots=True)
class Prepared:
    """Held-out samples in order; a row of each for the comparison (row, tokens, ifd, cluster, group); training sets."""

    held_out: Sequence[Sample]
    rows: pl.DataFrame
    sets: Sequence[TrainingSet]


@dataclass(frozen=True, slots=True)
class Source:
    """The run that is validated, its records, and its scores."""

    run: Run
    data: Dataset
    scores: ScoreTable


@dataclass(frozen=True, slots=True)
class Asked:
    """What to prepare. selection: of the arm `selected`. least: how many records a training set has to have."""

    config: ValidateConfig
    selection: SelectConfig
    arms: Sequence[Arm]
    least: int


def prepare(source: Source, encoder: Encoder, asked: Asked, progress: Progress) -> Prepared:
    """Hold records out, and choose what each arm trains on.

    Raises ScorerError where there are too few records, where two arms are the same, and where an arm would train on
    what is held out.
    """
    config, selection = asked.config, asked.selection
    table = measure(source.data, encoder)
    pool = trainable(table)
    left_out = _left_out("records", table)
    if pool.height < 2 * LEAST_HELD_OUT:
        raise ScorerError(f"{pool.height:,} records are too few to train and compare on{left_out and f'; {left_out}'}")
    if left_out:
        progress.say(left_out)
    facts = _facts(source, pool, selection)
    if config.eval_file is None:
        candidates = facts.filter(pl.col("scored"))
        ids = draw(candidates, config.holdout or min(HOLDOUT, candidates.height // 4), config.seed)
        held_out = list(chosen(source.data, ids))
        rows = pl.DataFrame({"record_id": ids}).join(facts, on="record_id", how="left", maintain_order="left")
        pool = pool.filter(~pl.col("record_id").is_in(ids))
    else:
        held_out, rows = _read_eval(config.eval_file, source.data, encoder, progress)
    if len(held_out) < LEAST_HELD_OUT:
        raise ScorerError(f"holdout: {len(held_out)} records say nothing; hold out {LEAST_HELD_OUT} or more")
    texts = Texts({i: sample.text for i, sample in enumerate(held_out)})
    found = {s.record.record_id: texts.like(s.text) for s in chosen(source.data, pool["record_id"].to_list())}
    alike = {record_id: i for record_id, i in found.items() if i is not None}
    if config.eval_file is None and alike:
        pool = pool.filter(~pl.col("record_id").is_in(list(alike)))
        progress.say(f"left out of every arm: {len(alike):,} records that are nearly the same as a held-out one")
    seeds = range(config.seed, config.seed + config.seeds)
    plan = Plan(seeds, config.equal, to_count(selection.size, pool.height), asked.least)
    sets = training_sets(asked.arms, pool, lambda arm: _choose(arm, source, pool["record_id"]), plan)
    _check_apart(sets, alike, held_out)
    rows = rows.drop("record_id", "scored", strict=False).with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    return Prepared(held_out, rows, sets)


def _left_out(what: str, table: pl.DataFrame) -> str:
    """How many records can't be trained on, and why; empty where there are none."""
    reasons = Counter(table.join(trainable(table), on="record_id", how="anti")["status"].to_list())
    if not reasons:
        return ""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return f"left out: {reasons.total():,} of {table.height:,} {what} can't be trained on ({counts})"


def _facts(source: Source, pool: pl.DataFrame, selection: SelectConfig) -> pl.DataFrame:
    """record_id, tokens, ifd, scored, and where they are known cluster and group, of the records of the pool."""
    names = [name for name in ("record_id", "turn", "status", "response", "ifd") if name in source.scores.schema]
    scores = per_record(source.scores.scores(names), selection.aggregate, None)
    ifd = pl.col("ifd") if "ifd" in scores.columns else pl.lit(None, pl.Float64)
    facts = pool.select("record_id", "tokens").join(
        scores.select("record_id", ifd=ifd, scored=pl.col("reason").is_null()), on="record_id", how="left"
    )
    if has_clusters(source.run):
        facts = facts.join(clusters(source.run).rename({"group": "cluster"}), on="record_id", how="left")
    if selection.per is not None:
        facts = facts.join(column_groups(source.data, selection.per), on="record_id", how="left")
    return facts.sort("record_id")


def _read_eval(path: object, data: Dataset, encoder: Encoder, progress: Progress) -> tuple[list[Sample], pl.DataFrame]:
    """The samples of a file that can be compared on, and what is known of them."""
    with Dataset(input_files(str(path)), reading=data.reading) as file:
        file.inspect()
        table = measure(file, encoder)
        usable = trainable(table)
        if left_out := _left_out(f"records of {path}", table):
            progress.say(left_out)
        held_out = list(chosen(file, usable["record_id"].to_list()))
    return held_out, usable.select("record_id", "tokens")


def _choose(arm: Arm, source: Source, among: pl.Series) -> list[int]:
    """The ids of the records that an arm selects."""
    assert arm.config is not None
    run = source.run if arm.run is None else Run(arm.run)
    if _data_of(run) != _data_of(source.run):
        raise ScorerError(f"arm {arm.name}: {arm.run} is a run of other data than {source.run.path}; score the same")
    config = ranked_as(arm.config, run.manifest.ranking)
    with nullcontext(source.scores) if arm.run is None else run.snapshot(finished=True) as scores:
        return choose(scores, run, source.data, config, among).kept["record_id"].to_list()


def _data_of(run: Run) -> tuple[object, int]:
    return run.manifest.identity.get("inputs"), run.manifest.records


def _check_apart(sets: Sequence[TrainingSet], alike: Mapping[int, int], held_out: Sequence[Sample]) -> None:
    for one in sets:
        if shared := [i for i in one.ids if i in alike]:
            other = held_out[alike[shared[0]]].record.source
            raise ScorerError(
                f"--eval: {other} is nearly the same as record {shared[0]}, which arm {one.arm} trains on "
                f"({len(shared):,} such records): leave such records out of the file, or compare on --holdout"
            )
