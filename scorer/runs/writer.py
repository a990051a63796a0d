"""Writing a run directory: its lock, its shards, its manifest, and starting over."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from scorer.runs.directory import (
    CLUSTERS,
    COPIES,
    EMBEDDINGS,
    FLAGS,
    LOCK,
    MANIFEST,
    Run,
    ScoreTable,
    inspect_shards,
)
from scorer.runs.manifest import Manifest
from scorer.runs.shard_file import ZEROS, ShardInfo, write_shard_file
from scorer.scores.measures import LABELS, MEASURES
from scorer.scores.summary import count_rows
from scorer.storage.atomic import check_folder, remove_temporaries, replacing, storage_error
from scorer.storage.lock import check_free, locked
from scorer.storage.outputs import is_run
from scorer.storage.paths import exists, is_remote, list_folder, local_copies, remove
from scorer.types import EngineError, ScorerError


@dataclass(frozen=True, slots=True)
class Work:
    """How a shard was scored: see ShardInfo."""

    tokens: int = 0
    seconds: float = 0.0
    by: str = "this process"
    environment: Mapping[str, str] = field(default_factory=dict)


def _counted(table: ScoreTable) -> dict[str, Any]:
    """What a manifest says of the shards of a complete run."""
    infos = table.infos
    made = Counter(tuple(sorted(info.environment.items())) for info in infos)
    return {
        "shards": [[info.rows, info.sha256] for info in infos],
        "tokens": sum(info.tokens for info in infos),
        "seconds": round(sum(info.seconds for info in infos), 3),
        "shards_by": dict(Counter(info.by for info in infos)),
        "environments": [{**dict(items), "shards": count} for items, count in made.items()],
        **count_rows(table.scores(["record_id", "status", *LABELS])),
    }


class RunWriter(Run):
    """A run directory that is written. All but `check_usable` and `locked` are called while `locked` is held."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._check: Callable[[], None] = lambda: None

    def remove_partial_shard(self) -> None:
        """Remove the last shard if it has fewer records than the others, so that more can be added."""
        index, records = divmod(self.manifest.records, self.manifest.config["shard_rows"])
        if records and index not in self.missing():
            self._check()
            remove([self.shard(index)])

    def remove_faulty_shards(self, manifest: Manifest) -> dict[str, str]:
        """Remove the shards that are not `manifest`'s, as they were written. What was wrong with each, by name."""
        shards = self.shards()
        with local_copies(shards) as files:
            _, faults = inspect_shards(files, manifest)
        if faults:
            self._check()
            remove(shard for shard in shards if shard.name in faults)
        return faults

    def write_shard(self, index: int, table: pl.DataFrame, work: Work | None = None) -> None:
        """Write one shard. Raises EngineError where the disk is full or a record lacks its row, ScorerError where the
        run's lock was lost.
        """
        records, expected = table["record_id"].n_unique(), self.manifest.records_of(index)
        if records != expected:
            raise EngineError(f"{self.shard(index)}: {records:,} records were scored in place of {expected:,}")
        info = ShardInfo(
            run_id=self.manifest.run_id, index=index, records=records, rows=table.height, **asdict(work or Work())
        )
        self._check()
        write_shard_file(self.shard(index), table, info)

    def write_extra(self, name: str, table: pl.DataFrame) -> None:
        """Write a table of all records beside the scores, such as clusters."""
        known = self.manifest
        info = ShardInfo(run_id=known.run_id, index=0, records=known.records, rows=table.height)
        self._check()
        write_shard_file(self.path / name, table, info)

    def finish(self, manifest: Manifest, **values: Any) -> None:
        """Write the manifest of the run, whose shards are all there: counts are those of the shards, or `values`.

        Raises EngineError where a record has no row.
        """
        with self.snapshot() as table:
            written = self._copy_equal_scores(table)
            found = {} if written else _counted(table)
        if written:
            with self.snapshot() as table:
                found = _counted(table)
        if missing := self.missing():  # each that is there has the rows of all its records
            raise EngineError(f"{self.path}: {len(missing):,} shards are gone; the same command scores them again")
        self.write_manifest(replace(manifest, state="complete", **found | values))

    def _copy_equal_scores(self, table: ScoreTable) -> bool:
        """Give all rows of the same tokens the scores of the first of them. Whether a shard was written for it.

        The last bits of a score depend on what it was batched with, and would decide which of equal records is kept.
        """
        hashes = table.scores(["tokens_hash"])["tokens_hash"].drop_nulls()
        repeated = hashes.filter(hashes.is_duplicated()).unique().to_frame()
        if repeated.is_empty():
            return False
        columns = ["record_id", "tokens_hash", *MEASURES]
        rows = table.collect(lambda t: t.select(columns).join(repeated.lazy(), on="tokens_hash", how="semi"))
        first = rows.sort("record_id", maintain_order=True).unique("tokens_hash", keep="first").drop("record_id")
        pairs = rows.join(first, on="tokens_hash", how="left", suffix=" first")
        differ = pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name} first")) for name in MEASURES)
        indices = pairs.filter(differ)["record_id"] // self.manifest.config["shard_rows"]
        infos = {info.index: info for info in table.infos}
        for index in indices.unique().sort():
            copied = table.shard(index).update(first, on="tokens_hash")
            self._check()
            write_shard_file(self.shard(index), copied, replace(infos[index], sha256=ZEROS))
        return not indices.is_empty()

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest. Raises ScorerError where the run's lock was lost."""
        self._check()
        with replacing(self.path / MANIFEST) as temporary:
            temporary.write_text(manifest.to_json(), encoding="utf-8")
        self._manifest = manifest

    def clear(self) -> None:
        """Remove the manifest, then clusters, flags, embeddings and all shards, so that the run starts over."""
        self._manifest = None
        remove([self.path / MANIFEST])
        self.clear_extras()
        remove(reversed(self.shards()))

    def clear_extras(self) -> None:
        """Remove what `scorer cluster` made."""
        remove(self.path / name for name in (CLUSTERS, FLAGS))
        if not is_remote(self.path):
            shutil.rmtree(self.path / EMBEDDINGS, ignore_errors=True)

    def check_usable(self) -> None:
        """Raise ScorerError now where `locked` would raise it later, after a model is fetched."""
        self._check_directory()
        try:
            check_free(self.path / LOCK)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def _check_directory(self) -> None:
        """Raise ScorerError where the directory has files in it but is no run, or can't be written."""
        if not exists(self.path / LOCK) and list_folder(self.path) and not is_run(self.path):
            raise ScorerError(f"{self.path} is not a run directory, and not empty: choose another with -o")
        if not is_remote(self.path):
            check_folder(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory, and be its only writer while the block runs.

        Raises ScorerError where another process holds it, where the path can't be written, and where the directory
        has files in it but is no run.
        """
        self._check_directory()
        lock = self.path / LOCK
        with ExitStack() as held:
            try:
                if not is_remote(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                self._check = held.enter_context(locked(lock))  # before all else: it is the mark of a run directory
                if not is_remote(self.path):
                    (self.path / "scores").mkdir(exist_ok=True)
                for name in (MANIFEST, *COPIES, "scores/part-*.parquet"):
                    remove_temporaries(self.path / name)
            except OSError as error:
                raise storage_error(self.path, error) from error
            yield
