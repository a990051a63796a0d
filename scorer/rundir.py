"""A run directory on disk: its manifest, its shards, its lock.

    RUN/manifest.json                configuration, inputs, model, versions, counts
    RUN/scores/part-00000.parquet    the score table of the first `shard_rows` records, and so on
    RUN/stdin.jsonl                  what was read from standard input, if it was an input

A shard is whole or absent, so what is absent is left to do. What a killed process left half written,
the next writer removes. Knows Parquet and JSON files; neither how
scores are made nor what they mean.
"""

from __future__ import annotations

import fcntl
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from scorer.atomic import remove_temporaries, replacing, storage_error
from scorer.types import ScorerError

MANIFEST = "manifest.json"
LOCK = ".lock"
STDIN = "stdin.jsonl"
SIDECARS = ("clusters.parquet", "flags.parquet")  # of the data that the scores are of


class Run:
    """A run directory. Reading it never changes it; what writes it holds `locked()`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest's content. Raises ScorerError where this is not a run directory."""
        try:
            manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ScorerError(f"{self.path} is not a run directory: it has no {MANIFEST}") from None
        except (OSError, ValueError) as error:
            raise ScorerError(f"{self.path / MANIFEST} can't be read ({error})") from error
        if not isinstance(manifest, dict) or "identity" not in manifest:
            raise ScorerError(f"{self.path / MANIFEST} is not the manifest of a run: name another directory")
        return manifest

    @property
    def complete(self) -> bool:
        """Whether every record has its row; not so where a shard was deleted since."""
        manifest = self.manifest
        return bool(manifest["state"] == "complete" and len(self.shards()) == _shard_count(manifest))

    def scores(self) -> pl.DataFrame:
        """The score table, one row a turn, in input order: the columns of `scorer.scores.SCHEMA`."""
        shards = self.shards()
        if not shards:
            raise ScorerError(f"{self.path} holds no scores yet: run `scorer score` to its end first")
        try:
            return pl.read_parquet(shards, glob=False, hive_partitioning=False)
        except pl.exceptions.PolarsError as error:
            raise ScorerError(f"{self.path}: a shard can't be read; score again with --fresh ({error})") from error

    def shards(self) -> list[Path]:
        """The whole shards, in order. Of an unfinished run some may be missing, wherever several workers score."""
        paths = (self.path / "scores").glob("part-*.parquet")
        return sorted(paths, key=lambda path: int(path.stem.removeprefix("part-")))

    def missing(self) -> list[int]:
        """The numbers of the shards that the manifest's records make and that are not there."""
        return [index for index in range(_shard_count(self.manifest)) if not self._shard(index).exists()]

    def write_shard(self, index: int, table: pl.DataFrame) -> None:
        """Write one shard. Raises EngineError where the disk is full."""
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        with replacing(self._shard(index)) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest."""
        with replacing(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def clear(self) -> None:
        """Remove the manifest, all shards and what was made of the data, so that the run starts over.

        The manifest goes first.
        """
        (self.path / MANIFEST).unlink(missing_ok=True)
        for name in SIDECARS:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "embeddings", ignore_errors=True)
        for shard in sorted((self.path / "scores").glob("part-*.parquet"), reverse=True):
            shard.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory, and be its only writer while the block runs; the lock dies with its holder.

        Raises ScorerError where another process holds it, where the place can't be written, and where the directory
        has files in it but is no run.
        """
        if self.path.is_dir() and not (self.path / LOCK).exists() and any(self.path.iterdir()):
            raise ScorerError(f"{self.path} is not a run directory, and not empty: choose another with -o")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("w")  # before all else: it is the mark of a run directory
        except OSError as error:
            raise storage_error(self.path, error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScorerError(
                    f"{self.path}: another process is writing this run; wait for it or choose another"
                ) from None
            try:
                (self.path / "scores").mkdir(exist_ok=True)
                for name in (MANIFEST, STDIN, "scores/part-*.parquet"):
                    remove_temporaries(self.path / name)
            except OSError as error:
                raise storage_error(self.path, error) from error
            yield

    def _shard(self, index: int) -> Path:
        return self.path / "scores" / f"part-{index:05d}.parquet"


def _shard_count(manifest: dict[str, Any]) -> int:
    return int(-(-manifest["records"] // manifest["identity"]["config"]["shard_rows"]))
