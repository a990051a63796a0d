"""K-means clusters of a run's records by their embeddings, and the two flags that embeddings give.

    RUN/clusters.parquet    record_id Int64, cluster Int64, distance Float32: Euclidean, to the cluster's centre
    RUN/flags.parquet       record_id Int64, far_from_instruction Boolean, near_duplicate Boolean

Knows faiss and matrices; neither texts nor models.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import polars as pl

from scorer.clusters.embedder import Matrix
from scorer.clusters.embeddings import embed
from scorer.config import ClusterConfig
from scorer.data.dataset import Dataset
from scorer.keywords import ClusterKeywords
from scorer.models.load import choose_device
from scorer.options import from_options, keywords
from scorer.requirements import require
from scorer.runs.directory import CLUSTERS, EMBEDDINGS, FLAGS, Run
from scorer.runs.extras import embeddings
from scorer.runs.progress import Progress, shown
from scorer.runs.writer import RunWriter
from scorer.types import ScorerError

SAMPLE = 256  # maximum rows per cluster that k-means is trained on; all rows are then assigned
BLOCK_ROWS = 4096


@keywords(ClusterConfig)
def cluster(
    run: Run | str | Path,
    *,
    fresh: bool = False,
    progress: Progress | bool | None = None,
    **options: Unpack[ClusterKeywords],
) -> pl.DataFrame:
    """Embed the records of a run, cluster them, and return what is written to RUN/clusters.parquet.

    With `flags`, RUN/flags.parquet is written too. fresh: discard the embeddings that an earlier call left. progress:
    as in `scorer.score`.

    Raises ScorerError where the run has no data or its data changed, and where there are fewer records than clusters.
    """
    require("cluster")
    config = from_options(ClusterConfig, options)
    run = RunWriter(run.path if isinstance(run, Run) else run)
    run.require_disk("clustering")
    data = run.data
    data.check_unchanged()
    records = run.manifest.records
    if config.clusters is not None and config.clusters > records:
        raise ScorerError(f"{records:,} records can't make {config.clusters:,} clusters: give fewer --clusters")
    choose_device(config.device)
    with shown(progress) as receiver, run.locked(), data:
        if fresh:
            shutil.rmtree(run.path / EMBEDDINGS, ignore_errors=True)
        parts = embed(run, data, "part", config, receiver)
        filled = np.concatenate([np.asarray(part).any(axis=1) for part in parts])
        records = int(filled.sum())
        k = config.clusters or max(1, records // config.min_mean_size)
        receiver.say(f"k-means: {records:,} records into {k:,} clusters")
        labels, distances = kmeans(parts, filled, k, iterations=config.iterations, seed=config.seed)
        schema = {"record_id": pl.Int64, "cluster": pl.Int64, "distance": pl.Float32}
        assigned = pl.DataFrame([np.flatnonzero(filled), labels, distances], schema=schema)
        ids = pl.DataFrame({"record_id": pl.int_range(len(filled), eager=True, dtype=pl.Int64)})
        table = ids.join(assigned, on="record_id", how="left", maintain_order="left")
        run.write_extra(CLUSTERS, table)
        if config.flags:
            _write_flags(run, data, parts, config, receiver)
    return table


def _write_flags(
    run: RunWriter, data: Dataset, parts: Sequence[Matrix], config: ClusterConfig, progress: Progress
) -> None:
    instructions, responses = (embed(run, data, kind, config, progress) for kind in ("instruction", "response"))
    pairs = zip(instructions, responses, strict=True)
    far = pl.concat([_far_from_instruction(*pair, config.far_below) for pair in pairs])
    duplicates = pl.Series(near_duplicates(parts, config.duplicate_above))
    ids = pl.int_range(len(far), eager=True, dtype=pl.Int64)
    run.write_extra(FLAGS, pl.DataFrame({"record_id": ids, "far_from_instruction": far, "near_duplicate": duplicates}))
    progress.say(f"flags: {far.sum():,} far_from_instruction, {duplicates.sum():,} near_duplicate")


def kmeans(
    parts: Sequence[Matrix], filled: np.ndarray[Any, Any], k: int, *, iterations: int = 20, seed: int = 42
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The cluster (int64) and the distance to its centre (float32) of each row of `parts` where `filled` (bool).

    Trained on SAMPLE * k rows, drawn by `seed`, where there are more. Deterministic on one machine. Raises ScorerError
    for fewer rows than clusters.
    """
    import faiss

    rows = np.flatnonzero(filled)
    if len(rows) < k:
        raise ScorerError(f"{len(rows):,} records with text can't make {k:,} clusters: give fewer --clusters")
    if len(rows) > SAMPLE * k:
        rows = np.sort(np.random.default_rng(seed).choice(rows, SAMPLE * k, replace=False))
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": SAMPLE}
    model = faiss.Kmeans(parts[0].shape[1], k, niter=iterations, seed=seed, **limits)
    model.train(embeddings(parts, pl.Series(rows)))
    found = [model.index.search(np.ascontiguousarray(part), 1) for part in parts]
    labels = np.concatenate([nearest[:, 0] for _, nearest in found])[filled]
    squares = np.concatenate([squares[:, 0] for squares, _ in found])[filled]
    return labels, np.sqrt(np.maximum(squares, 0))


def near_duplicates(parts: Sequence[Matrix], above: float) -> np.ndarray[Any, Any]:
    """Whether a row's cosine with any row before it is over `above`: bool, exact, in blocks. Rows have unit length."""
    import faiss

    index = faiss.IndexFlatIP(parts[0].shape[1])
    found = []
    for part in parts:
        for start in range(0, len(part), BLOCK_ROWS):
            block = np.ascontiguousarray(part[start : start + BLOCK_ROWS])
            inside = np.tril(block @ block.T, -1).max(axis=1, initial=-1.0)
            before = index.search(block, 1)[0][:, 0] if index.ntotal else inside
            found.append(np.maximum(inside, before) > above)
            index.add(block)
    return np.concatenate(found)


def _far_from_instruction(instructions: Matrix, responses: Matrix, below: float) -> pl.Series:
    """Whether the cosine of a row's two embeddings is under `below`; null where either text is empty."""
    filled = pl.Series(np.logical_and(instructions.any(axis=1), responses.any(axis=1)))
    far = pl.Series(np.einsum("nd,nd->n", instructions, responses) < below)
    return pl.select(pl.when(filled).then(far)).to_series()
