"""What runs inside Ray: a reader of records, and a worker that holds an engine and writes the shards that it scores."""

from __future__ import annotations

import math
import os
import pickle
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Any

import polars as pl

from scorer.background import Background, Feed
from scorer.config import SERVERS, ScoreConfig
from scorer.data.dataset import Dataset, InputFile, input_size
from scorer.engines.choose import open_engine
from scorer.models.find import ModelFiles, find_model
from scorer.runs.environment import environment, package_versions
from scorer.runs.progress import Silent
from scorer.runs.shards import Shard, ShardScorer, open_encoder, read_shards
from scorer.runs.writer import RunWriter, Work
from scorer.types import ScorerError

SHARDS = 4  # held by a worker at a time: one is tokenised, two are with the engine, one is written


def versions(engine: str, files: ModelFiles) -> dict[str, str]:
    """The versions that a score depends on, in this process, without the build (+cpu, +cu128)."""
    found = package_versions(engine)
    return {name: text.partition("+")[0] for name, text in found.items()} | {"model": str(files.revision)}


class Reader:
    """The records of several shards, a shard a row: Ray asks for the next as its workers take them."""

    def __init__(self, config: ScoreConfig, inputs: Sequence[InputFile], counts: Sequence[int]):
        self.config, self.inputs, self.counts = config, inputs, counts

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[Any]]]:
        (stretch,) = batch["shards"]
        config = self.config
        try:
            for entry in self.inputs:
                if (found := input_size(entry.path)) != entry.size:  # a node's own copy
                    where = f"{entry.path} on {platform.node()}"
                    raise ScorerError(f"{where}: it has {found:,} bytes, and {entry.size:,} where the run began")
            paths = [entry.path for entry in self.inputs]
            with Dataset(paths, reading=config.reading, limit=config.limit, counts=self.counts) as data:
                for index, records in read_shards(data, config.shard_rows, list(map(int, stretch))):
                    yield {"index": [index], "records": [pickle.dumps(records)]}
        except ScorerError as error:  # a worker hands it on: Ray would count it as a lost shard
            yield {"index": [-1], "records": [pickle.dumps(error)]}


class Worker:
    """One engine. An error for the user comes back as a row: Ray would take it for a fault of its own."""

    def __init__(self, config: ScoreConfig, run: str, strict: bool, cpus: float, driver: Mapping[str, str]):
        self.config, self.run, self.strict, self.cpus, self.driver = config, RunWriter(run), strict, cpus, driver
        self.name = f"{platform.node()}, process {os.getpid()}"
        self.scorer: ShardScorer | None = None
        self.environment: Mapping[str, str] = {}
        # Ray calls from SHARDS threads. One of them tokenises at a time, and one thread more runs the engine.
        self.tokenising = Lock()
        self.feed: Feed[Shard] | None = None
        self.scored: dict[int, tuple[float, Future[tuple[float, pl.DataFrame]]]] = {}  # by shard: since when, and what

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        (index,), (payload,) = batch["index"], batch["records"]
        records = pickle.loads(payload)  # written by Reader
        try:
            if isinstance(records, ScorerError):
                raise records
            with self.tokenising:
                shard = self._open().encode(int(index), records)
                scored = self._submit(shard)
            seconds, table = scored.result()
            self.run.write_shard(shard.index, table, Work(shard.tokens, seconds, self.name, self.environment))
        except ScorerError as error:
            return {"records": [0], "tokens": [0], "error": [str(error)], "exit_code": [error.exit_code]}
        return {"records": [shard.count], "tokens": [shard.tokens], "error": [""], "exit_code": [0]}

    def _submit(self, shard: Shard) -> Future[tuple[float, pl.DataFrame]]:
        """Give a shard to the engine; the result is the seconds that it took, and its score table."""
        scored: Future[tuple[float, pl.DataFrame]] = Future()
        self.scored[shard.index] = time.monotonic(), scored
        if self.feed is None:
            self.feed = Feed(math.inf)  # Ray sends no more than SHARDS
            Background(self._score, self.feed)
        self.feed.put(shard)
        return scored

    def _score(self, feed: Feed[Shard]) -> None:
        """Score shards for as long as the engine works. After an error the next shard begins anew."""
        finished = 0.0
        try:
            for shard, table in self._open().score(feed, Silent()):
                begun, scored = self.scored.pop(shard.index)
                begun, finished = max(begun, finished), time.monotonic()
                scored.set_result((finished - begun, table))
        except BaseException as error:  # noqa: BLE001 (raised where the results are waited for)
            with self.tokenising:
                self.feed = None
                while self.scored:
                    self.scored.popitem()[1][1].set_exception(error)

    def _open(self) -> ShardScorer:
        """Open the engine at the first shard: Ray restarts a worker that dies in its constructor for ever."""
        if self.scorer is None:
            import torch

            config = self.config
            remote = config.engine.startswith(SERVERS)
            files = find_model(
                config.model, revision=config.revision, allow_pickle=config.allow_pickle, weights=not remote
            )
            own = versions(config.engine, files)
            different = [
                f"{name} {own.get(name, 'none')}, not {v}" for name, v in self.driver.items() if own.get(name) != v
            ]
            if different:
                raise ScorerError(
                    f"{self.name}: it has {' and '.join(different)} as where the run began; install the same there"
                )
            torch.set_num_threads(max(math.ceil(self.cpus), 1))
            self.environment = environment(config)
            encoder = open_encoder(config, files)
            encoder.set_date(self.run.manifest.began)
            self.scorer = ShardScorer(encoder, open_engine(config, files), strict=self.strict)
        return self.scorer
