"""The shards of a run: which records are whose, and one shard's records in, its score table out.

Knows the encoder, the engine and the table; not where shards are kept.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import polars as pl

from scorer.config import ScoreConfig
from scorer.data.encode import Encoder
from scorer.data.reader import RawRecord, read_raw
from scorer.data.records import to_record
from scorer.engines.choose import open_engine
from scorer.models.find import ModelFiles
from scorer.models.load import load_tokenizer
from scorer.protocols import PROTOCOLS
from scorer.runs.progress import Progress
from scorer.scores.measures import score_table
from scorer.types import EncodedTurn, Record, RowStatus, ScorerError, SpanNLL, TokenSequence


def read_shards(
    paths: list[str], config: ScoreConfig, missing: list[int], counts: Sequence[int] = ()
) -> Iterator[tuple[int, list[Record]]]:
    """The records of each shard whose number is in `missing`, which ascends; `counts` is as of `read_raw`."""
    rows, wanted = config.shard_rows, set(missing)
    raws = read_raw(paths, start=missing[0] * rows, limit=config.limit, counts=counts)
    for index in range(missing[0], missing[-1] + 1):
        chunk = list(islice(raws, rows))
        if index in wanted:
            yield index, [to_record(raw, config.columns) for raw in chunk]


@dataclass(frozen=True, slots=True)
class Shard:
    """Records, their turns, and the sequences of those turns that can be scored."""

    records: list[Record]
    turns: list[EncodedTurn]
    sequences: list[TokenSequence]

    @property
    def tokens(self) -> int:
        """How many the engine is given."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)


def open_encoder(config: ScoreConfig, files: ModelFiles) -> Encoder:
    """The encoder of the model's tokenizer. Raises ScorerError where the tokenizer lacks what the protocol needs."""
    assert config.max_length is not None
    tokenizer = load_tokenizer(files, trust_remote_code=config.trust_remote_code)
    return Encoder(tokenizer, PROTOCOLS[config.protocol], config.max_length, files.document_token_id)


class ShardScorer:
    """A tokenizer and an engine; opening one loads the model. `strict`: the first record without a score raises."""

    def __init__(self, config: ScoreConfig, files: ModelFiles, *, strict: bool):
        self.strict = strict
        self.protocol = PROTOCOLS[config.protocol]
        self.encoder = open_encoder(config, files)
        self.engine = open_engine(config, files)
        # What is loaded stays: to look for garbage among its half a million objects took an eighth of tokenising.
        gc.collect()
        gc.freeze()

    def encode(self, records: list[Record]) -> Shard:
        """The shard of `records`."""
        return Shard(records, *self.encoder.encode(records))

    def score(self, shard: Shard, progress: Progress) -> pl.DataFrame:
        """The score table of a shard, one row a turn, in order. `progress` is told of each record at its first span."""
        if self.strict:
            check_scored(shard.records, ((turn.record_id, turn.status) for turn in shard.turns))
        spans = list(_watched(self.engine.score(shard.sequences), shard, progress))
        table = score_table(shard.turns, spans, two_views=self.protocol.alone is not None)
        if self.strict:
            check_scored(shard.records, statuses(table))
        return table

    def close(self) -> None:
        """Free the model."""
        self.engine.close()
        gc.unfreeze()


def _watched(batches: Iterator[list[SpanNLL]], shard: Shard, progress: Progress) -> Iterator[SpanNLL]:
    """The spans of `batches`, telling `progress` of each record at its first span."""
    tokens: Counter[int] = Counter()
    for sequence in shard.sequences:
        tokens[sequence.record_id] += len(sequence.token_ids)
    progress.advance(len(shard.records) - len(tokens), 0)
    for batch in batches:
        finished = {span.record_id for span in batch} & tokens.keys()
        progress.advance(len(finished), sum(tokens.pop(record_id) for record_id in finished))
        yield from batch


def statuses(table: pl.DataFrame) -> Iterator[tuple[int, RowStatus]]:
    """Of each row of a score table, its record and status."""
    return zip(table["record_id"], map(RowStatus, table["status"]), strict=True)


def check_scored(rows: Iterable[Record | RawRecord], statuses: Iterable[tuple[int, RowStatus]]) -> None:
    """Raise ScorerError at the first status that is not of a scored row, naming the record's file and line."""
    for record_id, status in statuses:
        if not status.scored:
            source = next(row.source for row in rows if row.record_id == record_id)
            raise ScorerError(f"{source}: {status} (--strict refuses what can't be scored)")


Wrote = Callable[[int, float, str], None]  # told of each shard on disk: its tokens, its seconds, and who scored it
