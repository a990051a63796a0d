"""The costs of one row in scorer without the model: bytes, tokens, and seconds of one core."""

from __future__ import annotations

import gc
import io
import math
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bench.lib.rows import PROTOCOL, WARM_UP, Rows, longest
from scorer.config import ScoreConfig
from scorer.data.dataset import Dataset
from scorer.data.encode import Encoder
from scorer.data.tokenizer import BulkTokenizer
from scorer.data.writer import RecordWriter
from scorer.engines.choose import BATCH_TOKENS
from scorer.engines.packing import pack, plan_batches
from scorer.models.find import find_model
from scorer.models.load import load_tokenizer
from scorer.runs.directory import Run
from scorer.runs.run import score
from scorer.runs.shards import read_shards
from scorer.scores.measures import score_table
from scorer.tokens import Array
from scorer.types import Record

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
        encoder = Encoder(BulkTokenizer(load_tokenizer(files)), PROTOCOL, longest(files), files.document_token_id)
        encode_seconds, inside = _encode_seconds(encoder, payloads)
        encoded = [encoder.encode(_records(payload)) for payload in payloads]

        def packs() -> None:
            for _, batch in encoded:
                for sequences in plan_batches(batch, BATCH_TOKENS["packed", "cuda"]):
                    pack(batch, sequences)

        def tables() -> None:
            for turns, batch in encoded:
                nll_sums, statuses = np.ones(len(batch.rows)), np.zeros(len(batch.rows), np.uint8)
                score_table(turns, batch, nll_sums, statuses, two_views=True).write_parquet(io.BytesIO())

        run = score(lines, folder / "run", model=model, limit=scored)
        table = run.scores()
        shard_bytes, bytes_out = _shard_bytes(table, folder / "shards")
        costs = Costs(
            tokens=sum(len(batch.token_ids) for _, batch in encoded) / count,
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
    records = [record for payload in payloads for record in _records(payload)]
    return costs, Rows(count, *encoder.encode(records), encoder.encode(records[:WARM_UP])[1], encode_seconds)


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
    """Seconds of one core for all payloads, and the share inside the tokenizer's call, which is parallel."""
    gc.freeze()  # as scorer.runs.shards does
    tokenise = encoder.bulk.encode
    texts: list[list[str]] = []

    def record(batch: list[str]) -> tuple[Array, Array]:
        texts.append(batch)
        return tokenise(batch)

    encoder.bulk.encode = record
    for payload in payloads:
        encoder.encode(_records(payload))
    encoder.bulk.encode = tokenise
    whole, part = _seconds(  # measured in turn, since the two are close
        lambda: [encoder.encode(_records(payload)) for payload in payloads],
        lambda: [tokenise(batch) for batch in texts],
    )
    gc.unfreeze()
    return whole, min(part / whole, 1.0)


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
