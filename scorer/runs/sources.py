"""What a run is given as data -> the Dataset of its files. What is no file is kept as one, in the run directory.

So resuming and selecting find standard input, and data in memory, again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from scorer.config import Part, ScoreConfig
from scorer.data.dataset import Dataset, inspect_input
from scorer.files import memory
from scorer.files.inputs import input_files
from scorer.runs.directory import COPIES, STDIN
from scorer.runs.writer import RunWriter
from scorer.storage.atomic import replacing
from scorer.storage.paths import exists, local_copy
from scorer.types import ScorerError

RUNS = Path("scorer-runs")  # of runs whose directory is not named


def open_dataset(data: Any, output: str | Path | None, config: ScoreConfig, part: Part, *, fresh: bool) -> Dataset:
    """The Dataset of `data`, of any kind that `scorer.score` takes.

    Raises ScorerError where a file can't be found or read, and where a copy can't be kept.
    """
    if memory.is_in_memory(data) and part != Part():
        raise ScorerError("split, subset: data in memory has no parts; choose one before")
    if isinstance(data, Dataset):
        if (data.reading, data.limit) != (config.reading, config.limit):
            raise ScorerError(
                "columns, reasoning, limit and others: a Dataset has its own; give the same, or its files"
            )
        return data
    if memory.is_in_memory(data):
        paths = [_keep_rows(data, output, fresh)]
    else:
        paths = spool(files_of(data, part), output, fresh=fresh)
    return Dataset(paths, reading=config.reading, limit=config.limit)


def files_of(data: str | Path | Sequence[str | Path], part: Part) -> list[str]:
    """The files that a path or several mean. Raises ScorerError as `input_files` does, and for none."""
    paths = [data] if isinstance(data, str | Path) else data
    found = [file for path in paths for file in input_files(str(path), split=part.split, subset=part.subset)]
    if not found:
        raise ScorerError("no data: give a file, or - for standard input; in Python also rows or a table")
    return found


def spool(paths: Sequence[str], output: str | Path | None, *, fresh: bool) -> list[str]:
    """The paths, with standard input's copy in the run directory `output` in the place of "-".

    Raises ScorerError where standard input can't be read, or the directory can't hold it.
    """
    if "-" not in paths:
        return list(paths)
    if output is None:
        raise ScorerError("data from standard input needs an output directory, which keeps a copy of it")
    if paths.count("-") > 1:
        raise ScorerError("-: standard input can be read once only; name it once")
    if sys.stdin is None:
        raise ScorerError("-: standard input is closed")
    stream = sys.stdin.buffer
    copy = _keep(RunWriter(output), STDIN, lambda file: shutil.copyfileobj(stream, file), "standard input", fresh)
    return [copy if path == "-" else path for path in paths]


def _keep_rows(data: Any, output: str | Path | None, fresh: bool) -> str:
    suffix = memory.suffix_of(data)
    if output is not None:
        name = next(name for name in COPIES if name.endswith(suffix) and name != STDIN)
        return _keep(RunWriter(output), name, lambda file: memory.write(data, file), "data", fresh)
    RUNS.mkdir(exist_ok=True)
    temporary = RUNS / f".data-{os.getpid()}{suffix}"
    try:
        with open(temporary, "w+b") as file:
            memory.write(data, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = RUNS / f"data-{digest[:12]}{suffix}"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return str(path)


def _keep(run: RunWriter, name: str, write: Callable[[BinaryIO], Any], what: str, fresh: bool) -> str:
    """Keep a copy of what `write` writes in the run directory.

    Raises ScorerError where the directory holds a run of another, whose copy stays as it is.
    """
    path = run.path / name
    with run.locked():
        kept = None
        if run.shards() and exists(path) and not fresh:
            with local_copy(path) as copy:
                kept = inspect_input(copy).sha256
        with replacing(path) as temporary, temporary.open("w+b") as file:
            write(file)
            file.seek(0)
            if kept not in (None, hashlib.file_digest(file, "sha256").hexdigest()):
                raise ScorerError(
                    f"{run.path} holds a run of other {what}: give the same again, or use --fresh or another -o"
                )
    return str(path)
