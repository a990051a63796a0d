"""The shards of a run: the records of each, and from records to a score table."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import polars as pl

from scorer.background import Feed
from scorer.config import ScoreConfig
from scorer.data.dataset import Dataset
from scorer.data.records import to_record
from scorer.encoding.encoder import Encoder
from scorer.encoding.tokenizer import BulkTokenizer
from scorer.engines import Engine
from scorer.files.raw import RawRecord
from scorer.models.find import ModelFiles
from scorer.models.load import load_tokenizer
from scorer.protocols import PROTOCOLS
from scorer.runs.progress import Progress
from scorer.runs.writer import RunWriter
from scorer.scores.measures import score_table
from scorer.tokens import STATUSES, SpanScores, TokenBatch, TurnTable
from scorer.types import EngineError, Record, RowStatus, ScorerError


@dataclass(frozen=True, slots=True)
class Job:
    """A run with everything resolved that decides its scores. strict: the first record without a score raises.

    engine: None opens the one of the configuration.
    """

    run: RunWriter
    data: Dataset
    config: ScoreConfig
    files: ModelFiles
    encoder: Encoder
    strict: bool = False
    engine: Engine | None = None


# Scores the shards of the given numbers (ascending), and tells progress of their records.
Executor = Callable[[Job, list[int], Progress], None]


def read_shards(data: Dataset, shard_rows: int, missing: Sequence[int]) -> Iterator[tuple[int, list[Record]]]:
    """The records of each shard whose number is in `missing`, which ascends."""
    wanted = set(missing)
    raws = data.rows(missing[0] * shard_rows, exact=False)
    for index in range(missing[0], missing[-1] + 1):
        chunk = list(islice(raws, shard_rows))
        if index in wanted:
            yield index, [to_record(raw, data.reading) for raw in chunk]


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The rows of some records, and the sequences of those that can be scored; `index` is the shard's number."""

    index: int
    count: int  # records
    turns: TurnTable
    batch: TokenBatch
    records: Sequence[Record] = ()  # with `strict`: they name the file and line of one that fails

    @property
    def tokens(self) -> int:
        """How many tokens the engine is given."""
        return len(self.batch.token_ids)

    @property
    def size(self) -> int:
        """What counts against the budget of a Feed: tokens, and one for each record that has none."""
        return self.tokens + self.count


def open_encoder(config: ScoreConfig, files: ModelFiles) -> Encoder:
    """The encoder of the model's tokenizer. Raises ScorerError where the tokenizer lacks what the protocol needs."""
    assert config.max_length is not None
    tokenizer = BulkTokenizer(load_tokenizer(files, trust_remote_code=config.trust_remote_code))
    return Encoder(
        tokenizer,
        PROTOCOLS[config.protocol],
        config.max_length,
        files.document_token_id,
        split_special_tokens=config.split_special_tokens,
    )


class ShardScorer:
    """An encoder and an engine at work; closing it closes the engine."""

    def __init__(self, encoder: Encoder, engine: Engine, *, strict: bool):
        self.encoder, self.engine, self.strict = encoder, engine, strict
        # What is loaded stays. Garbage collection among its half a million objects took an eighth of tokenising's time.
        gc.collect()
        gc.freeze()

    def encode(self, index: int, records: list[Record]) -> Shard:
        """The shard of `records`. With `strict`, one that can't be scored raises ScorerError."""
        shard = Shard(index, len(records), *self.encoder.encode(records), records if self.strict else ())
        if self.strict:
            statuses = map(STATUSES.__getitem__, shard.turns.statuses.tolist())
            check_scored(records, zip(shard.turns.record_ids.tolist(), statuses, strict=True))
        return shard

    def score(self, shards: Feed[Shard], progress: Progress) -> Iterator[tuple[Shard, pl.DataFrame]]:
        """Yield each shard with its score table, one row a turn in order, when its last span is scored.

        The engine computes later shards meanwhile. `progress` is told of each record at its first span. An error that
        broke `shards` off is raised after the last of them.
        """
        unfinished: dict[TokenBatch, _Unfinished] = {}

        def batches() -> Iterator[TokenBatch | None]:
            while not shards.ended:
                if (shard := shards.take(wait=not unfinished)) is not None:
                    unfinished[shard.batch] = _Unfinished(shard, progress)
                    yield shard.batch
                elif unfinished:
                    yield None

        for scores in self.engine.score(batches()):
            if unfinished[scores.batch].add(scores):
                done, two_views = unfinished.pop(scores.batch), self.encoder.layout.has_alone
                shard = done.shard
                table = score_table(shard.turns, shard.batch, done.nll_sums, done.statuses, two_views=two_views)
                if self.strict:
                    check_scored(shard.records, statuses(table))
                yield shard, table
        shards.raise_error()
        if unfinished:
            raise EngineError(f"the engine gave no score for spans of {len(unfinished)} shards")

    def close(self) -> None:
        self.engine.close()
        gc.unfreeze()


class _Unfinished:
    """A shard that the engine is at, and the scores of its spans as they come."""

    def __init__(self, shard: Shard, progress: Progress):
        self.shard, self.progress = shard, progress
        self.left = len(shard.batch.rows)
        self.nll_sums, self.statuses = np.full(self.left, np.nan), np.zeros(self.left, np.uint8)
        self.first = int(shard.turns.record_ids[0])
        records = shard.batch.record_ids - self.first
        self.tokens = np.bincount(records, shard.batch.lengths, shard.count).astype(np.int64)  # of each record
        self.waiting = self.tokens > 0
        progress.advance(shard.count - int(self.waiting.sum()), 0)

    def add(self, scores: SpanScores) -> bool:
        """Keep some scores. Whether they were the last."""
        self.nll_sums[scores.spans], self.statuses[scores.spans] = scores.nll_sums, scores.statuses
        self.left -= len(scores.spans)
        batch = self.shard.batch
        records = np.unique(batch.record_ids[batch.sequences[scores.spans]] - self.first)
        records = records[self.waiting[records]]
        self.waiting[records] = False
        self.progress.advance(len(records), int(self.tokens[records].sum()))
        return self.left == 0


def statuses(table: pl.DataFrame) -> Iterator[tuple[int, RowStatus]]:
    """The record id and status of each row of a score table."""
    return zip(table["record_id"], map(RowStatus, table["status"]), strict=True)


def check_scored(rows: Iterable[Record | RawRecord], statuses: Iterable[tuple[int, RowStatus]]) -> None:
    """Raise ScorerError for the first row without a score, naming the record's file and line."""
    for record_id, status in statuses:
        if not status.scored:
            source = next(row.source for row in rows if row.record_id == record_id)
            raise ScorerError(f"{source}: {status} (--strict refuses what can't be scored)")
