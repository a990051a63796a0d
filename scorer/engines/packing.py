"""Packs sequences into padding-free batches under a token budget; knows nothing of models."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch

from scorer.types import TokenSequence


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences packed end to end: T tokens, N hidden states that predict a scored token, S spans.

    A sequence is packed up to the state that predicts its last target; no later state is needed.
    """

    sequences: tuple[TokenSequence, ...]
    lengths: tuple[int, ...]  # packed tokens of each sequence, descending
    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], from 0 in each sequence
    rows: torch.Tensor  # int64 [N]: the indices in T of the predicting states
    targets: torch.Tensor  # int64 [N]: the tokens that these predict
    offsets: torch.Tensor  # int64 [S + 1]: the bounds of the spans in N


def forward_tokens(sequence: TokenSequence) -> int:
    """The tokens of a sequence that have to pass through the model."""
    return sequence.targets[-1].end - 1


def plan_batches(sequences: Sequence[TokenSequence], budget: int, workers: int = 1) -> list[list[TokenSequence]]:
    """Batches of at most `budget` packed tokens, longest records first.

    All sequences of a record share a batch. A record above the budget is a batch of its own. Records of similar length
    become neighbours, on which variable-length attention is fastest, and running out of memory shows at once. The last
    batches are smaller, down to a quarter, so that `workers` end together.
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
    """Pack sequences end to end, longest first, on the CPU."""
    ordered = tuple(sorted(sequences, key=forward_tokens, reverse=True))
    lengths = tuple(forward_tokens(sequence) for sequence in ordered)
    tokens = array("q")  # the packed tokens of each sequence, each followed by its last target
    sequence_starts, row_starts, counts = [], [], []  # of each sequence in `tokens`; of each span: first row, length
    packed = 0
    for sequence, length in zip(ordered, lengths, strict=True):
        sequence_starts.append(len(tokens))
        for span in sequence.targets:
            row_starts.append(packed + span.start - 1)
            counts.append(span.end - span.start)
        tokens.extend(sequence.token_ids[: length + 1])
        packed += length
    token_ids = torch.frombuffer(tokens, dtype=torch.int64)
    inputs, rows = _ranges(sequence_starts, lengths), _ranges(row_starts, counts)
    return PackedBatch(
        ordered,
        lengths,
        input_ids=token_ids[inputs],
        position_ids=_ranges([0] * len(lengths), lengths),
        rows=rows,
        targets=token_ids[inputs[rows] + 1],
        offsets=torch.tensor([0, *accumulate(counts)]),
    )


def _ranges(starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """`count` integers from each start, concatenated. A loop in Python holds the GIL for 0.5 µs a token."""
    sizes = torch.tensor(counts)
    ends = sizes.cumsum(0)
    return torch.arange(int(ends[-1])) + (torch.tensor(starts) - ends + sizes).repeat_interleave(sizes)
