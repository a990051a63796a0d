"""LP from existing scores: joins run directories or plain tables, one before training and one after each epoch.

The formulas are in scorer.scores.measures; scorer.learning.learn trains.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import polars as pl

from scorer.faults import first_line
from scorer.files.reader import read_table
from scorer.learning.learn import PROTOCOL, clear_or_check, finish, is_done, learning_manifest
from scorer.runs.directory import Run
from scorer.runs.manifest import Manifest, differences
from scorer.runs.progress import Progress, shown
from scorer.runs.writer import RunWriter
from scorer.scores.aggregate import check_ids, check_same_ids
from scorer.scores.measures import SCHEMA
from scorer.storage.paths import absolute, is_folder, local_copy, to_path
from scorer.types import RowStatus, ScorerError

SHARD_ROWS = 100_000  # records per shard of a run that is joined from tables
KEYS = ["record_id", "turn"]
COMMON_OPTIONS = ("protocol", "max_length", "limit", "columns")  # equal in the runs of all epochs


def join_runs(
    sources: Sequence[str | Path], output: str | Path, *, fresh: bool = False, progress: Progress | bool | None = None
) -> Run:
    """Make the run directory of LP from existing scores: before training, and after each epoch, in this order.

    sources: two or more run directories, or Parquet, CSV or JSON files with `record_id` and `ppl_conditioned`
    (other columns of the score table are taken too). The data is that of the run directories; with none of them the
    run has scores only. Raises ScorerError where the rows are not the same, saying how many.
    """
    if len(sources) < 2:
        raise ScorerError("--runs needs the scores before training and after each epoch: two at least")
    if absolute(output) in map(absolute, sources):
        raise ScorerError(f"{output}: is one of the runs to join; name another directory with -o")
    manifests = [Run(path).manifest for path in sources if is_folder(to_path(path))]
    for manifest in manifests[1:]:
        _check_same_data(manifests[0], manifest)
    tables = [_read_table(to_path(path)) for path in sources]
    for path, table in zip(sources, tables, strict=True):
        check_ids(str(path), table, KEYS)
        check_same_ids(str(sources[0]), tables[0], str(path), table, KEYS)
    digests = [_digest(to_path(path)) for path in sources]
    base = manifests[0] if manifests else _table_manifest(sources, tables[0])
    run = RunWriter(output)
    run.require_disk("joining")
    with shown(progress) as receiver, run.locked():
        clear_or_check(run, fresh=fresh)
        manifest = learning_manifest(base, {"tables": digests}, len(tables) - 1)
        if not is_done(run, manifest, receiver):
            run.write_manifest(manifest)
            finish(run, manifest, tables, manifests)
    return run


def _table_manifest(sources: Sequence[str | Path], table: pl.DataFrame) -> Manifest:
    config = {"limit": None, "columns": None, "shard_rows": SHARD_ROWS, "protocol": PROTOCOL}
    name = " ".join(to_path(path).name for path in sources)
    return Manifest(
        identity={"config": config, "model_revision": None, "inputs": []},
        model={"name": name, "revision": None, "origin": "tables", "path": absolute(sources[0])},
        environments=({"python": platform.python_version()} | {n: version(n) for n in ("ifd-scorer", "polars")},),
        ranking={},
        records=table["record_id"].n_unique(),
    )


def _read_table(path: Path) -> pl.DataFrame:
    """A run's score table, or a file's, by record_id and turn, with all columns of SCHEMA."""
    if is_folder(path):
        Run(path).check_finished()
        return Run(path).scores().select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items()).sort(KEYS)
    table = read_table(path)
    try:
        if missing := sorted({"record_id", "ppl_conditioned"} - set(table.columns)):
            raise ScorerError(f"{path}: it has no column {' and no column '.join(missing)}")
        ppl = pl.col("ppl_conditioned").cast(pl.Float64)
        null, infinite = (pl.lit(status.value) for status in (RowStatus.MISSING_FIELD, RowStatus.NON_FINITE))
        fault = pl.when(ppl.is_null()).then(null).when(~ppl.is_finite()).then(infinite).otherwise(pl.lit("ok"))
        given = {"turn": pl.lit(0), "status": fault} | {name: pl.col(name) for name in table.columns}
        table = table.select(given.get(name, pl.lit(None)).cast(dtype).alias(name) for name, dtype in SCHEMA.items())
    except pl.exceptions.PolarsError as error:
        raise ScorerError(f"{path}: its columns are not those of a score table ({first_line(error)})") from error
    return table.sort(KEYS)


def _digest(path: Path) -> str:
    if is_folder(path):
        return Run(path).manifest.fingerprint
    with local_copy(path) as copy, copy.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_same_data(first: Manifest, other: Manifest) -> None:
    one, two = (
        {"config": {name: m.config.get(name) for name in COMMON_OPTIONS}, "inputs": m.identity["inputs"]}
        for m in (first, other)
    )
    if differing := differences(one, two):
        raise ScorerError(f"the runs differ ({'; '.join(differing)}): their perplexities can't be compared")
