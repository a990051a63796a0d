"""Files that are whole or absent, on a disk and in object storage. Knows places and the operating system's errors;
nothing of what is written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scorer.storage.paths import DISK_FULL, exists, is_folder, is_remote, upload
from scorer.types import EngineError, ScorerError

SUFFIX = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, to be written; then flush it to the disk and rename it to `path`.

    Missing folders on the way to it are made. Where `path` is a symbolic link, all this is done to the file it leads
    to, and the link stays. Where it is an object, the temporary file is in the temporary folder and is uploaded at the
    end. If the block raises, the temporary file is removed and `path` stays as it was. An OSError becomes EngineError
    where the disk is full, and ScorerError where the path can't be written.
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
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):  # where even this fails, the error to see is the one that came before
            temporary.unlink()


def check_writable(path: Path) -> None:
    """Raise ScorerError unless a file can be made at `path`; folders on the way to it may be missing.

    An object store is not asked: it answers when something is written.
    """
    if is_remote(path):
        return
    if is_folder(path):
        raise ScorerError(f"{path}: is a folder; name a file")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Raise ScorerError unless the folder `path` is there or can be made, and can be written."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if exists(parent))
    if not is_folder(folder):
        where = str(path) if folder == path.absolute() else f"{path}: {folder}"
        raise ScorerError(f"{where} is a file, not a folder; choose another path")
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
    """Remove what killed processes left of `replacing(path)`, which nobody else is writing; its name may hold a `*`."""
    if is_remote(path):
        return
    for temporary in path.parent.glob(f".{path.name}.*{SUFFIX}"):
        temporary.unlink()


def storage_error(path: Path, error: OSError) -> ScorerError:
    """The error to raise instead of an OSError met while writing `path`."""
    if error.errno in DISK_FULL:
        return EngineError(f"{path}: the disk is full; free some space and run the same command again")
    return ScorerError(f"{path}: can't be written ({error.strerror or error})")


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
