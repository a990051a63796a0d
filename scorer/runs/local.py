"""Scoring in this process."""

from __future__ import annotations

import time
from contextlib import closing

from scorer.background import Background, Feed
from scorer.engines.choose import open_engine
from scorer.runs.environment import environment
from scorer.runs.progress import Progress
from scorer.runs.shards import Job, Shard, ShardScorer, read_shards
from scorer.runs.writer import Work

WINDOW_TOKENS = 1 << 20  # read and tokenised ahead of the engine, at most: some ten megabytes


def score_locally(job: Job, missing: list[int], progress: Progress) -> None:
    """The Executor of this process: shards are read and tokenised ahead, so that the engine never waits for one."""
    scorer = ShardScorer(job.encoder, job.engine or open_engine(job.config, job.files), strict=job.strict)
    feed: Feed[Shard] = Feed(WINDOW_TOKENS)

    def fill() -> None:
        try:
            for index, records in read_shards(job.data, job.config.shard_rows, missing):
                shard = scorer.encode(index, records)
                feed.put(shard, shard.size)
            feed.end()
        except BaseException as error:  # noqa: BLE001 (raised where the shards are taken)
            feed.end(error)

    with closing(scorer):
        reading = Background(fill)
        try:
            here, clock = environment(job.config), time.monotonic()
            for shard, table in scorer.score(feed, progress):
                last, clock = clock, time.monotonic()
                job.run.write_shard(shard.index, table, Work(shard.tokens, clock - last, environment=here))
        finally:
            feed.close()
            reading.cancel()
