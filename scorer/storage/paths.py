"""Where files are: on a disk of this machine, or in object storage under an `s3://` URL.

A place has pathlib's methods either way (universal_pathlib over s3fs for a URL). Credentials, region and endpoint are
those of the environment, as AWS's own tools take them: no URL holds any. An object appears whole or not at all, and
an upload that is cut off leaves nothing to see, so nothing is ever renamed there. Knows stores and what they raise;
nothing of what is kept in them.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from scorer.requirements import require
from scorer.types import EngineError, ScorerError

SCHEME = "s3"
PATTERN = "*["  # what makes a name one
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk


def to_path(where: str | Path) -> Path:
    """A path, or of an `s3://` URL what acts as one. Raises ScorerError for other URLs, and where s3fs is missing."""
    if not isinstance(where, str):
        return where
    scheme, colons, rest = where.partition("://")
    if not colons:
        return Path(where)
    if scheme != SCHEME:
        raise ScorerError(f"{scheme}://: is no place for data; name a file of this machine, or s3://BUCKET/KEY")
    bucket = rest.partition("/")[0]
    if not bucket or set("@*?[") & set(bucket) or "?" in rest:
        raise ScorerError("s3://: write s3://BUCKET/KEY; credentials and endpoint belong in the environment")
    require("s3://")
    from upath import UPath

    # Listings are not kept: other processes write here too.
    return cast(Path, UPath(where.rstrip("/"), use_listings_cache=False))


def is_remote(where: Path) -> bool:
    """Whether a place is in object storage."""
    return not isinstance(where, Path)


def absolute(where: str | Path) -> str:
    """The name of a place that holds in every folder and on every machine that sees it.

    Links stay: what they lead to may have no suffix, as in a hub's cache.
    """
    found = to_path(where)
    return str(found) if is_remote(found) else os.path.abspath(found)


def expand(where: str) -> list[str]:
    """What a URL with a `*` stands for, sorted; anything else is itself: of local files the shell does it.

    Raises ScorerError where nothing matches.
    """
    found = to_path(where)
    if not is_remote(found) or not set(PATTERN) & set(where) or exists(found):
        return [where]
    with store_errors(found):
        objects = sorted(_store(found).glob(_key(found)))
    if not objects:
        raise ScorerError(f"{where}: nothing there has such a name; check the bucket and the pattern")
    if odd := next((name for name in objects if "?" in name), None):
        raise ScorerError(f"{SCHEME}://{odd}: a key with a ? can't be named in a URL; rename the object")
    return [f"{SCHEME}://{name}" for name in objects]


def exists(where: Path) -> bool:
    """Whether there is such a file, folder or object."""
    with _read_errors(where):
        return where.exists()


def is_folder(where: Path) -> bool:
    """Whether there is a folder, or any object under the URL."""
    with _read_errors(where):
        return where.is_dir()


@contextmanager
def _read_errors(where: Path) -> Iterator[None]:
    """As `store_errors`, and ScorerError where a disk doesn't let this user look, or knows no such names."""
    try:
        with store_errors(where):
            yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ScorerError(f"{where}: can't be read ({error.strerror or error})") from error


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder, in no order; nothing where there is no such folder."""
    try:
        with _read_errors(folder):
            if not is_remote(folder):
                return list(folder.iterdir())
            names = [name.rstrip("/") for name in _store(folder).ls(_key(folder), detail=False)]
        # An object of the folder's own name is what consoles make of an empty folder.
        return [folder / name.rpartition("/")[2] for name in names if name != _key(folder).rstrip("/")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def object_info(where: Path) -> dict[str, Any]:
    """What the store knows of an object: size (bytes), ETag and more. Raises ScorerError where there is none."""
    try:
        with store_errors(where):
            known: dict[str, Any] = _store(where).info(_key(where))
    except FileNotFoundError as error:
        raise ScorerError(f"{where}: no such object; check the bucket and the key") from error
    if known["type"] != "file":
        raise ScorerError(f"{where}: is a folder; name the objects in it, or write {where}/*.jsonl")
    return known


def _store(where: Path) -> Any:
    """The fsspec file system of a remote place, which calls the place by its `_key`."""
    return where.fs  # type: ignore[attr-defined]


def _key(where: Path) -> str:
    """BUCKET/KEY."""
    return str(where.path)  # type: ignore[attr-defined]


def remove(files: Iterable[Path]) -> None:
    """Remove files, those that are there; of a store many in one request."""
    for folder, group in groupby(files, lambda file: file.parent):
        if not is_remote(folder):
            for file in group:
                file.unlink(missing_ok=True)
            continue
        there = set(list_folder(folder))
        names = [_key(file) for file in group if file in there]
        with store_errors(folder):
            if names and not set(PATTERN) & set(names[0]):
                _store(folder).rm(names)
            else:  # which `rm` would take for a pattern
                for name in names:
                    _store(folder).rm_file(name)


@contextmanager
def local_copy(where: Path) -> Iterator[Path]:
    """A file on this machine's disk: itself, or of an object a copy in the temporary folder while the block runs."""
    with local_copies([where]) as (file,):
        yield file


@contextmanager
def local_copies(files: Sequence[Path]) -> Iterator[list[Path]]:
    """The files of one folder on this machine's disk, as `local_copy` gives one."""
    if not files or not is_remote(files[0]):
        yield list(files)
        return
    with tempfile.TemporaryDirectory(prefix="scorer-") as folder:
        copies = [Path(folder, file.name) for file in files]
        try:
            with store_errors(files[0].parent):
                names = [_key(file) for file in files]
                _store(files[0]).get(names, list(map(str, copies)))
        except FileNotFoundError as error:
            raise ScorerError(f"{files[0].parent}: an object is gone ({_error_text(error)})") from error
        yield copies


def upload(file: Path, where: Path) -> None:
    """Make a local file's content the object `where`: in one request, or in parts that appear together at the end."""
    with store_errors(where):
        _store(where).put_file(str(file), _key(where))


@contextmanager
def store_errors(where: Path) -> Iterator[None]:
    """Turn what a store raises into an error for the user; what is not there, and a disk's errors, pass.

    ScorerError where the store refuses, EngineError where it fails or can't be reached.
    """
    if not is_remote(where):
        yield
        return
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError, ProfileNotFound

    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (PermissionError, NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise ScorerError(
            f"{where}: the store refuses access ({_error_text(error)}); "
            "check the bucket and the credentials in the environment"
        ) from error
    except (OSError, BotoCoreError, ClientError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            folder = tempfile.gettempdir()
            raise EngineError(f"{folder}: the disk is full; free some space or set TMPDIR, and run it again") from error
        raise EngineError(f"{where}: the store fails ({_error_text(error)}); the same command resumes") from error


def _error_text(error: Exception) -> str:
    """What an error says, without the document that a store's answer may hold: it names keys."""
    return " ".join(str(error).partition("<")[0].split())[:200]
