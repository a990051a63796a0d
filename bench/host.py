"""The host's part by itself: from JSON Lines to packed batches and score tables, with an engine that computes nothing.

It bounds what a GPU can be fed: rows a second of the whole path, and what each stage takes of a core and of the
interpreter, which only one thread holds at a time.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.rows import PROTOCOL, longest
from scorer.config import DEFAULT_MODEL, ScoreConfig
from scorer.data.dataset import Dataset
from scorer.encoding.encoder import Encoder
from scorer.engines.choose import BATCH_TOKENS
from scorer.engines.packed import CUDA_THREADS, PackedEngine
from scorer.engines.packing import PackedBatch, pack, plan_batches
from scorer.files.writer import RecordWriter
from scorer.models.find import find_model
from scorer.runs.local import score_locally
from scorer.runs.manifest import Manifest
from scorer.runs.progress import Silent
from scorer.runs.shards import Job, open_encoder
from scorer.runs.writer import RunWriter
from scorer.scores.measures import score_table
from scorer.tokens import Array, TokenBatch, TurnTable
from scorer.types import Record

REPEATS = 5
STAGE_ROWS = 5_000  # at most
BUDGET = BATCH_TOKENS["packed", "cuda"]


class NoModel(PackedEngine):
    """The packed engine as it is on a GPU, but every token has an NLL of 1."""

    def __init__(self) -> None:
        self.batch_tokens, self.vocab_size = BUDGET, 1 << 30
        self.device, self.workers = torch.device("cuda"), CUDA_THREADS  # nothing is moved there
        self.pool = ThreadPoolExecutor(self.workers)

    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        return batch.offsets.diff().double()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def run(data: str, rows: int, console: Console) -> dict[str, Any]:
    """Measure and print; returns the report."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        path, small = Path(name) / "rows.jsonl", Path(name) / "some.jsonl"
        repeat(data, rows, path)
        repeat(data, min(rows, STAGE_ROWS), small)
        bytes_in = path.stat().st_size / rows
        encoder = encoder_of(DEFAULT_MODEL)
        stages = stage_costs(small, min(rows, STAGE_ROWS), encoder)
        for cores in sorted({1, 2, len(os.sched_getaffinity(0))}):
            # A process of its own: libraries start their threads when they are first used.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[str(cores)] = pool.apply(whole_path, (path, Path(name) / f"run-{cores}", cores))
    _show(console, stages, found)
    return {
        "data": Path(data).name,
        "rows": rows,
        "bytes_a_row": bytes_in,
        "tokenizer": encoder.bulk.name,
        "stages": stages,
        "held_us": sum(stage["held_us"] for stage in stages.values()),
        "cores": found,
        "rows_per_second": found[str(cores)]["rows_per_second"],
    }


def stage_costs(path: Path, rows: int, encoder: Encoder) -> dict[str, dict[str, float]]:
    """Each stage's microseconds a row: of one core, and of the thread that runs it.

    The latter is the most for which the stage can hold the interpreter: other threads, such as those of the tokenizer
    and of Polars, don't need it.
    """
    texts: list[list[str]] = []
    tokenise = encoder.bulk.encode

    def record(some: list[str]) -> tuple[Array, Array]:
        texts.append(some)
        return tokenise(some)

    shards = read(path)
    encoder.bulk.encode = record
    encoded = [encoder.encode(records) for records in shards]
    encoder.bulk.encode = tokenise
    tables = [_table(*one) for one in encoded]
    works: dict[str, Callable[[], object]] = {
        "hash and count": lambda: Dataset([path]).inspect(),
        "read": lambda: read(path),
        "tokenise": lambda: list(map(tokenise, texts)),
        "lay out": lambda: list(map(encoder.encode, shards)),
        "pack": lambda: [pack(batch, part) for _, batch in encoded for part in plan_batches(batch, BUDGET)],
        "score table": lambda: [_table(*one) for one in encoded],
        "write": lambda: [table.write_parquet(io.BytesIO()) for table in tables],
    }
    costs = {name: microseconds(work, rows) for name, work in works.items()}
    costs["lay out"] = {name: value - costs["tokenise"][name] for name, value in costs["lay out"].items()}
    return costs


def whole_path(path: Path, run: Path, cores: int) -> dict[str, float]:
    """Rows a second on some cores, from the first look at the file to the last shard written; and the peak memory."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(1)
    encoder, directory = encoder_of(DEFAULT_MODEL), RunWriter(run)
    config = ScoreConfig(max_length=encoder.max_length, batch_tokens=BUDGET)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    with Dataset([path]) as data, directory.locked():
        data.inspect()
        rows = sum(data.counts)
        manifest = Manifest(identity={"config": {"shard_rows": config.shard_rows}}, ranking={}, records=rows)
        directory.write_manifest(manifest)
        job = Job(directory, data, config, find_model(config.model), encoder, engine=NoModel())
        score_locally(job, directory.missing(), Silent())
        with directory.snapshot() as table:
            tokens = sum(info.tokens for info in table.infos)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "rows_per_second": rows / seconds,
        "tokens_per_second": tokens / seconds,
        "core_us": cpu / rows * 1e6,
        "peak_memory_mib": after.ru_maxrss / 1024,
        "peak_memory_growth_mib": (after.ru_maxrss - before.ru_maxrss) / 1024,
    }


def encoder_of(model: str) -> Encoder:
    """The encoder of a model's tokenizer under PROTOCOL."""
    files = find_model(model)
    return open_encoder(ScoreConfig(protocol=PROTOCOL.name, max_length=longest(files)), files)


def repeat(data: str, rows: int, path: Path) -> None:
    """Write a file of `rows` rows: those of `data`, from the first again after the last."""
    with Dataset([data]) as dataset, RecordWriter(path) as writer:
        values = [raw.value for raw in dataset.rows()]
        for row in range(rows):
            writer.write(values[row % len(values)])


def read(path: Path) -> list[list[Record]]:
    """The records of a file, in shards of the default size."""
    records, shard_rows = Dataset([path]).records(), ScoreConfig().shard_rows
    return list(iter(lambda: list(islice(records, shard_rows)), []))


def _table(turns: TurnTable, batch: TokenBatch) -> pl.DataFrame:
    nll_sums, statuses = np.ones(len(batch.rows)), np.zeros(len(batch.rows), np.uint8)
    return score_table(turns, batch, nll_sums, statuses, two_views=True)


def microseconds(work: Callable[[], object], rows: int) -> dict[str, float]:
    """Of one core and of the calling thread, for each row. The least of REPEATS: other processes affect it least."""
    times = []
    gc.freeze()  # as scorer.runs.shards does
    for _ in range(REPEATS):
        core, thread = time.process_time(), time.thread_time()
        work()
        times.append((time.process_time() - core, time.thread_time() - thread))
    gc.unfreeze()
    core, thread = min(times)
    return {"core_us": core / rows * 1e6, "held_us": thread / rows * 1e6}


def _show(console: Console, stages: dict[str, dict[str, float]], found: dict[str, dict[str, float]]) -> None:
    shown = Table("stage", "µs of a core a row", "µs of the interpreter, at most")
    for name, cost in stages.items():
        shown.add_row(name, f"{cost['core_us']:.1f}", f"{cost['held_us']:.1f}")
    shown.add_row("all", *(f"{sum(cost[name] for cost in stages.values()):.1f}" for name in ("core_us", "held_us")))
    console.print(shown)
    for cores, figures in found.items():
        rows, tokens = figures["rows_per_second"], figures["tokens_per_second"]
        peak = f"{figures['peak_memory_mib']:,.0f} MiB at the peak"
        console.print(f"{cores} cores: {rows:,.0f} rows/s, {tokens:,.0f} tokens/s, {peak}")
