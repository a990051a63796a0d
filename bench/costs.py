"""The costs of one row in scorer without the model: bytes, tokens, and seconds of one core."""

from __future__ import annotations

import gc
import io
import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from bench.lib.rows import PROTOCOL, Rows, longest
from scorer.config import ScoreConfig
from scorer.data.dataset import Dataset
from scorer.data.encode import Encoder
from scorer.data.writer import RecordWriter
from scorer.engines.choose import BATCH_TOKENS
from scorer.engines.packing import pack, plan_batches
from scorer.models.find import find_model
from scorer.models.load import load_tokenizer
from scorer.runs.directory import Run
from scorer.runs.run import score
from scorer.runs.shards import read_shards
from scorer.scores.measures import score_table
from scorer.types import Record, SpanNLL

REPEATS = 8
TIMED_ROWS = 5000  # at least; the data are repeated


@dataclass(frozen=True, slots=True)
class Costs:
    """Means of a row. Bytes in and the reader's seconds are for JSON Lines, unless named for Parquet."""

    tokens: float  # of both views
    bytes_in: float
    read_seconds: float  # parse, and pickle for a worker
    count_seconds: float  # count, before a run starts
    encode_seconds: float  # unpickle and tokenise
    encode_parallel: float  # the share of encode_seconds that the tokenizer spreads over cores
    pack_seconds: float
    table_seconds: float  # make the score table, as Parquet
    bytes_out: float  # in a shard, beyond `shard_bytes`
    shard_bytes: float  # of a shard without rows
    memory_bytes: float  # of the score table in memory
    parquet_bytes_in: float = 0
    parquet_read_seconds: float = 0


def measure(data: str, scored: int, model: str) -> tuple[Costs, Rows]:
    """The costs of the rows of `data`, and the rows, encoded by the model's tokenizer under PROTOCOL.

    A real run scores `scored` of them to measure the size of shards.
    """
    values = [raw.value for raw in Dataset([data]).rows()]
    files = find_model(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once = {kind: _written(folder / f"once.{kind}", values) for kind in ("jsonl", "parquet")}
        often = values * math.ceil(TIMED_ROWS / len(values))
        timed = {kind: str(_written(folder / f"often.{kind}", often)) for kind in once}
        lines, count = timed["jsonl"], len(often)
        payloads = _read(lines, count)
        encoder = Encoder(load_tokenizer(files), PROTOCOL, longest(files), files.document_token_id)
        encode_seconds, inside = _encode_seconds(encoder, payloads)
        encoded = [encoder.encode(_records(payload)) for payload in payloads]

        @_one_core()
        def packs() -> None:
            for _, sequences in encoded:
                for batch in plan_batches(sequences, BATCH_TOKENS["packed", "cuda"]):
                    pack(batch)

        def tables() -> None:
            for turns, sequences in encoded:
                spans = [SpanNLL(s.record_id, t.turn, s.view, 1.0, 1) for s in sequences for t in s.targets]
                score_table(turns, spans, two_views=True).write_parquet(io.BytesIO())

        run = score(lines, folder / "run", model=model, limit=scored)
        table = run.scores()
        shard_bytes, bytes_out = _shard_bytes(table, folder / "shards")
        costs = Costs(
            tokens=sum(len(s.token_ids) for _, sequences in encoded for s in sequences) / count,
            bytes_in=once["jsonl"].stat().st_size / len(values),
            read_seconds=_seconds(lambda: _read(lines, count))[0] / count,
            count_seconds=_seconds(Dataset([lines]).inspect)[0] / count,
            encode_seconds=encode_seconds / count,
            encode_parallel=inside,
            pack_seconds=_seconds(packs)[0] / count,
            table_seconds=_seconds(tables)[0] / count,
            bytes_out=bytes_out,
            shard_bytes=shard_bytes,
            memory_bytes=table.estimated_size() / len(table),
            parquet_bytes_in=once["parquet"].stat().st_size / len(values),
            parquet_read_seconds=_seconds(lambda: _read(timed["parquet"], count))[0] / count,
        )
    turns = [turn for turns, _ in encoded for turn in turns]
    return costs, Rows(count, turns, [s for _, sequences in encoded for s in sequences], encode_seconds)


def _written(path: Path, values: list[Any]) -> Path:
    with RecordWriter(path) as writer:
        for value in values:
            writer.write(value)
    return path


def _read(path: str, rows: int) -> list[bytes]:
    """Read rows as the reader of a run on Ray does: pickled records for its workers."""
    shard_rows = ScoreConfig().shard_rows
    shards = list(range(math.ceil(rows / shard_rows)))
    return [pickle.dumps(records) for _, records in read_shards(Dataset([path]), shard_rows, shards)]


def _records(payload: bytes) -> list[Record]:
    records: list[Record] = pickle.loads(payload)  # as a worker does
    return records


def _encode_seconds(encoder: Encoder, payloads: list[bytes]) -> tuple[float, float]:
    """Seconds of one core for all payloads, and the share inside the tokenizer's batch call, which is parallel."""
    gc.freeze()  # as scorer.runs.shards does
    tokenizer = encoder.tokenizer
    texts: list[list[str]] = []

    def record(batch: list[str], **options: Any) -> Any:
        texts.append(batch)
        return tokenizer(batch, **options)

    with _one_core():
        encoder.tokenizer = record
        for payload in payloads:
            encoder.encode(_records(payload))
        encoder.tokenizer = tokenizer
        inside = tokenizer.backend_tokenizer
        whole, part = _seconds(  # measured in turn, since the two are close
            lambda: [encoder.encode(_records(payload)) for payload in payloads],
            lambda: [inside.encode_batch(batch, add_special_tokens=False) for batch in texts],
        )
    gc.unfreeze()
    return whole, min(part / whole, 1.0)


@contextmanager
def _one_core() -> Iterator[None]:
    """Restrict tokenizers and torch to the calling thread."""
    name = "TOKENIZERS_PARALLELISM"
    before, threads = os.environ.get(name), torch.get_num_threads()
    os.environ[name] = "false"
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _shard_bytes(table: pl.DataFrame, folder: Path) -> tuple[float, float]:
    """Bytes of a shard without rows and of each row, from two shards, one with half the rows."""
    shards = Run(folder)
    (folder / "scores").mkdir(parents=True)
    half = len(table) // 2
    shards.write_shard(0, table)
    shards.write_shard(1, table[:half])
    large, small = (path.stat().st_size for path in shards.shards())
    each = (large - small) / (len(table) - half)
    return large - each * len(table), each


def _seconds(*works: Callable[[], object]) -> list[float]:
    """The best CPU time of each, run in turn: other processes affect it least."""
    best = [math.inf] * len(works)
    for _ in range(REPEATS):
        for number, work in enumerate(works):
            start = time.process_time()
            work()
            best[number] = min(best[number], time.process_time() - start)
    return best
