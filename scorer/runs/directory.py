"""A run directory on disk: its manifest, its shards, its lock.

    RUN/manifest.json                see scorer.runs.manifest
    RUN/scores/part-00000.parquet    the score table of the first `shard_rows` records, and so on
    RUN/stdin.jsonl                  what was read from standard input, if it was an input
    RUN/data.jsonl, data.arrow       the data, if it was in memory

A run directory is a folder, or the objects under an s3:// URL. A shard is whole or absent in either, so the absent ones
are left to do. The next writer removes what a killed process left half written on a disk.

Before scores are read, every shard is hashed, and compared with what it and the manifest say of it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl

from scorer.config import Reading
from scorer.data.dataset import Dataset, inspect_input
from scorer.data.moved import count_rows, moved
from scorer.faults import first_line
from scorer.options import take
from scorer.runs.manifest import Manifest
from scorer.runs.shard_file import ShardInfo, read_info
from scorer.scores.summary import COLUMNS, QUANTILES, Summary, summarise
from scorer.storage.paths import exists, is_remote, list_folder, local_copies, store_errors, to_path
from scorer.types import ScorerError

MANIFEST = "manifest.json"
LOCK = ".lock"
SHARD = re.compile(r"part-\d+\.parquet", re.ASCII)
STDIN = "stdin.jsonl"
COPIES = (STDIN, "data.jsonl", "data.arrow")  # of what was no file
CLUSTERS, FLAGS, EMBEDDINGS = "clusters.parquet", "flags.parquet", "embeddings"  # made by `scorer cluster`


class Run:
    """A run directory, which reading never changes; scorer.runs.writer writes it."""

    def __init__(self, path: str | Path):
        self.path = to_path(path)
        self._manifest: Manifest | None = None

    def __repr__(self) -> str:
        lines = [f"Run({str(self.path)!r})"]
        with suppress(ScorerError):
            known = self.manifest
            lines[0] += f": {known.records:,} records, {'complete' if self.complete else 'unfinished'}"
            summary = self.summary()
            lines.append("status: " + ", ".join(f"{count:,} {status}" for status, count in summary.status.items()))
            for name, values in summary.quantiles.items():
                shown = ", ".join(f"{q:.0%} {v:.4g}" for q, v in zip(QUANTILES, values, strict=True))
                lines.append(f"{name}: {shown}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return f"<pre>{html.escape(repr(self))}</pre>"

    @property
    def manifest(self) -> Manifest:
        """The manifest, as it was when this object first read or last wrote it.

        Raises ScorerError where this is not a run directory, or one of a newer scorer.
        """
        if self._manifest is None:
            self._manifest = self._read_manifest()
        return self._manifest

    def _read_manifest(self) -> Manifest:
        path = self.path / MANIFEST
        try:
            with store_errors(self.path):
                if exists(path) and not path.is_file():  # to open a pipe could take for ever
                    raise ValueError("it is not a file")
                return Manifest.from_json(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ScorerError(f"{self.path} is not a run directory: it has no {MANIFEST}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ScorerError(
                f"{path} can't be read ({error}): restore it, name another directory, or score again with --fresh"
            ) from error

    @property
    def data(self) -> Dataset:
        """The records that were scored. Raises ScorerError where there are none (LP of tables), or a file is gone."""
        return self.data_at()

    def data_at(self, paths: Sequence[str | Path] = ()) -> Dataset:
        """The records that were scored, read from `paths`, if given: where the manifest's files lie now, in its order.

        Of a run that was joined from tables, the record ids are taken for row numbers of `paths`. Raises ScorerError
        where a file is gone or is not what was scored, and where there is another number of rows than of records.
        """
        known = self.manifest
        inputs, counts = known.inputs, known.input_records
        if paths and inputs:
            inputs = moved(inputs, paths)
        elif paths:
            inputs, counts = tuple(map(inspect_input, paths)), tuple(map(count_rows, paths))
            ids = self.scores(["record_id"])["record_id"]
            if (ids.min(), ids.max()) != (0, known.records - 1):
                raise ScorerError(f"{self.path}: its record ids are not row numbers, 0 to {known.records - 1:,}")
            if sum(counts) != known.records:
                raise ScorerError(
                    f"{', '.join(map(str, paths))}: holds {sum(counts):,} rows, but {self.path} has {known.records:,} "
                    "records, whose ids are row numbers: give the data that was scored"
                )
        elif not inputs:
            raise ScorerError(
                f"{self.path} was joined from tables and has no data: name it with `scorer select --data`, or join run "
                "directories instead"
            )
        reading = Reading(**take(Reading, dict(known.config)))
        limit = known.config["limit"]
        return Dataset([e.path for e in inputs], reading=reading, limit=limit, inputs=inputs, counts=counts)

    @property
    def begun(self) -> bool:
        """Whether there is a manifest."""
        return exists(self.path / MANIFEST)

    @property
    def complete(self) -> bool:
        """Whether every record has its row; not so where a shard was deleted since."""
        return self.manifest.state == "complete" and not self.missing()

    def check_finished(self) -> None:
        """Raise ScorerError where records have no row yet."""
        if not self.complete:
            raise ScorerError(f"{self.path} is unfinished: run the same command that scored it again to finish it")

    @contextmanager
    def snapshot(self, *, finished: bool = False) -> Iterator[ScoreTable]:
        """The score table of the shards that are there now. Those in a store are copied while the block runs.

        finished: those of all records. Raises ScorerError where there are no shards, where one is not what was written,
        and where another process started the run over since this object read its manifest.
        """
        known, current = self._manifest, self._read_manifest()
        if known is not None and known.run_id != current.run_id:
            raise self._started_over()
        self._manifest = current
        if finished:
            self.check_finished()
        shards = self.shards()
        if not shards:
            raise ScorerError(f"{self.path} holds no scores yet: run `scorer score` to its end first")

        def check_same() -> None:
            found = self._read_manifest()
            if (found.run_id, found.records, found.shards) != (current.run_id, current.records, current.shards):
                raise self._started_over()

        with local_copies(shards) as files:
            infos, faults = inspect_shards(files, current)
            if faults:
                raise ScorerError(
                    f"{self.path / 'scores'}/{describe_faults(faults)}: run the same command that scored it again, "
                    "which scores what is damaged"
                )
            yield ScoreTable(self.path, files, infos, check_same)

    def _started_over(self) -> ScorerError:
        return ScorerError(f"{self.path} was changed by another process while it was read: run the command again")

    def scores(self, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The score table, one row a turn, in input order: all columns of scorer.scores.measures.SCHEMA, or some."""
        with self.snapshot() as table:
            return table.scores(columns)

    def summary(self) -> Summary:
        """Counts by status, and quantiles of the measures. Raises ScorerError where there are no shards."""
        with self.snapshot() as table:
            return summarise(table.scores([name for name in table.schema if name in ("status", *COLUMNS)]))

    def to_polars(self) -> pl.DataFrame:
        """The score table as a Polars frame: all of `scores`."""
        return self.scores()

    def to_dataset(self) -> Any:
        """The score table as a `datasets.Dataset`. Raises ScorerError where `datasets` is not installed."""
        from scorer.files.arrow import as_dataset  # brings pyarrow, which scoring does not need

        return as_dataset(self.scores().to_arrow())

    def shards(self) -> list[Path]:
        """The whole shards, in order. An unfinished run may lack any of them, wherever several workers score."""
        return sorted((path for path in list_folder(self.path / "scores") if SHARD.fullmatch(path.name)), key=_number)

    def missing(self) -> list[int]:
        """The numbers of the shards that the manifest's records make and that are not there."""
        there = set(map(_number, self.shards()))
        return [index for index in range(self.manifest.shard_count) if index not in there]

    def require_disk(self, work: str) -> None:
        """Raise ScorerError where the run is in object storage, and `work` maps its files into memory."""
        if is_remote(self.path):
            raise ScorerError(f"{self.path}: {work} needs a run directory on a disk: copy it to one first")

    def shard(self, index: int) -> Path:
        """The path of a shard, which may not be there."""
        return self.path / "scores" / _name(index)


class ScoreTable:
    """The score table of a run, read lazily from its shards on this machine's disk.

    infos: what each shard says of itself, in their order. check: raises where the run changed since.
    """

    def __init__(self, path: Path, files: list[Path], infos: list[ShardInfo], check: Callable[[], None]):
        self._path, self._files, self._check = path, files, check
        self.infos = infos

    @property
    def schema(self) -> pl.Schema:
        """The columns, and their types. Raises ScorerError as `collect` does."""
        return self._collect(self._files[:1], lambda table: table.head(0)).schema

    def scores(self, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """All columns, or some."""
        return self.collect(lambda table: table if columns is None else table.select(columns))

    def collect(self, query: Callable[[pl.LazyFrame], pl.LazyFrame]) -> pl.DataFrame:
        """The result of a query, which reads only what it needs. Raises ScorerError where the run changed meanwhile."""
        return self._collect(self._files, query)

    def shard(self, index: int) -> pl.DataFrame:
        """The rows of one shard."""
        files = [file for file in self._files if _number(file) == index]
        return self._collect(files, lambda table: table)

    def _collect(self, files: list[Path], query: Callable[[pl.LazyFrame], pl.LazyFrame]) -> pl.DataFrame:
        try:
            return query(pl.scan_parquet(files, glob=False, hive_partitioning=False)).collect(engine="streaming")
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ScorerError(f"{self._path}: its scores can't be read ({first_line(error)})") from error
        finally:
            self._check()


def inspect_shards(files: Sequence[Path], manifest: Manifest) -> tuple[list[ShardInfo], dict[str, str]]:
    """What the shards `files` say of themselves; and by name, what is wrong with those that are not the manifest's."""

    def inspect(file: Path) -> ShardInfo | str:
        try:
            info = read_info(file)
        except (OSError, ValueError) as error:
            return f"is damaged ({first_line(error)})"
        index, expected = _number(file), manifest.records_of(_number(file))
        if info.run_id != manifest.run_id or info.index != index or expected <= 0 or file.name != _name(index):
            return "is no part of this run"
        if info.records != expected:
            return f"holds {info.records:,} records in place of {expected:,}"
        if manifest.shards and [info.rows, info.sha256] != list(manifest.shards[index]):
            return "is another than was counted"
        return info

    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to other threads
        found = list(zip(files, pool.map(inspect, files), strict=True))
    faults = {file.name: info for file, info in found if isinstance(info, str)}
    return [info for _, info in found if not isinstance(info, str)], faults


def describe_faults(faults: Mapping[str, str]) -> str:
    """The first of what `inspect_shards` found wrong, and how many more there are, as text for a message."""
    name, fault = next(iter(faults.items()))
    others = f", and {len(faults) - 1:,} other shards are faulty" if len(faults) > 1 else ""
    return f"{name} {fault}{others}"


def _name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def _number(shard: Path) -> int:
    return int(shard.stem.removeprefix("part-"))
