"""Whether a file may be written where a user names one, asked before any work: every output is checked here."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

from scorer.storage.atomic import check_folder, is_stream, replaced
from scorer.storage.paths import exists, is_folder, is_remote
from scorer.types import ScorerError

RUN_PARTS = ("manifest.json", "scores", ".lock")  # a run directory has two of these: copies may lack the last
# What belongs to a run; other files in its directory are the user's.
RUN_FILES = ("manifest.json", ".lock", "stdin.jsonl", "data.*", "clusters.parquet", "flags.parquet")
RUN_FOLDERS = ("scores", "embeddings", "epoch-*", "checkpoints")


def check_writable(path: Path) -> None:
    """Raise ScorerError unless a file can be made at `path`; parent folders may be missing.

    A pipe and a device such as /dev/null can be written to. What belongs to a run directory can't be replaced. Whether
    a store takes an object is not checked.
    """
    check_outside_runs(path)
    if is_remote(path):
        return
    if is_stream(path):
        if not os.access(path, os.W_OK):
            raise ScorerError(f"{path}: you can't write to it; choose another path")
        return
    replaced(path)
    check_folder(path.parent)


def check_new_folder(path: Path) -> None:
    """Raise ScorerError unless a folder can be made at `path`, where nothing or an empty folder may be."""
    if is_remote(path):
        raise ScorerError(f"{path}: a folder can't be written to object storage whole; write to .parquet")
    check_outside_runs(path)
    if exists(path) and (not is_folder(path) or any(path.iterdir())):
        raise ScorerError(f"{path}: is there already; remove it, or name another folder")
    check_folder(path.parent)


def check_outside_runs(path: Path, future: Path | None = None) -> None:
    """Raise ScorerError where `path`, links followed, is one of the files or folders of a run, or in such a folder.

    future: a folder that is to become a run.
    """
    place, run = _followed(path), None if future is None else _followed(future)
    for inner in (place, *place.parents):
        names = (*RUN_FILES, *RUN_FOLDERS) if inner == place else RUN_FOLDERS
        if any(fnmatchcase(inner.name, name) for name in names) and (inner.parent == run or is_run(inner.parent)):
            raise ScorerError(f"{path}: would replace a part of the run {inner.parent}; write to another file")


def is_run(folder: Path) -> bool:
    return sum(exists(folder / part) for part in RUN_PARTS) >= 2


def _followed(path: Path) -> Path:
    return path if is_remote(path) else Path(os.path.realpath(path))
