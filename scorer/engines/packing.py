"""Sequences -> padding-free batches under a token budget.

Knows lengths and targets, and the tensors that a packed forward pass reads; nothing of models.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch

from scorer.types import TokenSequence


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences laid end to end, T tokens in all, of which N states predict a scored token; S spans.

    A sequence is laid up to the state that predicts its last target: what follows has no use.
    """

    sequences: tuple[TokenSequence, ...]
    lengths: tuple[int, ...]  # laid tokens of each sequence, descending
    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], from 0 in each sequence
    rows: torch.Tensor  # int64 [N]: where in T the predicting states are
    targets: torch.Tensor  # int64 [N]: the tokens that they predict
    offsets: torch.Tensor  # int64 [S + 1]: where each span begins and ends in N


def forward_tokens(sequence: TokenSequence) -> int:
    """How many tokens of a sequence have to pass through the model."""
    return sequence.targets[-1].end - 1


def plan_batches(sequences: Sequence[TokenSequence], budget: int, workers: int = 1) -> list[list[TokenSequence]]:
    """Groups of sequences of at most `budget` laid tokens, longest records first.

    All sequences of a record stay together: views of a sample share a pass. A record above the budget is a batch of
    its own. Records of like length become neighbours, which is what variable-length attention runs best on, and an
    out-of-memory shows at once. The last batches are smaller, down to a quarter, so that `workers` end together.
    """
    records = [list(group) for _, group in groupby(sequences, key=lambda s: s.record_id)]
    sized = sorted(((sum(map(forward_tokens, record)), record) for record in records), key=lambda pair: -pair[0])
    remaining = sum(size for size, _ in sized)
    batches: list[list[TokenSequence]] = []
    room = 0
    for size, record in sized:
        if size > room:
            batches.append([])
            room = min(budget, max(remaining // (2 * workers), budget // 4)) if workers > 1 else budget
        batches[-1] += record
        room -= size
        remaining -= size
    return batches


def pack(sequences: Sequence[TokenSequence]) -> PackedBatch:
    """Lay sequences end to end, longest first, on the CPU."""
    ordered = tuple(sorted(sequences, key=forward_tokens, reverse=True))
    lengths = tuple(forward_tokens(sequence) for sequence in ordered)
    tokens = array("q")  # the laid tokens of each sequence, and its last target after them
    laid_at, rows_at, counts = [], [], []  # where each sequence begins in `tokens`; then of each span
    begin = 0
    for sequence, length in zip(ordered, lengths, strict=True):
        laid_at.append(len(tokens))
        for span in sequence.targets:
            rows_at.append(begin + span.start - 1)
            counts.append(span.end - span.start)
        tokens.extend(sequence.token_ids[: length + 1])
        begin += length
    token_ids = torch.frombuffer(tokens, dtype=torch.int64)
    laid, rows = _ranges(laid_at, lengths), _ranges(rows_at, counts)
    return PackedBatch(
        ordered,
        lengths,
        input_ids=token_ids[laid],
        position_ids=_ranges([0] * len(lengths), lengths),
        rows=rows,
        targets=token_ids[laid[rows] + 1],
        offsets=torch.tensor([0, *accumulate(counts)]),
    )


def _ranges(starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """From each start as many integers as its count, end to end. In Python a token took 0.5 µs of a held GIL."""
    sizes = torch.tensor(counts)
    ends = sizes.cumsum(0)
    return torch.arange(int(ends[-1])) + (torch.tensor(starts) - ends + sizes).repeat_interleave(sizes)
