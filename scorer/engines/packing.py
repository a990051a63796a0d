"""Puts sequences into batches under a token budget, packed without padding or padded; knows nothing of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from scorer.tokens import Array, TokenBatch, bounds_of, ranges


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences packed end to end: T tokens, N hidden states that predict a scored token, S spans.

    A sequence is packed up to the state that predicts its last target; no later state is needed.
    """

    spans: Array  # int64 [S]: indices in the TokenBatch
    lengths: list[int]  # packed tokens of each sequence, descending
    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], from 0 in each sequence
    rows: torch.Tensor  # int64 [N]: the indices in T of the predicting states
    targets: torch.Tensor  # int64 [N]: the tokens that these predict
    offsets: torch.Tensor  # int64 [S + 1]: the bounds of the spans in N


def forward_tokens(batch: TokenBatch) -> Array:
    """The tokens of each sequence that have to pass through the model: int64 [Q]."""
    tokens: Array = batch.ends[batch.span_offsets[1:] - 1] - 1
    return tokens


def plan_batches(batch: TokenBatch, budget: int, workers: int = 1) -> list[Array]:
    """The sequences (int64 indices) of batches of at most `budget` packed tokens, longest records first.

    All sequences of a record share a batch. A record above the budget is a batch of its own. Records of similar length
    become neighbours, on which variable-length attention is fastest, and running out of memory shows at once. The last
    batches are smaller, down to a quarter, so that `workers` end together.
    """
    if not len(batch):
        return []
    firsts = np.flatnonzero(np.diff(batch.record_ids, prepend=batch.record_ids[0] - 1))  # of each record
    sizes = np.add.reduceat(forward_tokens(batch), firsts)
    counts = np.diff(firsts, append=len(batch))
    order = np.argsort(-sizes, kind="stable")
    ends = np.cumsum(sizes[order])
    bounds, used = [0], 0
    while bounds[-1] < len(order):
        remaining = int(ends[-1]) - used
        room = min(budget, max(remaining // (2 * workers), budget // 4)) if workers > 1 else budget
        bounds.append(max(int(np.searchsorted(ends, used + room, side="right")), bounds[-1] + 1))
        used = int(ends[bounds[-1] - 1])
    parts = (order[first:last] for first, last in pairwise(bounds))
    return [ranges(firsts[part], counts[part]) for part in parts]


def pack(batch: TokenBatch, sequences: Array) -> PackedBatch:
    """Pack some sequences of `batch` end to end, longest first, on the CPU."""
    lengths = forward_tokens(batch)[sequences]
    order = np.argsort(-lengths, kind="stable")
    sequences, lengths = sequences[order], lengths[order]
    spans, span_counts = batch.spans(sequences)
    starts, counts = batch.starts[spans], batch.ends[spans] - batch.starts[spans]
    packed = bounds_of(lengths)[:-1]  # where each sequence begins
    arrays = (
        batch.token_ids[ranges(batch.offsets[sequences], lengths)].astype(np.int64),
        ranges(np.zeros_like(lengths), lengths),
        ranges(np.repeat(packed, span_counts) + starts - 1, counts),
        batch.token_ids[ranges(np.repeat(batch.offsets[sequences], span_counts) + starts, counts)].astype(np.int64),
        bounds_of(counts),
    )
    return PackedBatch(spans, lengths.tolist(), *map(torch.from_numpy, arrays))


def padded_batches(lengths: Mapping[int, int], budget: int) -> Iterator[list[int]]:
    """The keys of sequences by length, longest first, in batches of at most `budget` tokens with padding, or of one."""
    batch: list[int] = []
    for key in sorted(lengths, key=lambda key: -lengths[key]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
