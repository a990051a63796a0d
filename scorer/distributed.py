"""The same run on Ray: one reader, and workers that each hold an engine and write the shards that they score.

Ray Data moves the records, holds the reader back while the workers are busy, and starts again what dies. Knows Ray and
shards; nothing of formats, models or formulas.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from scorer.config import ScoreConfig
from scorer.models import ModelFiles, find_model
from scorer.places import absolute
from scorer.progress import Progress, Silent
from scorer.rundir import Run
from scorer.shards import ShardScorer, read_shards
from scorer.types import EngineError, ScorerError

CONNECT_SECONDS = 30
# Of a CPU: the reader's, and what is left to Ray Data's own tasks. Workers that took the whole cluster would wait for
# ever for records that nobody has a CPU to read.
READER_CPUS = 0.25
SPARE_CPUS = 0.5


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a run is spread to, and how: `local` starts a Ray of this machine, else the address of one that runs.

    workers: engines; None: as many as there are GPUs for, and one where there is none. gpus_per_worker: shares are
    allowed; None: 1 where the device is a GPU. cpus_per_worker: None: 1 beside a GPU, else an even share of all CPUs.
    """

    address: str = "local"
    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "gpus_per_worker", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ScorerError(f"{name}: {value} is not above 0")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of Ray."""

    workers: int
    gpus: float
    cpus: float


def plan(cluster: Cluster, device: str, has: Mapping[str, float]) -> Plan:
    """How many workers, of what size, on a cluster that `has` CPU and GPU.

    Raises ScorerError where it has too little: Ray would wait for ever.
    """
    cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
    each_gpu = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(device == "cuda")
    workers = cluster.workers or (max(math.floor(gpus / each_gpu), 1) if each_gpu else 1)
    free = cpus - SPARE_CPUS
    each_cpu = cluster.cpus_per_worker or (min(1.0, free / workers) if each_gpu else free / workers)
    there = f"the cluster has {gpus:g} GPUs and {cpus:g} CPUs"
    if workers * each_gpu > gpus:
        raise ScorerError(f"{workers} workers of {each_gpu:g} GPUs need {workers * each_gpu:g}, and {there}")
    if each_cpu <= 0 or workers * each_cpu > free:
        raise ScorerError(
            f"{workers} workers of {each_cpu:g} CPUs, and {SPARE_CPUS} to feed them, are too many: {there}"
        )
    return Plan(workers, each_gpu, math.floor(each_cpu * 100) / 100)


def score_on_ray(
    run: Run,
    config: ScoreConfig,
    files: ModelFiles,
    paths: list[str],
    missing: list[int],
    cluster: Cluster,
    *,
    strict: bool,
    progress: Progress,
    wrote: Callable[[int, float, str], None],
) -> None:
    """Score the shards numbered `missing`. `wrote` is told the tokens and seconds of each on disk, and by whom.

    Raises ScorerError where the cluster can't be reached or is too small, EngineError where it fails.
    """
    # Names as every worker understands them, whatever its working directory.
    paths = [absolute(path) for path in paths]
    if files.origin == "directory":
        config = replace(config, model=str(files.path))
    with connected(cluster.address) as ray:
        size = plan(cluster, config.device, ray.cluster_resources())
        progress.say(f"Ray: {size.workers} workers of {size.cpus:g} CPUs and {size.gpus:g} GPUs")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # A shard is a block of its own, which any worker may take: Ray would gather 128 MiB of them for one.
        context.target_min_block_size = context.target_max_block_size = 1
        shards = ray.data.from_items([{"paths": paths}], override_num_blocks=1).map_batches(
            _Reader(config, missing), batch_size=1, num_cpus=READER_CPUS
        )
        scored = shards.map_batches(
            _Worker,
            fn_constructor_args=(config, absolute(run.path), strict, size.cpus),
            batch_size=1,
            concurrency=size.workers,
            num_cpus=size.cpus,
            num_gpus=size.gpus or None,
        )
        try:
            for row in scored.iter_rows():
                if row["error"]:
                    kind = EngineError if row["exit_code"] == EngineError.exit_code else ScorerError
                    raise kind(row["error"])
                progress.advance(row["records"], row["tokens"])
                wrote(row["tokens"], row["seconds"], row["by"])
        except ray.exceptions.RayError as error:
            raise EngineError(
                f"Ray failed ({' '.join(str(error).split())[-300:]}); the same command resumes"
            ) from error


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, of this machine or at `address`."""
    if find_spec("ray") is None:
        raise ScorerError("--ray needs Ray: pip install 'ifd-scorer[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():  # which Ray would try for minutes
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise ScorerError(f"--ray {address}: no Ray there ({error})") from error
    import ray
    import ray.data

    try:
        ray.init(
            address=address,
            ignore_reinit_error=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        raise ScorerError(f"--ray {address}: {' '.join(str(error).split())[:300]}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


class _Reader:
    """All records that are still to be scored, a shard a row: Ray asks for the next as its workers take them."""

    def __init__(self, config: ScoreConfig, missing: list[int]):
        self.config, self.missing = config, missing

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[Any]]]:
        (paths,) = batch["paths"]
        for index, records in read_shards(list(paths), self.config, self.missing):
            yield {"index": [index], "records": [pickle.dumps(records)]}


class _Worker:
    """One engine. What it raises for the user comes back as a row: Ray would take it for a fault of its own."""

    def __init__(self, config: ScoreConfig, run: str, strict: bool, cpus: float):
        import torch

        torch.set_num_threads(max(math.ceil(cpus), 1))
        self.run, self.name = Run(run), f"{platform.node()}, process {os.getpid()}"
        self.error: ScorerError | None = None
        try:
            files = find_model(config.model, revision=config.revision, allow_pickle=config.allow_pickle)
            self.scorer = ShardScorer(config, files, strict=strict)
        except ScorerError as error:
            self.error = error

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        clock = time.monotonic()
        (index,), (payload,) = batch["index"], batch["records"]
        records = pickle.loads(payload)  # what our own reader wrote
        tokens, error = 0, self.error
        if error is None:
            try:
                shard = self.scorer.encode(records)
                self.run.write_shard(int(index), self.scorer.score(shard, Silent()))
                tokens = shard.tokens
            except ScorerError as fault:
                error = fault
        return {
            "records": [len(records)],
            "tokens": [tokens],
            "seconds": [time.monotonic() - clock],
            "by": [self.name],
            "error": [str(error) if error else ""],
            "exit_code": [error.exit_code if error else 0],
        }
