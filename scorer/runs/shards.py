"""The shards of a run: the records of each, and from records to a score table."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import polars as pl

from scorer.config import ScoreConfig
from scorer.data.dataset import Dataset
from scorer.data.encode import Encoder
from scorer.data.reader import RawRecord
from scorer.data.records import to_record
from scorer.engines.choose import open_engine
from scorer.models.find import ModelFiles
from scorer.models.load import load_tokenizer
from scorer.protocols import PROTOCOLS
from scorer.runs.directory import Run
from scorer.runs.progress import Progress
from scorer.scores.measures import score_table
from scorer.types import EncodedTurn, Record, RowStatus, ScorerError, SpanNLL, TokenSequence


@dataclass(frozen=True, slots=True)
class Job:
    """A run with everything resolved that decides its scores. strict: the first record without a score raises."""

    run: Run
    data: Dataset
    config: ScoreConfig
    files: ModelFiles
    encoder: Encoder | None = None  # None: opened with the engine
    strict: bool = False


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard that was written: its tokens, the seconds that the engine took, and the name of who scored it."""

    tokens: int
    seconds: float
    by: str


# Scores the shards of the given numbers (ascending), and yields each that is written; tells progress of its records.
Executor = Callable[[Job, list[int], Progress], Generator[FinishedShard, None, None]]


def read_shards(data: Dataset, shard_rows: int, missing: Sequence[int]) -> Iterator[tuple[int, list[Record]]]:
    """The records of each shard whose number is in `missing`, which ascends."""
    wanted = set(missing)
    raws = data.rows(missing[0] * shard_rows)
    for index in range(missing[0], missing[-1] + 1):
        chunk = list(islice(raws, shard_rows))
        if index in wanted:
            yield index, [to_record(raw, data.columns) for raw in chunk]


@dataclass(frozen=True, slots=True)
class Shard:
    """Records, their turns, and the sequences of those turns that can be scored."""

    records: list[Record]
    turns: list[EncodedTurn]
    sequences: list[TokenSequence]

    @property
    def tokens(self) -> int:
        """How many tokens the engine is given."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)


def open_encoder(config: ScoreConfig, files: ModelFiles) -> Encoder:
    """The encoder of the model's tokenizer. Raises ScorerError where the tokenizer lacks what the protocol needs."""
    assert config.max_length is not None
    tokenizer = load_tokenizer(files, trust_remote_code=config.trust_remote_code)
    return Encoder(tokenizer, PROTOCOLS[config.protocol], config.max_length, files.document_token_id)


class ShardScorer:
    """A tokenizer and an engine; opening one loads the model."""

    def __init__(self, config: ScoreConfig, files: ModelFiles, *, strict: bool, encoder: Encoder | None = None):
        self.strict = strict
        self.protocol = PROTOCOLS[config.protocol]
        self.encoder = encoder or open_encoder(config, files)
        self.engine = open_engine(config, files)
        # What is loaded stays. Garbage collection among its half a million objects took an eighth of tokenising's time.
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
    """The record id and status of each row of a score table."""
    return zip(table["record_id"], map(RowStatus, table["status"]), strict=True)


def check_scored(rows: Iterable[Record | RawRecord], statuses: Iterable[tuple[int, RowStatus]]) -> None:
    """Raise ScorerError for the first row without a score, naming the record's file and line."""
    for record_id, status in statuses:
        if not status.scored:
            source = next(row.source for row in rows if row.record_id == record_id)
            raise ScorerError(f"{source}: {status} (--strict refuses what can't be scored)")
