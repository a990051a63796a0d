"""Scoring in this process."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing

from scorer.background import Background
from scorer.runs.progress import Progress
from scorer.runs.shards import FinishedShard, Job, ShardScorer, read_shards


def score_locally(job: Job, missing: list[int], progress: Progress) -> Generator[FinishedShard, None, None]:
    """The Executor of this process: the next shard is read and tokenised while the engine scores this one."""
    scorer = ShardScorer(job.config, job.files, strict=job.strict, encoder=job.encoder)
    with closing(scorer):
        records = read_shards(job.data, job.config.shard_rows, missing)
        shards = ((index, scorer.encode(chunk)) for index, chunk in records)
        upcoming = Background(next, shards, None)
        try:
            while (following := upcoming.result()) is not None:
                upcoming = Background(next, shards, None)
                clock = time.monotonic()
                index, shard = following
                job.run.write_shard(index, scorer.score(shard, progress))
                yield FinishedShard(shard.tokens, time.monotonic() - clock, "this process")
        finally:
            upcoming.cancel()
