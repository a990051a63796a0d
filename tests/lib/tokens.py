"""Token sequences and their scores as lists and objects, which tests can write down and compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from scorer.encoding.encoder import Encoder
from scorer.engines import Engine
from scorer.tokens import CODES, STATUSES, Array, SpanScores, TokenBatch, TurnTable, bounds_of
from scorer.types import Record, RowStatus


class View(StrEnum):
    """The name of each code in TokenBatch.views."""

    CONDITIONED = "conditioned"
    ALONE = "alone"


VIEWS = tuple(View)
Key = tuple[int, int, View]  # record, turn


@dataclass(frozen=True)
class EncodedTurn:
    """A row of a TurnTable."""

    record_id: int
    turn: int
    status: RowStatus
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` of a sequence, the response of `turn`."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class TokenSequence:
    """A sequence of a TokenBatch, and its spans."""

    record_id: int
    view: View
    token_ids: list[int]
    targets: tuple[Span, ...]


@dataclass(frozen=True)
class SpanNLL:
    """What an engine says of one span; no sum where its status is not OK."""

    record_id: int
    turn: int
    view: View
    nll_sum: float | None
    tokens: int
    status: RowStatus = RowStatus.OK


def turn_table(turns: Sequence[EncodedTurn]) -> TurnTable:
    return TurnTable(
        np.array([t.record_id for t in turns], np.int64),
        np.array([t.turn for t in turns], np.int32),
        np.array([CODES[t.status] for t in turns], np.uint8),
        np.array([-1 if t.prompt_tokens is None else t.prompt_tokens for t in turns], np.int32),
        np.full(len(turns), None),
        np.full(len(turns), None),
        np.full(len(turns), None),
        np.zeros(len(turns), bool),
    )


def turns_of(table: TurnTable) -> list[EncodedTurn]:
    columns = (table.record_ids, table.turns, table.statuses, table.prompt_tokens)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [EncodedTurn(record, turn, STATUSES[code], None if n < 0 else n) for record, turn, code, n in rows]


def token_batch(sequences: Sequence[TokenSequence], rows: Sequence[tuple[int, int]] = ()) -> TokenBatch:
    """The arrays of `sequences`. rows: the record and turn of each row; else each pair that occurs has one."""
    spans = [(i, s, span) for i, s in enumerate(sequences) for span in s.targets]
    pairs = list(rows) or sorted({(s.record_id, span.turn) for _, s, span in spans})
    number = {pair: i for i, pair in enumerate(pairs)}
    return TokenBatch(
        np.array([token for s in sequences for token in s.token_ids], np.int32),
        bounds_of(np.array([len(s.token_ids) for s in sequences], np.int64)),
        np.array([s.record_id for s in sequences], np.int64),
        np.array([i for i, _, _ in spans], np.int64),
        np.array([number[s.record_id, span.turn] for _, s, span in spans], np.int64),
        np.array([VIEWS.index(s.view) for _, s, _ in spans], np.uint8),
        np.array([span.start for _, _, span in spans], np.int64),
        np.array([span.end for _, _, span in spans], np.int64),
    )


def sequences_of(batch: TokenBatch, table: TurnTable) -> list[TokenSequence]:
    found = []
    for i in range(len(batch)):
        spans = np.flatnonzero(batch.sequences == i)
        targets = tuple(Span(int(table.turns[batch.rows[s]]), int(batch.starts[s]), int(batch.ends[s])) for s in spans)
        assert len({*batch.views[spans].tolist()}) == 1
        assert {*table.record_ids[batch.rows[spans]].tolist()} == {int(batch.record_ids[i])}
        view = VIEWS[batch.views[spans[0]]]
        found.append(TokenSequence(int(batch.record_ids[i]), view, batch.ids(i).tolist(), targets))
    return found


class ListEncoder:
    """An Encoder whose results are lists."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def encode(self, records: Sequence[Record]) -> tuple[list[EncodedTurn], list[TokenSequence]]:
        table, batch = self.encoder.encode(records)
        return turns_of(table), sequences_of(batch, table)


def scores_of(engine: Engine, sequences: Sequence[TokenSequence]) -> Iterator[list[SpanNLL]]:
    """What an engine yields for `sequences`, one batch."""
    batch = token_batch(sequences)
    pairs = sorted({(s.record_id, span.turn) for s in sequences for span in s.targets})
    for scores in engine.score([batch]):
        yield list(_listed(scores, pairs))


def _listed(scores: SpanScores, pairs: list[tuple[int, int]]) -> Iterator[SpanNLL]:
    batch = scores.batch
    columns: Iterable[tuple[int, float, int]] = zip(
        scores.spans.tolist(), scores.nll_sums.tolist(), scores.statuses.tolist(), strict=True
    )
    for span, nll, code in columns:
        record, turn = pairs[batch.rows[span]]
        tokens = int(batch.ends[span] - batch.starts[span])
        total = nll if code == CODES[RowStatus.OK] else None
        yield SpanNLL(record, turn, VIEWS[batch.views[span]], total, tokens, STATUSES[code])


def scored(engine: Engine, sequences: Sequence[TokenSequence]) -> dict[Key, SpanNLL]:
    spans = [span for some in scores_of(engine, sequences) for span in some]
    found = {(s.record_id, s.turn, s.view): s for s in spans}
    assert len(found) == len(spans), "a span came twice"
    return found


def in_order(engine: Engine, batch: TokenBatch) -> Array:
    """The sum of each span of `batch`: float64 [S]."""
    sums = np.full(len(batch.rows), np.nan)
    for scores in engine.score([batch]):
        assert np.isnan(sums[scores.spans]).all()
        sums[scores.spans] = scores.nll_sums
    return sums
