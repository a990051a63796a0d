"""Paths on a disk of this machine, and `s3://` URLs in object storage, which universal_pathlib makes act as paths.

Credentials, region and endpoint come from the environment, as for AWS's own tools; no URL holds any. An object appears
complete or not at all, and an upload that breaks off leaves nothing, so nothing is renamed in object storage.
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
PATTERN = set("*[")  # the characters that make a URL a pattern
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def to_path(path: str | Path) -> Path:
    """A pathlib.Path, or a UPath for an `s3://` URL.

    Raises ScorerError for other URLs, for no path at all and for one that is not UTF-8, and if s3fs is missing.
    """
    if not isinstance(path, str):
        return path
    if not path:  # which pathlib takes for the current folder
        raise ScorerError("a path is empty: name a file or a folder")
    try:
        path.encode()
    except UnicodeEncodeError as error:  # neither a manifest nor Polars and Arrow can hold such a name
        raise ScorerError(f"{path}: this name is not UTF-8; rename it, or the folder that has it") from error
    scheme, separator, rest = path.partition("://")
    if not separator:
        return Path(path)
    if scheme != SCHEME:
        raise ScorerError(f"{scheme}://: not supported; use a local path or s3://BUCKET/KEY")
    bucket = rest.partition("/")[0]
    if not bucket or set("@*?[") & set(bucket) or "?" in rest:
        raise ScorerError("s3://: write s3://BUCKET/KEY; credentials and endpoint belong in the environment")
    require("s3://")
    from upath import UPath

    # No cached listings: other processes write here too.
    return cast(Path, UPath(path.rstrip("/"), use_listings_cache=False))


def is_remote(path: Path) -> bool:
    """Whether the path is in object storage."""
    return not isinstance(path, Path)


def absolute(path: str | Path) -> str:
    """The path as an absolute path or URL. Symbolic links stay: their targets may have no suffix, as in a hub cache."""
    found = to_path(path)
    return str(found) if is_remote(found) else os.path.abspath(found)


def expand(path: str) -> list[str]:
    """The URLs that match a URL with a `*`, sorted; anything else as it is. Raises ScorerError if nothing matches."""
    found = to_path(path)
    if not is_remote(found) or not PATTERN & set(path) or exists(found):
        return [path]
    with store_errors(found):
        store, key = _store_and_key(found)
        keys = sorted(store.glob(key))
    if not keys:
        raise ScorerError(f"{path}: no object matches; check the bucket and the pattern")
    if odd := next((key for key in keys if "?" in key), None):
        raise ScorerError(f"{SCHEME}://{odd}: a URL can't contain a ?; rename the object")
    return [f"{SCHEME}://{key}" for key in keys]


def exists(path: Path) -> bool:
    """Whether there is such a file, folder or object."""
    with _read_errors(path):
        return path.exists()


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or any object under the URL."""
    with _read_errors(path):
        return path.is_dir()


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Like `store_errors`, and turn the OSError of a disk into ScorerError, such as a missing permission."""
    try:
        with store_errors(path):
            yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ScorerError(f"{path}: can't be read ({error.strerror or error})") from error


def list_folder(folder: Path) -> list[Path]:
    """The paths in a folder, in no order; empty if there is no such folder."""
    try:
        with _read_errors(folder):
            if not is_remote(folder):
                return list(folder.iterdir())
            store, key = _store_and_key(folder)
            keys = [found.rstrip("/") for found in store.ls(key, detail=False)]
        # S3 consoles represent an empty folder as an object with the folder's own name.
        return [folder / found.rpartition("/")[2] for found in keys if found != key.rstrip("/")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def object_info(path: Path) -> dict[str, Any]:
    """The store's metadata of an object: size (bytes), ETag and more. Raises ScorerError if there is no such object."""
    try:
        with store_errors(path):
            store, key = _store_and_key(path)
            info: dict[str, Any] = store.info(key)
    except FileNotFoundError as error:
        raise ScorerError(f"{path}: no such object; check the bucket and the key") from error
    if info["type"] != "file":
        raise ScorerError(f"{path}: is a folder; name the objects in it, or write {path}/*.jsonl")
    return info


def _store_and_key(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote path, and BUCKET/KEY."""
    return path.fs, str(path.path)  # type: ignore[attr-defined]


def remove(files: Iterable[Path]) -> None:
    """Remove the files that exist; in object storage, many per request."""
    for folder, group in groupby(files, lambda file: file.parent):
        if not is_remote(folder):
            for file in group:
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:  # such as a folder in a file's place
                    raise ScorerError(f"{file}: can't be removed ({error.strerror}); remove it yourself") from error
            continue
        present = set(list_folder(folder))
        with store_errors(folder):
            store, keys = _store_and_key(folder)[0], [_store_and_key(file)[1] for file in group if file in present]
            if keys and not PATTERN & set(keys[0]):
                store.rm(keys)
            else:  # `rm` would expand them as patterns
                for key in keys:
                    store.rm_file(key)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """The path of a file on this machine's disk; for an object, of a temporary copy while the block runs."""
    with local_copies([path]) as (file,):
        yield file


@contextmanager
def local_copies(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Like `local_copy`, for files of one folder."""
    if not files or not is_remote(files[0]):
        yield list(files)
        return
    with tempfile.TemporaryDirectory(prefix="scorer-") as folder:
        copies = [Path(folder, file.name) for file in files]
        try:
            with store_errors(files[0].parent):
                keys = [_store_and_key(file)[1] for file in files]
                _store_and_key(files[0])[0].get(keys, list(map(str, copies)))
        except FileNotFoundError as error:
            raise ScorerError(f"{files[0].parent}: an object is gone ({_error_text(error)})") from error
        yield copies


def upload(file: Path, path: Path) -> None:
    """Upload a local file to the object `path`. The object appears at the end, even if it is uploaded in parts."""
    with store_errors(path):
        store, key = _store_and_key(path)
        store.put_file(str(file), key)


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a store into ScorerError if it refuses access, EngineError if it fails or can't be reached.

    FileNotFoundError, NotADirectoryError and the errors of a disk pass.
    """
    if not is_remote(path):
        yield
        return
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError, ProfileNotFound

    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (PermissionError, NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        help = "check the bucket and the credentials in the environment"
        raise ScorerError(f"{path}: the store refuses access ({_error_text(error)}); {help}") from error
    except (OSError, BotoCoreError, ClientError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            folder = tempfile.gettempdir()
            raise EngineError(f"{folder}: the disk is full; free some space or set TMPDIR, and run it again") from error
        raise EngineError(f"{path}: the store fails ({_error_text(error)}); the same command resumes") from error


def _error_text(error: Exception) -> str:
    """The error's text, without the XML document that a store may answer with, which contains keys."""
    return " ".join(str(error).partition("<")[0].split())[:200]
