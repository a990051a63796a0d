"""A run on Ray: readers, and workers that each hold an engine and write the shards that they score.

Ray Data moves the records, holds the readers back while the workers are busy, and restarts what dies. A shard that dies
with its worker is missing on disk after the pass, and the next pass scores it. What workers do is in ray_worker.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import queue
import re
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from scorer.background import Background
from scorer.config import Cluster
from scorer.runs.progress import Progress
from scorer.runs.ray_worker import SHARDS, Reader, Worker, versions
from scorer.runs.shards import Job
from scorer.storage.paths import absolute
from scorer.types import EngineError, ScorerError

SETTINGS = {  # environment variables that Ray reads when it is imported
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_worker_niceness": "0",  # else workers of a local Ray yield to every other process
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a late call after the run would start Ray again
}
CONNECT_SECONDS = 25
# The defaults try for minutes: 20 times, each 10 seconds longer.
CONNECT = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_py_gcs_connect_timeout_s": "15"}
RAY_DATA_THREADS = ("StreamingExecutor-", "ray-data-metadata-prefetch", "iter_threaded")
STOP_SECONDS = 10.0  # that they have to end
SILENCE_SECONDS = 60  # without a shard, before the user is told; then after twice as long each time
# Passes over the missing shards, one after another, that score none, before the run ends. One may: a death ends it.
MAX_PASSES_WITHOUT_PROGRESS = 3
GONE_SECONDS = 600  # without any node that a worker fits on, before the run ends
# A reader reserves no CPU: it would wait for ever where workers have taken them all, as they do when a node dies and
# its workers start again on the other nodes.
READER_CPUS = 0
WORKERS_A_READER = 2  # what one reader feeds with a weak model on a large GPU: bench/SCALING.md


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """How many workers to ask Ray for, and the GPUs and CPUs of each."""

    workers: int
    gpus: float
    cpus: float

    def fits(self, nodes: Sequence[Mapping[str, float]]) -> bool:
        """Whether all workers fit on `nodes`."""
        return sum(self._places(node) for node in nodes) >= self.workers

    def _places(self, node: Mapping[str, float]) -> int:
        needs = ((self.cpus, node.get("CPU", 0.0)), (self.gpus, node.get("GPU", 0.0)))
        return min(math.floor(has / each + 1e-6) for each, has in needs if each)  # 1e-6: 0.3 / 0.1 is less than 3


def plan_workers(cluster: Cluster, nodes: Sequence[Mapping[str, float]]) -> WorkerPlan:
    """The workers for a cluster of `nodes`, each given by its CPUs and GPUs.

    Raises ScorerError where not all workers would ever fit: Ray would wait for ever.
    """
    gpus = cluster.gpus_per_worker or 0.0
    room = sum(math.floor(node.get("GPU", 0.0) / gpus + 1e-6) for node in nodes) if gpus else 1
    workers = cluster.workers or max(room, 1)
    shares = {math.floor(node.get("CPU", 0.0) / n * 100) / 100 for node in nodes for n in range(1, workers + 1)}
    even = sorted({min(share, 1.0) if gpus else share for share in shares} - {0.0}, reverse=True)
    for cpus in [cluster.cpus_per_worker] if cluster.cpus_per_worker else even:
        if (found := WorkerPlan(workers, gpus, cpus)).fits(nodes):
            return found
    size = f"{gpus:g} GPUs and " + (
        f"{cluster.cpus_per_worker:g} CPUs" if cluster.cpus_per_worker else "a part of a CPU"
    )
    raise ScorerError(f"{workers} workers of {size} each do not fit: {_describe_nodes(nodes)}")


def _describe_nodes(nodes: Sequence[Mapping[str, float]]) -> str:
    """The cluster's resources, for a message."""
    alike = Counter((node.get("GPU", 0.0), node.get("CPU", 0.0)) for node in nodes)
    gpus, cpus = (sum(each[which] * count for each, count in alike.items()) for which in (0, 1))
    words = ", ".join(f"{count} of {gpu:g} and {cpu:g}" for (gpu, cpu), count in sorted(alike.items(), reverse=True))
    return f"the cluster has {gpus:g} GPUs and {cpus:g} CPUs" + (f" (nodes: {words})" if len(nodes) > 1 else "")


def score_on_ray(job: Job, missing: list[int], progress: Progress, *, cluster: Cluster) -> None:
    """The Executor of a Ray cluster.

    Raises ScorerError where the cluster can't be reached or is too small, EngineError where it fails.
    """
    if cluster.gpus_per_worker is None and job.config.device == "cuda":
        cluster = replace(cluster, gpus_per_worker=job.config.tensor_parallel_size or 1)
    with connected(cluster.address) as ray:
        size = plan_workers(cluster, _nodes(ray))
        progress.say(f"Ray: {size.workers} workers of {size.cpus:g} CPUs and {size.gpus:g} GPUs")
        free = ray.available_resources()
        if size.workers * size.cpus > free.get("CPU", 0.0) or size.workers * size.gpus > free.get("GPU", 0.0):
            progress.say(f"Ray: others hold a part of it now, and workers wait for that: {_describe_free(ray)}")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # One block a shard, which any worker may take: by default Ray gathers 128 MiB of them for one worker.
        context.target_min_block_size = context.target_max_block_size = 1
        passes_without_progress = 0
        while missing:
            # A pass goes on without shards that died with their workers, but not for ever: where every worker dies, Ray
            # would restart them again and again.
            context.max_errored_blocks = min(4 * size.workers, len(missing) - 1)
            fault = _one_pass(ray, job, missing, size, progress)
            # A pass that broke off is a reference cycle that keeps its workers, and these the room for the next ones.
            gc.collect()
            before, missing = missing, job.run.missing()
            passes_without_progress = passes_without_progress + 1 if len(missing) == len(before) else 0
            if passes_without_progress == MAX_PASSES_WITHOUT_PROGRESS:
                raise EngineError(
                    f"Ray: no worker lived to score shard {missing[0]} or a later one, for want of memory perhaps; the "
                    f"last fault was: {fault}"
                )
            if missing:
                progress.say(f"Ray: workers died; going on with the {len(missing)} shards that are not done")


def _one_pass(ray: Any, job: Job, missing: list[int], size: WorkerPlan, progress: Progress) -> str:
    """Let one run of Ray Data score the missing shards. Returns what ended it early, or ""."""
    try:
        with closing(_rows(ray, _dataset(ray, job, missing, size), size, progress)) as rows:
            for row in rows:
                if row["error"]:
                    kind = EngineError if row["exit_code"] == EngineError.exit_code else ScorerError
                    raise kind(row["error"])
                progress.advance(row["records"], row["tokens"])
    except ray.exceptions.RayError as error:
        return _root_cause(str(error))
    return ""


def _dataset(ray: Any, job: Job, missing: list[int], size: WorkerPlan) -> Any:
    """The Ray dataset that scores the missing shards: a row for each, as Worker returns it."""
    config, files = job.config, job.files
    # Names that hold in every working directory.
    if files.origin == "directory":
        config = replace(config, model=str(files.path))
    elif files.origin == "hub":
        config = replace(config, revision=files.revision)
    reader = Reader(config, job.data.inputs, job.data.counts)
    worker = (config, absolute(job.run.path), job.strict, size.cpus, versions(config.engine, files))
    workers = min(size.workers, len(missing))
    readers = math.ceil(workers / WORKERS_A_READER)
    length = math.ceil(len(missing) / readers)
    stretches = [{"shards": missing[begin : begin + length]} for begin in range(0, len(missing), length)]
    with warnings.catch_warnings():  # for the last two options, which have no successor yet
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        read = ray.data.from_items(stretches, override_num_blocks=len(stretches)).map_batches(
            reader, batch_size=1, num_cpus=READER_CPUS
        )
        return read.map_batches(
            Worker,
            fn_constructor_args=worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=workers, max_tasks_in_flight_per_actor=SHARDS, enable_true_multi_threading=True
            ),
            max_concurrency=SHARDS,
            num_cpus=size.cpus,
            num_gpus=size.gpus or None,
            # A worker restarts where there is room. Its shards do not wait for it, as they would by default: there may
            # be no room left, and other workers go on.
            max_restarts=-1,
            max_task_retries=0,
        )


def _root_cause(text: str) -> str:
    """The exception that a fault began with, out of the tracebacks in Ray's message."""
    found = re.search(r"^(?:\w+\.)*\w*(?:Error|Exception): .*", text, re.MULTILINE)
    return " ".join((found[0] if found else text).split())[:300]


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _describe_free(ray: Any) -> str:
    free = ray.available_resources()
    return f"{free.get('GPU', 0.0):g} GPUs and {free.get('CPU', 0.0):g} CPUs are free, {_describe_nodes(_nodes(ray))}"


def _rows(ray: Any, dataset: Any, size: WorkerPlan, progress: Progress) -> Generator[dict[str, Any], None, None]:
    """The rows of `dataset` as they come. Tells the user of silence; raises EngineError where no node is left."""
    rows: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            for row in dataset.iter_rows():
                rows.put(row)
            rows.put(None)
        except Exception as error:  # noqa: BLE001 (raised where it is heard)
            rows.put(error)

    listener = Background(listen)
    quiet = gone = 0  # times in a row that no row came, and that no node had room for a worker
    try:
        while True:
            try:
                row = rows.get(timeout=SILENCE_SECONDS)
            except queue.Empty:
                quiet += 1
                gone = 0 if replace(size, workers=1).fits(_nodes(ray)) else gone + 1
                if gone * SILENCE_SECONDS >= GONE_SECONDS:
                    raise EngineError(
                        f"Ray: no node is left for a worker: {_describe_free(ray)}; the same command resumes"
                    ) from None
                if quiet.bit_count() == 1:  # after 1, 2, 4, 8 minutes
                    progress.say(f"Ray: no shard for {quiet * SILENCE_SECONDS} s: {_describe_free(ray)}")
                continue
            if row is None:
                return
            if isinstance(row, Exception):
                raise row
            quiet = gone = 0
            yield row
    finally:
        # Ray Data stops with it, as at a Ctrl-C. A pass that outlives Ray would end this process with Ray's exit code.
        listener.cancel()


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, of this machine or at `address`. Raises ScorerError where there is none, or one of another version."""
    where = (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address
    named = f"--ray {address}" + (f" (RAY_ADDRESS is {where})" if where != address else "")
    if where.startswith("ray://"):
        raise ScorerError(
            f"{named}: Ray Data does not run through Ray's client; run scorer on a node of the cluster, with "
            "--ray auto, or submit it there as a Ray job"
        )
    host, _, port = where.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise ScorerError(f"{named}: no Ray there ({error})") from error
    for name, value in (SETTINGS if where == "local" else SETTINGS | CONNECT).items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    try:
        ray.init(
            address=where,
            ignore_reinit_error=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if where == "local" else None,  # a cluster has its own, or none
        )
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        raise ScorerError(f"{named}: {' '.join(str(error).split())[:300]}") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # else a traceback for each lost shard
    try:
        yield ray
    finally:
        # A thread of Ray Data that outlives Ray would end this process with Ray's exit code.
        until = time.monotonic() + STOP_SECONDS
        for thread in threading.enumerate():
            if thread.name.startswith(RAY_DATA_THREADS):
                thread.join(max(0.0, until - time.monotonic()))
        ray.shutdown()
