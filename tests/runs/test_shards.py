"""Shards that flow through an engine, one into the next: the same tables, in any company."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from bench.lib.families import byte_tokenizer
from scorer.background import Feed
from scorer.config import ScoreConfig
from scorer.encoding.encoder import Encoder
from scorer.encoding.tokenizer import BulkTokenizer
from scorer.engines.choose import open_engine
from scorer.models.find import ModelFiles
from scorer.protocols import PROTOCOLS
from scorer.runs.progress import Silent
from scorer.runs.shards import Shard, ShardScorer
from scorer.tokens import TokenBatch
from scorer.types import Message, Record, RowStatus, ScorerError, Turn


class Counted(Silent):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.records = self.tokens = 0

    def advance(self, records: int, tokens: int) -> None:
        self.records, self.tokens = self.records + records, self.tokens + tokens


def records(first: int, count: int, *, scored: bool = True) -> list[Record]:
    if not scored:
        return [Record(first + i, f"d:{first + i}", status=RowStatus.BAD_JSON) for i in range(count)]
    turns = [
        Turn((Message("user", "Say it " * (i % 5)),), "so it is " * (1 + i % 7)) for i in range(first, first + count)
    ]
    return [Record(first + i, f"d:{first + i}", (turn,)) for i, turn in enumerate(turns)]


SHARDS = [records(0, 30), records(30, 5, scored=False), records(35, 30), records(65, 1), records(66, 30)]


@pytest.fixture(scope="module", params=["packed", "reference"])
def scorer(request: pytest.FixtureRequest, tiny: Callable[[str], ModelFiles]) -> Iterator[ShardScorer]:
    config = ScoreConfig(engine=request.param, dtype="float32", device="cpu", batch_tokens=128, max_length=1024)
    encoder = Encoder(BulkTokenizer(byte_tokenizer()), PROTOCOLS["superfiltering"], 1024)
    made = ShardScorer(encoder, open_engine(config, tiny("gpt2")), strict=False)
    yield made
    made.close()


def scored(scorer: ShardScorer, numbers: list[int], progress: Counted) -> dict[int, pl.DataFrame]:
    feed: Feed[Shard] = Feed(math.inf)
    for number in numbers:
        feed.put(scorer.encode(number, SHARDS[number]))
    feed.end()
    return {shard.index: table for shard, table in scorer.score(feed, progress)}


def test_shards_have_the_same_bits_in_any_company(scorer: ShardScorer) -> None:
    progress = Counted()
    together = scored(scorer, [0, 1, 2, 3, 4], progress)
    assert sorted(together) == [0, 1, 2, 3, 4]
    assert progress.records == sum(map(len, SHARDS))
    assert progress.tokens == sum(scorer.encode(i, shard).tokens for i, shard in enumerate(SHARDS))
    assert together[1]["status"].to_list() == ["bad_json"] * 5
    for number, table in together.items():
        assert table["record_id"].to_list() == [record.record_id for record in SHARDS[number]]
        assert_frame_equal(scored(scorer, [number], Counted())[number], table, check_exact=True)
    assert_frame_equal(scored(scorer, [4, 2], Counted())[2], together[2], check_exact=True)


def test_shards_without_anything_to_score(scorer: ShardScorer) -> None:
    found = scored(scorer, [1, 1], Counted())
    assert found[1]["ifd"].null_count() == 5


def test_what_was_read_before_an_error_is_scored(scorer: ShardScorer) -> None:
    feed: Feed[Shard] = Feed(math.inf)
    feed.put(scorer.encode(0, SHARDS[0]))
    feed.end(ScorerError("the file changed"))
    shards = scorer.score(feed, Silent())
    assert next(shards)[0].index == 0
    with pytest.raises(ScorerError, match="the file changed"):
        next(shards)


@pytest.mark.parametrize("scorer", ["packed"], indirect=True)
def test_the_next_batch_is_asked_for_before_the_last_one_ends(scorer: ShardScorer) -> None:
    first, second = (scorer.encode(number, SHARDS[number]).batch for number in (0, 2))
    unfinished = len(first.rows)
    left = []

    def batches() -> Iterator[TokenBatch | None]:
        yield first
        left.append(unfinished)
        yield None  # nothing is there yet
        left.append(unfinished)
        yield second

    for scores in scorer.engine.score(batches()):
        if scores.batch is first:
            unfinished -= len(scores.spans)
    assert unfinished == 0
    assert len(first.rows) > left[0] > left[1] > 0
