"""Writing a run directory: its lock, its shards, its manifest, and starting over."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import polars as pl

from scorer.runs.directory import CLUSTERS, COPIES, EMBEDDINGS, FLAGS, LOCK, MANIFEST, Run, write_table
from scorer.runs.manifest import Manifest
from scorer.storage.atomic import check_folder, remove_temporaries, replacing, storage_error
from scorer.storage.lock import check_free, locked
from scorer.storage.paths import exists, is_remote, list_folder, remove
from scorer.types import ScorerError


class RunWriter(Run):
    """A run directory that is written. All but `check_usable` and `locked` are called while `locked` is held."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._check: Callable[[], None] = lambda: None

    def remove_partial_shard(self) -> bool:
        """Remove the last shard if it has fewer records than the others, so that more can be added. Whether it had."""
        index, records = divmod(self.manifest.records, self.manifest.config["shard_rows"])
        partial = bool(records) and index not in self.missing()
        if partial:
            self._check()
            remove([self.shard(index)])
        return partial

    def write_shard(self, index: int, table: pl.DataFrame) -> None:
        """Write one shard. Raises EngineError where the disk is full, ScorerError where the run's lock was lost."""
        self._check()
        write_table(self.shard(index), table)

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
        if not exists(self.path / LOCK) and list_folder(self.path):
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
