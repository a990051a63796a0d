"""The folder of a validation.

    OUT/validation.json               what is validated, and when it is done the results
    OUT/holdout.jsonl                 the held-out records, as samples
    OUT/arms/NAME-SEED/train.jsonl    what is trained on, in the form that TRL reads
    OUT/arms/NAME-SEED/nll.parquet    the NLL of each held-out record; an arm that has it is not trained again
    OUT/arms/NAME-SEED/answers.parquet    its model's answers to prompts, for the judge
    OUT/arms/NAME-SEED/arm.json       which training this is; checkpoints/ and model/ while they are needed
    OUT/arms/untrained/               the NLL by the target as it was
    OUT/verdicts/                     see scorer.validation.verdicts

Knows files; neither models nor statistics.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from scorer.runs.manifest import differences
from scorer.runs.shard_file import ShardInfo, read_info, write_shard_file
from scorer.storage.atomic import SUFFIX, check_folder, replacing
from scorer.storage.lock import locked
from scorer.storage.outputs import check_outside_runs
from scorer.storage.paths import exists, is_remote, list_folder, to_path
from scorer.types import ScorerError

VALIDATION = "validation.json"
VERSION = 1
LOCK = ".lock"
Json = Mapping[str, Any]


class ValidationFolder:
    """The folder `path`. Raises ScorerError where it can't be one."""

    def __init__(self, path: str | Path):
        self.path = to_path(path)
        if is_remote(self.path):
            raise ScorerError(f"{self.path}: models are trained in it; name a folder on a disk")
        check_outside_runs(self.path)
        check_folder(self.path)
        if not self._is_ours():
            raise ScorerError(f"{self.path} is no folder of a validation, and not empty: choose another with -o")

    def _is_ours(self) -> bool:
        """Whether nothing is lost that is not ours, where the folder is cleared."""
        if any(self.path.glob("arms/*/arm.json")) or all(path.name.startswith(".") for path in list_folder(self.path)):
            return True
        try:
            return "identity" in read_validation(self.path)
        except ScorerError:
            return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and be its only writer while the block runs."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / LOCK):
            for left in (*self.path.glob(f".*{SUFFIX}"), *self.path.glob(f"arms/.*{SUFFIX}")):  # by a killed process
                _remove(left)
            yield

    def begin(self, identity: Json, *, fresh: bool) -> None:
        """Say what is validated, after what is there is discarded if `fresh`.

        Raises ScorerError where the folder holds another validation.
        """
        for name in ("arms", "verdicts", VALIDATION, "holdout.jsonl") if fresh else ():
            _discard(self.path / name)
        known = read_validation(self.path)["identity"] if exists(self.path / VALIDATION) else identity
        if changes := differences(known, identity):
            raise ScorerError(
                f"{self.path} holds another validation ({'; '.join(changes)}): use --fresh to discard it, or another -o"
            )
        self._write({"version": VERSION, "identity": identity, "results": None})

    def finish(self, facts: Json, results: Json) -> None:
        """Write the results."""
        identity = read_validation(self.path)["identity"]
        self._write({"version": VERSION, **facts, "results": results, "identity": identity})

    def _write(self, content: Json) -> None:
        with replacing(self.path / VALIDATION) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class ArmFolder:
    """The folder of one training, `fingerprint`. What another training left there is discarded."""

    def __init__(self, path: Path, fingerprint: str):
        self.path, self.fingerprint = path, fingerprint
        self.model, self.checkpoints = path / "model", path / "checkpoints"
        mark, content = path / "arm.json", json.dumps({"fingerprint": fingerprint})
        known = mark.read_bytes() if mark.is_file() else None
        self.replaced = known is not None and known != content.encode()
        if known != content.encode():
            _discard(path)
        with replacing(mark) as temporary:
            temporary.write_text(content, encoding="utf-8")
        for left in path.glob(f".*{SUFFIX}"):  # by a killed process
            _remove(left)

    def read(self, name: str) -> pl.DataFrame | None:
        """A table of this training; None where there is none, or not as it was written."""
        path = self.path / name
        try:
            if read_info(path).run_id == self.fingerprint:
                return pl.read_parquet(path, glob=False, hive_partitioning=False)
        except (OSError, ValueError, pl.exceptions.PolarsError):
            pass
        return None

    def write(self, name: str, table: pl.DataFrame, seconds: float) -> None:
        """Write a table. seconds: that it took to make it."""
        rows = table.height
        info = ShardInfo(run_id=self.fingerprint, index=0, records=rows, rows=rows, seconds=round(seconds, 3))
        write_shard_file(self.path / name, table, info)

    def remove_model(self) -> None:
        """Remove what is large."""
        for path in (self.model, self.checkpoints):
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a file or a folder; of one that is partly removed when this is killed, nothing is used."""
    if os.path.lexists(path):
        old = path.with_name(f".{path.name}.old{SUFFIX}")
        _remove(old)
        path.rename(old)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Json]) -> None:
    """Write rows as JSON Lines."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_validation(folder: Path) -> dict[str, Any]:
    """The content of validation.json. Raises ScorerError where there is none, or it can't be read."""
    path = folder / VALIDATION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("version") == VERSION and isinstance(content["identity"], dict):
            return content
        raise ValueError("it is not of this version of scorer")
    except FileNotFoundError:
        raise ScorerError(f"{folder} is no folder of a validation: it has no {VALIDATION}") from None
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ScorerError(f"{path} can't be read ({error}): restore it, or use --fresh") from error
