"""Tokenised texts -> the token sequences of an engine: truncation, the spans to score, and the two views.

Knows lengths and ids; neither text nor tokenizers. All work is on arrays, for all turns at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from scorer.tokens import ALONE, CODES, CONDITIONED, Array, TokenBatch, TurnTable, bounds_of, ranges
from scorer.types import RowStatus

OK, TRUNCATED = CODES[RowStatus.OK], CODES[RowStatus.TRUNCATED]
PROMPT_TOO_LONG, NO_SCORABLE_TOKEN = CODES[RowStatus.PROMPT_TOO_LONG], CODES[RowStatus.NO_SCORABLE_TOKEN]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the sequences of a protocol and a tokenizer are laid out.

    A conditioned sequence is `bos` and its pieces, cut to `max_length`. With `concatenated`, a piece is the texts
    prompt and response, else the text of both. An alone sequence is `alone_start` and the piece's last text, cut to
    `max_length + slack` less the tokens before the response; its first `unscored` tokens are not scored.
    """

    max_length: int
    concatenated: bool
    bos: tuple[int, ...]
    has_alone: bool
    alone_start: tuple[int, ...] = ()
    unscored: int = 1
    slack: int = 0

    @property
    def texts(self) -> int:
        """How many texts a piece has: prompt and response; or the prompt, both as one text, and the alone text."""
        return 3 if self.has_alone and not self.concatenated else 2

    @property
    def longest_text(self) -> int:
        """The most tokens of a text that the length limit can see."""
        return self.max_length + self.slack + 1


@dataclass(frozen=True, slots=True)
class Pieces:
    """P pieces, each the text of one turn in one of C conditioned sequences, with the ids of their texts."""

    rows: Array  # int64 [P]: the row of the turn; negative where it has none
    sequences: Array  # int64 [P]: the conditioned sequence; ascending
    record_ids: Array  # int64 [C]
    ids: Array  # int32: the ids of all texts end to end
    starts: Array  # int64 [P, texts]: where each text begins in `ids`
    lengths: Array  # int64 [P, texts]


@dataclass(frozen=True, slots=True)
class _Spans:
    """Where each piece is scored, as int64 [P]: tokens `starts` to `ends` conditioned, and up to `alone_ends` alone."""

    starts: Array
    ends: Array
    alone_ends: Array
    statuses: Array  # uint8 [P]


def token_batch(pieces: Pieces, layout: Layout, table: TurnTable) -> TokenBatch:
    """The sequences to score, a conditioned one before the alone ones of its turns.

    Sets the status and the prompt tokens of the rows of `table` that are OK and have a piece.
    """
    spans = _cut(pieces, layout)
    live = (pieces.rows >= 0) & (table.statuses[pieces.rows] == OK)
    table.statuses[pieces.rows[live]] = spans.statuses[live]
    table.prompt_tokens[pieces.rows[live]] = spans.starts[live]
    return _assemble(pieces, layout, spans, live & ((spans.statuses == OK) | (spans.statuses == TRUNCATED)))


def _cut(pieces: Pieces, layout: Layout) -> _Spans:
    prompts, last = pieces.lengths[:, 0], pieces.lengths[:, -1]
    whole = prompts + last if layout.concatenated else pieces.lengths[:, 1]
    before = np.cumsum(whole) - whole
    before -= before[np.searchsorted(pieces.sequences, pieces.sequences)] - len(layout.bos)
    starts, uncut = before + prompts, before + whole
    ends = np.minimum(uncut, layout.max_length)
    statuses = np.where(ends < uncut, TRUNCATED, OK).astype(np.uint8)
    empty = ends <= np.maximum(starts, 1)  # nothing precedes the very first token
    statuses[empty] = np.where(starts >= layout.max_length, PROMPT_TOO_LONG, NO_SCORABLE_TOKEN)[empty]
    alone_ends = np.zeros_like(ends)
    if layout.has_alone:
        uncut = last + len(layout.alone_start)
        room = np.maximum(layout.max_length - starts + layout.slack, 0)
        alone_ends = np.minimum(uncut, room)
        statuses[~empty & (uncut > room)] = TRUNCATED
        short = ~empty & (alone_ends <= layout.unscored)
        statuses[short] = np.where(uncut > layout.unscored, PROMPT_TOO_LONG, NO_SCORABLE_TOKEN)[short]
    return _Spans(starts, ends, alone_ends, statuses)


def _assemble(pieces: Pieces, layout: Layout, spans: _Spans, scored: Array) -> TokenBatch:
    """The TokenBatch of the pieces that are `scored` (bool [P]), and of what precedes them in their sequences."""
    piece = np.flatnonzero(scored)
    of_piece = pieces.sequences[piece]
    counts = np.bincount(of_piece, minlength=len(pieces.record_ids))  # scored pieces of each conditioned sequence
    kept, views = counts > 0, 1 + layout.has_alone
    first = bounds_of(counts)[:-1][of_piece]  # the first scored piece of the same sequence
    number = np.arange(len(piece)) - first
    places = bounds_of(kept + (views - 1) * counts)  # of the conditioned sequences among all
    conditioned = places[:-1][of_piece]
    alone = conditioned + 1 + number
    # Spans: those of a conditioned sequence, then those of its alone sequences.
    span = views * first + number
    order = np.concatenate((span, span + counts[of_piece]) if layout.has_alone else (span,))
    fields = [
        (conditioned, alone),
        (pieces.rows[piece],) * 2,
        (np.full(len(piece), CONDITIONED, np.uint8), np.full(len(piece), ALONE, np.uint8)),
        (np.maximum(spans.starts[piece], 1), np.full(len(piece), layout.unscored)),
        (spans.ends[piece], spans.alone_ends[piece]),
    ]
    sequences, rows, kinds, starts, ends = (_scattered(order, pair[:views]) for pair in fields)
    lengths = np.zeros(int(places[-1]), np.int64)
    np.maximum.at(lengths, sequences, ends)  # a sequence ends with its last span
    return TokenBatch(
        _gathered(pieces, layout, (places[:-1], kept), (alone, piece), lengths),
        bounds_of(lengths),
        np.repeat(pieces.record_ids, np.diff(places)),
        sequences,
        rows,
        kinds,
        starts,
        ends,
    )


def _scattered(order: Array, parts: tuple[Array, ...]) -> Array:
    values = np.concatenate(parts)
    result = np.empty_like(values)
    result[order] = values
    return result


def _gathered(
    pieces: Pieces, layout: Layout, conditioned: tuple[Array, Array], alone: tuple[Array, Array], lengths: Array
) -> Array:
    """The ids of sequences of `lengths`, end to end, each put together from segments of one buffer.

    conditioned: the place and whether it is kept, of each conditioned sequence. alone: the place and the piece of each
    alone one.
    """
    buffer = np.concatenate((np.array((*layout.bos, *layout.alone_start), np.int32), pieces.ids))
    begin = pieces.starts + len(layout.bos) + len(layout.alone_start)
    (places, kept), (alone_places, piece) = conditioned, alone
    there = kept[pieces.sequences]
    columns = [0, 1] if layout.concatenated else [1]
    parts: list[tuple[Array, Any, Any]] = [  # sequence, start in `buffer`, length
        (places[kept], 0, len(layout.bos)),
        (
            np.repeat(places[pieces.sequences[there]], len(columns)),
            begin[there][:, columns].ravel(),
            pieces.lengths[there][:, columns].ravel(),
        ),
    ]
    if layout.has_alone:
        parts += [
            (alone_places, len(layout.bos), len(layout.alone_start)),
            (alone_places, begin[piece, -1], pieces.lengths[piece, -1]),
        ]
    owner, start, length = (
        np.concatenate([np.broadcast_to(part[field], part[0].shape) for part in parts]) for field in range(3)
    )
    order = np.argsort(owner, kind="stable")
    owner, start, length = owner[order], start[order], length[order]
    offset = np.cumsum(length) - length
    offset -= offset[np.searchsorted(owner, owner)]  # of the segment in its sequence
    token_ids: Array = buffer[ranges(start, np.clip(lengths[owner] - offset, 0, length))]
    return token_ids
