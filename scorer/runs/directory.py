"""A run directory on disk: its manifest, its shards, its lock.

    RUN/manifest.json                configuration, inputs, model, versions, counts
    RUN/scores/part-00000.parquet    the score table of the first `shard_rows` records, and so on
    RUN/stdin.jsonl                  what was read from standard input, if it was an input

A run directory is a folder, or the objects under an s3:// URL. A shard is whole or absent in either, so what is absent
is left to do. What a killed process left half written on a disk, the next writer removes. Knows Parquet and JSON files;
neither how scores are made nor what they mean.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from scorer.storage.atomic import check_folder, remove_temporaries, replacing, storage_error
from scorer.storage.lock import check_free, locked
from scorer.storage.paths import exists, is_remote, list_folder, local_copies, remove, store_errors, to_path
from scorer.types import ScorerError

MANIFEST = "manifest.json"
LOCK = ".lock"
SHARD = re.compile(r"part-\d+\.parquet")
STDIN = "stdin.jsonl"
CLUSTERS, FLAGS, EMBEDDINGS = "clusters.parquet", "flags.parquet", "embeddings"  # of the data that the scores are of


class Run:
    """A run directory. Reading it never changes it; what writes it holds `locked()`."""

    def __init__(self, path: str | Path):
        self.path = to_path(path)
        self._check: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest's content. Raises ScorerError where this is not a run directory."""
        try:
            with store_errors(self.path):
                manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ScorerError(f"{self.path} is not a run directory: it has no {MANIFEST}") from None
        except (OSError, ValueError) as error:
            raise ScorerError(f"{self.path / MANIFEST} can't be read ({error})") from error
        if not _is_manifest(manifest):
            raise ScorerError(f"{self.path / MANIFEST} is not the manifest of a run: name another directory")
        return manifest

    @property
    def begun(self) -> bool:
        """Whether there is a manifest."""
        return exists(self.path / MANIFEST)

    @property
    def complete(self) -> bool:
        """Whether every record has its row; not so where a shard was deleted since."""
        manifest = self.manifest
        return manifest["state"] == "complete" and not self._absent(manifest)

    def scores(self, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The score table, one row a turn, in input order: all columns of scorer.scores.measures.SCHEMA, or some."""
        return self.collect(lambda table: table if columns is None else table.select(columns))

    @property
    def schema(self) -> pl.Schema:
        """The columns of the score table, and their types. Raises ScorerError as `collect` does."""
        return self._collect(self.shards()[:1], lambda table: table.head(0)).schema

    def collect(self, query: Callable[[pl.LazyFrame], pl.LazyFrame]) -> pl.DataFrame:
        """What a query of the score table gives, which is read lazily: of each shard only what the query needs.

        Shards in a store are copied to the temporary folder first, whole.
        Raises ScorerError where there are no shards, and where one can't be read.
        """
        return self._collect(self.shards(), query)

    def _collect(self, shards: list[Path], query: Callable[[pl.LazyFrame], pl.LazyFrame]) -> pl.DataFrame:
        if not shards:
            raise ScorerError(f"{self.path} holds no scores yet: run `scorer score` to its end first")
        with local_copies(shards) as files:
            try:
                return query(pl.scan_parquet(files, glob=False, hive_partitioning=False)).collect(engine="streaming")
            except (pl.exceptions.PolarsError, FileNotFoundError) as error:
                raise ScorerError(f"{self.path}: a shard can't be read; score again with --fresh ({error})") from error

    def shards(self) -> list[Path]:
        """The whole shards, in order. Of an unfinished run some may be missing, wherever several workers score."""
        return sorted((path for path in list_folder(self.path / "scores") if SHARD.fullmatch(path.name)), key=_number)

    def missing(self) -> list[int]:
        """The numbers of the shards that the manifest's records make and that are not there."""
        return self._absent(self.manifest)

    def _absent(self, manifest: dict[str, Any]) -> list[int]:
        there = set(map(_number, self.shards()))
        return [index for index in range(_shard_count(manifest)) if index not in there]

    def write_shard(self, index: int, table: pl.DataFrame) -> None:
        """Write one shard. Raises EngineError where the disk is full, ScorerError where the run's lock was lost."""
        self._check()
        write_table(self._shard(index), table)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest. Raises ScorerError where the run's lock was lost."""
        self._check()
        with replacing(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def clear(self) -> None:
        """Remove the manifest, all shards and what was made of the data, so that the run starts over.

        The manifest goes first.
        """
        remove([self.path / MANIFEST])
        remove(self.path / name for name in (CLUSTERS, FLAGS))
        if not is_remote(self.path):
            shutil.rmtree(self.path / EMBEDDINGS, ignore_errors=True)
        remove(reversed(self.shards()))

    def check_usable(self) -> None:
        """Raise ScorerError now where `locked` would raise it later, after a model is fetched."""
        self._check_directory()
        try:
            check_free(self.path / LOCK)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def _check_directory(self) -> None:
        """Raise ScorerError where the directory has files in it but is no run, or can't be written."""
        if not exists(self.path / LOCK) and list_folder(self.path):
            raise ScorerError(f"{self.path} is not a run directory, and not empty: choose another with -o")
        if not is_remote(self.path):
            check_folder(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory, and be its only writer while the block runs.

        Raises ScorerError where another process holds it, where the place can't be written, and where the directory
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
                for name in (MANIFEST, STDIN, "scores/part-*.parquet"):
                    remove_temporaries(self.path / name)
            except OSError as error:
                raise storage_error(self.path, error) from error
            yield

    def require_disk(self, work: str) -> None:
        """Raise ScorerError where the run is in object storage, and `work` maps its files into memory."""
        if is_remote(self.path):
            raise ScorerError(f"{self.path}: {work} needs a run directory on a disk: copy it to one first")

    def _shard(self, index: int) -> Path:
        return self.path / "scores" / f"part-{index:05d}.parquet"


def _is_manifest(content: Any) -> bool:
    if not isinstance(content, dict) or not {"state", "records", "inputs", "ranking", "identity"} <= content.keys():
        return False
    identity = content["identity"]
    return isinstance(identity, dict) and "shard_rows" in (identity.get("config") or {})


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Write a Parquet file, whole or not at all. Raises EngineError where the disk is full."""
    buffer = io.BytesIO()  # an error of Polars' own writer would not say that
    table.write_parquet(buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _number(shard: Path) -> int:
    return int(shard.stem.removeprefix("part-"))


def _shard_count(manifest: dict[str, Any]) -> int:
    return int(-(-manifest["records"] // manifest["identity"]["config"]["shard_rows"]))
