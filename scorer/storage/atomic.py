"""Atomic writes: a file is complete or absent, on a disk and in object storage."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scorer.storage.paths import DISK_FULL, exists, is_folder, is_remote, upload
from scorer.types import EngineError, ScorerError

SUFFIX = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file for the block to write, then rename the file to `path`.

    The block may make a folder instead, if there is nothing at `path`, or an empty folder. Makes missing parent
    folders. If `path` is a symbolic link, its target is replaced; if it is an object, the file is uploaded. If the
    block raises, `path` stays as it was. Raises EngineError if the disk is full, ScorerError if `path` can't be
    written.
    """
    if is_remote(path):
        with _uploading(path) as temporary:
            yield temporary
        return
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = target.with_name(f".{target.name}.{os.getpid()}{SUFFIX}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for made in temporary.rglob("*"):
            sync(made)
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):  # keep the exception of the block
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def check_writable(path: Path) -> None:
    """Raise ScorerError unless a file can be made at `path`; parent folders may be missing. Objects are not checked."""
    if not is_remote(path):
        if is_folder(path):
            raise ScorerError(f"{path}: is a folder; name a file")
        check_folder(path.parent)


def check_new_folder(path: Path) -> None:
    """Raise ScorerError unless a folder can be made at `path`, where nothing or an empty folder may be."""
    if is_remote(path):
        raise ScorerError(f"{path}: a folder can't be written to object storage whole; write to .parquet")
    if exists(path) and (not is_folder(path) or any(path.iterdir())):
        raise ScorerError(f"{path}: is there already; remove it, or name another folder")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Raise ScorerError unless the folder `path` exists or can be made, and is writable."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if exists(parent))
    if not is_folder(folder):
        name = path if folder == path.absolute() else f"{path}: {folder}"
        raise ScorerError(f"{name} is a file, not a folder; choose another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ScorerError(f"{path}: you can't write in {folder}; choose another path")


@contextmanager
def _uploading(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="scorer-") as folder:
        temporary = Path(folder, path.name)
        try:
            yield temporary
        except OSError as error:
            raise storage_error(temporary, error) from error
        try:
            upload(temporary, path)
        except FileNotFoundError as error:
            raise ScorerError(f"{path}: there is no such bucket; create it") from error


def remove_temporaries(path: Path) -> None:
    """Remove the temporary files of killed processes; `path` may be a pattern. No other process may be writing it."""
    if not is_remote(path):
        for temporary in path.parent.glob(f".{path.name}.*{SUFFIX}"):
            temporary.unlink()


def storage_error(path: Path, error: OSError) -> ScorerError:
    """The error to raise for an OSError from writing `path`."""
    if error.errno in DISK_FULL:
        return EngineError(f"{path}: the disk is full; free some space and run the same command again")
    return ScorerError(f"{path}: can't be written ({error.strerror or error})")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
