"""Facility location against a dense matrix, and what the greedy choice is by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorer.selection import diversity
from scorer.selection.diversity import facility_location
from scorer.types import ScorerError

# Unit vectors whose products are multiples of 1/4: sums are exact, so that ties are ties.
HALVES = [np.array(signs) / 2 for signs in itertools.product((1, -1), repeat=4)]
UNITS = np.array([*HALVES, *np.eye(4), *-np.eye(4)], dtype=np.float32)


def brute_force(embeddings: npt.NDArray[Any], size: int) -> list[int]:
    """Greedy facility location on the whole matrix, every gain computed every time."""
    similar = np.maximum(embeddings @ embeddings.T, 0).astype(np.float64)
    chosen: list[int] = []
    covered = np.zeros(len(embeddings))
    for _ in range(size):
        gains = np.maximum(similar - covered[:, None], 0).sum(axis=0)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))  # the first of equals
        covered = np.maximum(covered, similar[:, chosen[-1]])
    return chosen


def test_by_hand() -> None:
    # three like the first axis, two like the second, one opposite to the first: cosines 0.8 and 0.6
    rows = np.array([[0.8, 0.6], [1, 0], [0.8, -0.6], [0, 1], [0, 1], [-1, 0]], dtype=np.float32)
    # gains: 0: 1 + .8 + .28 + .6 + .6 = 3.28; 1: .8 + 1 + .8 = 2.6; 2: 2.08; 3: .6 + 1 + 1 = 2.6; 5: 1
    # then, with 0 chosen (1, .8, .28, .6, .6, 0 covered): 1: .2 + .52; 2: .72; 3: .4 + .4 = .8; 5: 1
    # then 3: .8, against .72 of 1 and of 2
    assert facility_location(rows, 3, neighbours=5) == [0, 5, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(UNITS) - 1), min_size=1, max_size=30), st.data())
def test_lazy_is_greedy_is_exact(rows: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(rows)))
    embeddings = UNITS[rows]
    chosen = facility_location(embeddings, size, neighbours=len(rows) - 1)
    assert chosen == brute_force(embeddings, size)
    assert len(set(chosen)) == size  # even among duplicates


def test_random_directions_against_brute_force() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 16))
    embeddings = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    exact = brute_force(embeddings, 30)
    assert facility_location(embeddings, 30, neighbours=299) == exact

    def value(chosen: list[int]) -> float:
        return float(np.maximum(embeddings @ embeddings[chosen].T, 0).max(axis=1).sum())

    assert value(facility_location(embeddings, 30, neighbours=64)) > 0.97 * value(exact)
    assert value(exact) > value(list(range(30)))


def test_one_of_each_bunch() -> None:
    centres = np.eye(8, dtype=np.float32)[np.arange(400) % 8]
    rows = centres + np.random.default_rng(1).normal(scale=0.05, size=centres.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    chosen = facility_location(rows.astype(np.float32), 8)
    assert sorted(i % 8 for i in chosen) == list(range(8))


def test_many_rows_are_searched_by_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "EXACT_ROWS", 1000)
    rows = np.random.default_rng(2).normal(size=(4000, 8))
    embeddings = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    near, found = diversity._nearest(embeddings, 5)
    exact = np.argsort(-(embeddings[:100] @ embeddings.T), axis=1)[:, :5]
    assert near.shape == found.shape == (4000, 5)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, exact, strict=False)]) > 4.5
    assert facility_location(embeddings, 20) == facility_location(embeddings, 20)


def test_a_zero_row_is_like_nothing() -> None:
    rows = np.array([[0, 0], [1, 0], [0, 0]], dtype=np.float32)
    assert facility_location(rows, 3, neighbours=2) == [1, 0, 2]


def test_more_than_there_are() -> None:
    with pytest.raises(ScorerError, match="3 can't be chosen from 2"):
        facility_location(UNITS[:2], 3)
