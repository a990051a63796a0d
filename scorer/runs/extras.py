"""The files beside a run's scores: clusters, embeddings and flags, by record id.

    RUN/clusters.parquet                record_id Int64, cluster Int64
    RUN/embeddings/part-00000.npy ...   float32 [n, d], rows of length 1, in the order of record_id
    RUN/flags.parquet                   record_id Int64, Boolean columns

scorer.clusters writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from scorer.faults import first_line
from scorer.runs.directory import CLUSTERS, EMBEDDINGS, MANIFEST, Run
from scorer.runs.shard_file import read_info
from scorer.storage.paths import exists, local_copy
from scorer.types import ScorerError

DIGESTS = "sha256"  # in the manifest of the embeddings: by the name of a part


def has_clusters(run: Run) -> bool:
    """Whether the run was clustered."""
    return exists(run.path / CLUSTERS)


def clusters(run: Run) -> pl.DataFrame:
    """record_id Int64, group Int64. Raises ScorerError where the run was not clustered."""
    return read_extra(run, CLUSTERS, ["cluster"]).rename({"cluster": "group"})


def embedding_parts(run: Run) -> list[Any]:
    """The embeddings of all records, float32 [n, d] a part, mapped into memory.

    Raises ScorerError where the run has none, or not one of every record.
    """
    run.require_disk("choosing by embeddings")
    folder, parts = run.path / EMBEDDINGS, list[Any]()
    digests = read_embeddings_manifest(folder).get(DIGESTS, {})
    while (path := folder / f"part-{len(parts):05d}.npy").exists():
        if not is_whole(path, digests):
            raise ScorerError(f"{path} is not what was written: run `scorer cluster {run.path}` again")
        parts.append(np.load(path, mmap_mode="r"))
    count, records = sum(map(len, parts)), run.manifest.records
    if not parts or count != records:
        held = f"holds {count:,} of {records:,}" if parts else "has no"
        raise ScorerError(f"{run.path} {held} embeddings: run `scorer cluster {run.path}` first")
    return parts


def read_embeddings_manifest(folder: Path) -> dict[str, Any]:
    """What the folder's manifest says; empty where there is none. Raises ScorerError where it can't be read."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        raise ValueError("it is no JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ScorerError(f"{path} can't be read ({first_line(error)}): use `scorer cluster --fresh`") from error


def is_whole(part: Path, digests: Mapping[str, str]) -> bool:
    """Whether a part of the embeddings is there as it was written."""
    if part.name not in digests or not part.is_file():
        return False
    with part.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digests[part.name]


def embeddings(parts: Sequence[Any], ids: pl.Series) -> npt.NDArray[np.float32]:
    """The embeddings [len(ids), d] of the records `ids` (ascending); no others are held in memory."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    wanted = ids.to_numpy()
    bounds = np.searchsorted(wanted, np.concatenate([[0], ends]))
    rows = np.empty((len(wanted), parts[0].shape[1]), dtype=np.float32)
    for part, a, b, end in zip(parts, bounds, bounds[1:], ends, strict=False):
        rows[a:b] = part[wanted[a:b] - (end - len(part))]
    return rows


def read_extra(run: Run, name: str, columns: list[str], option: str = "") -> pl.DataFrame:
    """record_id and `columns` of a table that `scorer cluster`, with `option`, writes into the run directory.

    Raises ScorerError where it is absent or can't be read.
    """
    path, command = run.path / name, f"`scorer cluster {run.path}{option}`"
    if not exists(path):
        raise ScorerError(f"{path}: no such file; make it with {command}")
    try:
        with local_copy(path) as file:
            info, known = read_info(file), run.manifest
            if (info.run_id, info.records) != (known.run_id, known.records):
                raise ValueError("it is of another run, or of fewer records")
            return pl.read_parquet(file, glob=False, hive_partitioning=False).select("record_id", *columns)
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        why = first_line(error)
        raise ScorerError(f"{path} can't be read; run {command} again ({why})") from error
