"""The SHA-256 of files, remembered between commands, so that gigabytes are read once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from scorer.storage.atomic import replacing
from scorer.types import ScorerError

Report = Callable[[str], None]
MEMO = "digests.json"  # in the cache: the path of a file -> what the file system says of it, and its SHA-256
SMALL_BYTES = 8 << 20  # a file up to this size is read each time
LONG_BYTES = 2 << 30  # reading more than this is reported
SETTLED_NS = 2_000_000_000  # a younger file may change again within one tick of its file system's clock
THREADS = 8  # hashlib computes without Python's lock


def cache_dir() -> Path:
    """The folder of the cache: $SCORER_CACHE, else $XDG_CACHE_HOME/scorer, else ~/.cache/scorer."""
    if path := os.environ.get("SCORER_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scorer"


def digest(folder: Path, files: Sequence[Path], report: Report | None = None) -> str:
    """SHA-256 over the names and the whole contents of files in a folder. Raises ScorerError as `listing`."""
    return f"sha256:{hashlib.sha256(json.dumps(listing(folder, files, report)).encode()).hexdigest()}"


def listing(folder: Path, files: Sequence[Path], report: Report | None = None) -> dict[str, str]:
    """The path of each file in the folder, and the SHA-256 of its whole content in hex.

    That of a large file is taken from the memo, if its size, times and inode are those that it had when it was read. A
    memo that can't be read or written is no error. Raises ScorerError for a file that can't be read.
    """
    now, memo = time.time_ns(), _read_memo()
    states = {os.path.abspath(file): _state(file) for file in files}
    known = {path: memo[path][1] for path, state in states.items() if path in memo and memo[path][0] == state}
    unknown = [path for path in states if path not in known]
    if report and (total := sum(states[path][0] for path in unknown)) > LONG_BYTES:
        report(f"reading {total / 1e9:.1f} GB of {folder} once, to identify the model")
    with ThreadPoolExecutor(THREADS) as pool:
        known |= zip(unknown, pool.map(_sha256, map(Path, unknown)), strict=True)
    settled = now - SETTLED_NS
    new = {
        path: [states[path], known[path]]
        for path in unknown
        if states[path][0] > SMALL_BYTES and max(states[path][1:3]) < settled and _state(Path(path)) == states[path]
    }
    if new:
        _write_memo(memo | new)
    return {file.relative_to(folder).as_posix(): known[path] for file, path in zip(files, states, strict=True)}


def _state(path: Path) -> list[int]:
    """Size, times and inode of a file. Unlike the time of modification, a program can't set that of the last change."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ScorerError(f"{path}: can't be read ({error.strerror})") from error
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ScorerError(f"{path}: can't be read ({error.strerror})") from error


def _read_memo() -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        memo = json.loads((cache_dir() / MEMO).read_text("utf-8"))
        if isinstance(memo, dict):
            return {path: entry for path, entry in memo.items() if isinstance(entry, list) and len(entry) == 2}
    return {}


def _write_memo(memo: dict[str, Any]) -> None:
    """Write the memo, without the entries of files that are gone or have changed."""
    with suppress(OSError, ScorerError):
        current = {}
        for path, entry in memo.items():
            with suppress(ScorerError):
                if _state(Path(path)) == entry[0]:
                    current[path] = entry
        with replacing(cache_dir() / MEMO) as temporary:
            temporary.write_text(json.dumps(current, indent=1), "utf-8")
