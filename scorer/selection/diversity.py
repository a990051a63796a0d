"""Facility location: embeddings -> the subset that represents all of them best.

Knows vectors only; neither records nor scores. Only the similarities of each row's nearest neighbours, from faiss, are
kept, never an n x n matrix.
"""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace
from typing import Any

import numpy as np
import numpy.typing as npt

from scorer.types import ScorerError

NEIGHBOURS = 64
EXACT_ROWS = 100_000  # all pairwise products of so many take half a minute; more are searched by cells
CELLS_SEARCHED = 32

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


def facility_location(embeddings: npt.NDArray[np.float32], size: int, *, neighbours: int = NEIGHBOURS) -> list[int]:
    """The indices of `size` rows, in the order of a greedy choice that maximises sum_i max_{j chosen} s(i, j).

    embeddings: [n, d] float32, rows of length 1. s is the cosine; 0 where it is negative, and where j is neither i nor
    one of its `neighbours` nearest rows. The first of equal gains is chosen. With `neighbours` >= n - 1 this is the
    plain greedy algorithm, which is within 1 - 1/e of the best choice (Nemhauser et al. 1978), as in Superfiltering.D
    (arXiv 2402.00530); gains that can't be the largest are not recomputed (Minoux 1978).

    Raises ScorerError for a size above n.
    """
    n = len(embeddings)
    if not 0 <= size <= n:
        raise ScorerError(f"diverse: {size:,} can't be chosen from {n:,}")
    if size == 0:
        return []
    starts, rows, similar = _columns(embeddings, min(neighbours, n - 1))
    covered = np.zeros(n)  # the similarity of each row to the nearest chosen one
    sums = np.add.reduceat(similar, starts[:-1])  # no column is empty: each has its own row
    heap = [(-gain, j) for j, gain in enumerate(sums.tolist())]
    heapify(heap)
    current = [0] * n  # how many rows were chosen when each gain was computed
    chosen: list[int] = []
    while len(chosen) < size:
        _, j = heap[0]
        column = slice(starts[j], starts[j + 1])
        if current[j] == len(chosen):
            heappop(heap)
            covered[rows[column]] = np.maximum(covered[rows[column]], similar[column])
            chosen.append(j)
        else:
            current[j] = len(chosen)
            gain = np.maximum(similar[column] - covered[rows[column]], 0.0).sum()
            heapreplace(heap, (-float(gain), j))
    return chosen


def _columns(embeddings: npt.NDArray[np.float32], neighbours: int) -> tuple[Ints, Ints, Floats]:
    """The sparse matrix s by columns: where each starts (n + 1), the row of each value, and the values, float64."""
    n = len(embeddings)
    near, found = _nearest(embeddings, neighbours + 1)  # mostly with the row itself among them
    rows = np.repeat(np.arange(n), neighbours + 1)
    columns, values = found.ravel(), near.ravel()
    other = (columns >= 0) & (columns != rows) & (values > 0)
    own = np.einsum("ij,ij->i", embeddings, embeddings)
    rows = np.concatenate([np.arange(n), rows[other]])
    columns = np.concatenate([np.arange(n), columns[other]])
    values = np.concatenate([own, values[other]]).astype(np.float64)
    order = np.argsort(columns, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=n))])
    return starts, rows[order], values[order]


def _nearest(embeddings: npt.NDArray[np.float32], k: int) -> tuple[npt.NDArray[np.float32], Ints]:
    """Inner products with the k nearest rows, and the indices of those (-1: none), each [n, k]."""
    import faiss

    n, d = embeddings.shape
    index: Any = faiss.IndexFlatIP(d)
    if n > EXACT_ROWS:
        cells = 4 * int(n**0.5)
        index = faiss.IndexIVFFlat(index, d, cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = CELLS_SEARCHED
        index.train(embeddings)
    index.add(embeddings)
    near, found = index.search(embeddings, k)
    return near, found
