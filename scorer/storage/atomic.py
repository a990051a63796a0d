"""Atomic writes: a file is complete or absent, on a disk and in object storage. Pipes and devices are written last."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scorer.storage.paths import DISK_FULL, exists, is_folder, is_remote, upload
from scorer.types import EngineError, ScorerError

SUFFIX = ".tmp"
MAX_NAME = 50  # characters of a file's name in that of its temporary file: file systems allow 255 bytes
MAX_LINKS = 40  # as Linux follows


@contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new, empty file beside `path` for the block to write, then rename it to `path`, whose mode it takes.

    folder: yield a new folder; at `path` may be nothing, or an empty folder. Makes missing parent folders. If `path` is
    a symbolic link, its target is replaced. An object, a pipe and a device are written whole when the block ends, from
    a file in the temporary folder. If the block raises, `path` stays as it was. Raises EngineError if the disk is full,
    ScorerError if `path` can't be written, and BrokenPipeError if nothing reads the pipe.
    """
    send = upload if is_remote(path) else _write_through if is_stream(path) else None
    if send is not None:
        with _sending(path, send) as temporary:
            yield temporary
        return
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    # No other user can guess the name, and have something there.
    temporary = target.with_name(f".{target.name[:MAX_NAME]}.{secrets.token_hex(8)}{SUFFIX}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        before = None if folder else replaced(target)
        if folder:
            temporary.mkdir()
        else:
            new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            os.close(os.open(temporary, new, 0o666 if before is None else 0o600))
        yield temporary
        for made in temporary.rglob("*"):
            sync(made)
        if before is not None:
            temporary.chmod(_owned_as(temporary, before))
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):  # keep the exception of the block
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def _owned_as(file: Path, before: os.stat_result) -> int:
    """Give a file the owner and the group of another as far as this user may, and return the mode it can then have."""
    mode = before.st_mode & 0o777
    with suppress(OSError):  # only root may give a file away
        os.chown(file, before.st_uid, -1)
    try:
        os.chown(file, -1, before.st_gid)
    except OSError:  # the mode was meant for a group that this user is not in
        mode &= ~0o070
    return mode


def replaced(target: Path) -> os.stat_result | None:
    """What a new file at `target` replaces, if anything. Raises ScorerError where it is no file, or no name of one."""
    try:
        found = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(target, error) from error
    if stat.S_ISDIR(found.st_mode):
        raise ScorerError(f"{target}: is a folder; name a file")
    if not stat.S_ISREG(found.st_mode):
        raise ScorerError(f"{target}: is a block device or a socket; name a file")
    return found


def check_folder(path: Path) -> None:
    """Raise ScorerError unless the folder `path` exists or can be made, and is writable."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if exists(parent))
    if not is_folder(folder):
        name = path if folder == path.absolute() else f"{path}: {folder}"
        raise ScorerError(f"{name} is a file, not a folder; choose another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ScorerError(f"{path}: you can't write in {folder}; choose another path")


def is_stream(path: Path) -> bool:
    """Whether bytes written to a path go elsewhere: a pipe, a device such as /dev/null, an open file as /dev/stdout."""
    if is_remote(path):
        return False
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # nothing is there, or no name of a file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or _descriptor(path) is not None


def _descriptor(path: Path) -> int | None:
    """The number of the open file of this process that a path such as /dev/stdout or /dev/fd/3 means."""
    place = os.path.abspath(path)
    for _ in range(MAX_LINKS):
        folder = os.path.realpath(os.path.dirname(place))
        place = os.path.join(folder, os.path.basename(place))
        if re.fullmatch(rf"/dev/fd|/proc/{os.getpid()}(/task/\d+)?/fd", folder):
            return int(os.path.basename(place))
        if not os.path.islink(place):
            break
        place = os.path.join(folder, os.readlink(place))
    return None


def _write_through(file: Path, stream: Path) -> None:
    """Write what is in `file` to a pipe or a device. An open file is written where it stands, and not cut."""
    number = _descriptor(stream)
    opened = os.open(stream, os.O_WRONLY) if number is None else os.dup(number)
    with open(opened, "wb") as target, file.open("rb") as source:
        shutil.copyfileobj(source, target)


@contextmanager
def _sending(path: Path, send: Callable[[Path, Path], None]) -> Iterator[Path]:
    """Yield a path in the temporary folder for the block to write, then send the file to `path`."""
    with tempfile.TemporaryDirectory(prefix="scorer-") as folder:
        temporary = Path(folder, path.name)
        try:
            yield temporary
        except OSError as error:
            raise storage_error(temporary, error) from error
        try:
            send(temporary, path)
        except BrokenPipeError:
            raise
        except FileNotFoundError as error:
            what = "there is no such bucket; create it" if is_remote(path) else "is gone"
            raise ScorerError(f"{path}: {what}") from error
        except OSError as error:
            raise storage_error(path, error) from error


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
