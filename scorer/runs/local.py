"""Scoring in this process: the next shard is read and tokenised while the engine scores this one."""

from __future__ import annotations

import time
from contextlib import closing

from scorer.background import Background
from scorer.config import ScoreConfig
from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.runs.progress import Progress
from scorer.runs.shards import ShardScorer, Wrote, read_shards


def _score_here(
    run: Run,
    config: ScoreConfig,
    files: ModelFiles,
    paths: list[str],
    missing: list[int],
    strict: bool,
    progress: Progress,
    wrote: Wrote,
) -> None:
    """Score the missing shards in this process."""
    scorer = ShardScorer(config, files, strict=strict)
    with closing(scorer):
        records = read_shards(paths, config, missing, run.manifest.get("input_records", ()))
        shards = ((index, scorer.encode(chunk)) for index, chunk in records)
        upcoming = Background(next, shards, None)
        try:
            while (following := upcoming.result()) is not None:
                # The next shard is read and tokenised while the engine scores this one.
                upcoming = Background(next, shards, None)
                clock = time.monotonic()
                index, shard = following
                run.write_shard(index, scorer.score(shard, progress))
                wrote(shard.tokens, time.monotonic() - clock, "this process")
        finally:
            upcoming.cancel()
