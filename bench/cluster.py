"""K-means of synthetic embeddings: seconds, products a second, and memory.

Correctness first: no cluster may mix groups that are far apart, and the same seed must give the same labels.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np

from scorer.clusters.cluster import kmeans
from scorer.clusters.embedder import Matrix

ITERATIONS = 20
PART_ROWS = 10_000


def run(rows: int, clusters: int, width: int) -> dict[str, Any]:
    """Measure; returns the report."""
    _check(width)
    parts = [part for part, _ in _blobs(rows, clusters, width, spread=0.5)]
    filled = np.ones(rows, dtype=bool)
    began = time.monotonic()
    labels, distances = kmeans(parts, filled, clusters, iterations=ITERATIONS)
    seconds = time.monotonic() - began
    flops = 2 * rows * clusters * width * (ITERATIONS + 1)
    return {
        "rows": rows,
        "clusters": clusters,
        "width": width,
        "iterations": ITERATIONS,
        "seconds": round(seconds, 1),
        "gflops_per_second": round(flops / seconds / 1e9, 1),
        "mean_distance": round(float(distances.mean()), 4),
        "empty_clusters": clusters - len(np.unique(labels)),
        "peak_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def _check(width: int) -> None:
    found = _blobs(2000, 10, width, spread=0.05)
    parts, truth = [part for part, _ in found], np.concatenate([label for _, label in found])
    filled = np.ones(2000, dtype=bool)
    labels, _ = kmeans(parts, filled, 40)
    if len({*zip(labels, truth, strict=True)}) != 40:
        raise SystemExit("a cluster has rows of two groups that are far apart; nothing is reported")
    if not np.array_equal(labels, kmeans(parts, filled, 40)[0]):
        raise SystemExit("the same seed gives different clusters; nothing is reported")


def _blobs(rows: int, clusters: int, width: int, spread: float) -> list[tuple[Matrix, np.ndarray[Any, Any]]]:
    """Unit vectors around random centres, and the index of each vector's centre."""
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((clusters, width), dtype=np.float32)
    found = []
    for start in range(0, rows, PART_ROWS):
        labels = draw.integers(clusters, size=min(PART_ROWS, rows - start))
        part = centres[labels] + spread * draw.standard_normal((len(labels), width), dtype=np.float32)
        found.append((part / np.linalg.norm(part, axis=1, keepdims=True), labels))
    return found
