"""The costs of one row in scorer without the model: bytes, tokens, and seconds of one core."""

from __future__ import annotations

import math
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from bench.host import encoder_of, microseconds, read, repeat, stage_costs
from bench.lib.rows import Rows, encoded, longest
from scorer.data.dataset import Dataset
from scorer.models.find import find_model
from scorer.runs.run import score
from scorer.runs.shard_file import ShardInfo, write_shard_file
from scorer.runs.writer import RunWriter

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
    """The costs of the rows of `data`, and the rows, encoded by the model's tokenizer under PROTOCOL of bench.lib.rows.

    A real run scores `scored` of them to measure the size of shards.
    """
    files, size = find_model(model), len(list(Dataset([data]).rows()))
    count = size * math.ceil(TIMED_ROWS / size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines, parquet, once = (folder / file for file in ("rows.jsonl", "rows.parquet", "once.parquet"))
        repeat(data, count, lines)
        repeat(data, count, parquet)
        repeat(data, size, once)  # Parquet stores repeated rows in fewer bytes

        def seconds(work: Callable[[], object]) -> float:
            return microseconds(work, count)["core_us"] / 1e6

        spent = stage_costs(lines, count, encoder_of(model))
        stages = {stage: cost["core_us"] / 1e6 for stage, cost in spent.items()}
        shards = read(lines)
        payloads = list(map(pickle.dumps, shards))
        pickling = seconds(lambda: list(map(pickle.dumps, shards)))
        encoding = seconds(lambda: list(map(pickle.loads, payloads))) + stages["tokenise"] + stages["lay out"]
        sample = encoded(str(lines), count, files, longest(files))
        table = score(lines, folder / "run", model=model, limit=scored).scores()
        shard_bytes, bytes_out = _shard_bytes(table, folder / "shards")
        return Costs(
            tokens=sample.tokens / count,
            bytes_in=lines.stat().st_size / count,
            read_seconds=stages["read"] + pickling,
            count_seconds=stages["hash and count"],
            encode_seconds=encoding,
            encode_parallel=stages["tokenise"] / encoding,
            pack_seconds=stages["pack"],
            table_seconds=stages["score table"] + stages["write"],
            bytes_out=bytes_out,
            shard_bytes=shard_bytes,
            memory_bytes=table.estimated_size() / len(table),
            parquet_bytes_in=once.stat().st_size / size,
            parquet_read_seconds=seconds(lambda: read(parquet)) + pickling,
        ), sample


def _shard_bytes(table: pl.DataFrame, folder: Path) -> tuple[float, float]:
    """Bytes of a shard without rows and of each row, from two shards, one with half the rows."""
    shards = RunWriter(folder)
    half = len(table) // 2
    with shards.locked():
        for index, rows in enumerate((table, table[:half])):
            write_shard_file(shards.shard(index), rows, ShardInfo(run_id="", index=index, records=0, rows=rows.height))
    large, small = (path.stat().st_size for path in shards.shards())
    each = (large - small) / (len(table) - half)
    return large - each * len(table), each
