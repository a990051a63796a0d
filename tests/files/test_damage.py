"""Files that were damaged: whatever is in them, reading gives rows or one line that says what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from scorer.data.dataset import Dataset
from scorer.data.subset import Subset
from scorer.files.writer import RecordWriter
from scorer.types import RowStatus, ScorerError

MUTATIONS = 500
ROWS = [
    {"instruction": f'Say {i}, or "é".', "output": "It is said. " * i, "tags": [i, None], "about": {"n": i / 3}}
    for i in range(12)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = b"instruction,output\n" + b"".join(b'"Say ""%d"",\nnow","It."\n' % i for i in range(12))
TABLE = pa.table({name: [row[name] for row in ROWS] for name in ROWS[0]})


def parquet(**options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(TABLE.append_column("at", pa.array(range(12), pa.timestamp("us"))), buffer, 5, **options)
    return buffer.getvalue()


def arrow(make: Callable[..., pa.RecordBatchWriter]) -> bytes:
    buffer = io.BytesIO()
    with make(buffer, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=5)
    return buffer.getvalue()


SEEDS: list[tuple[str, bytes]] = [
    ("a.jsonl", LINES),
    ("a.json", json.dumps(ROWS, indent=1).encode()),
    ("a.json", json.dumps({"rows": ROWS}).encode()),
    ("a.csv", CSV),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
    ("a.csv.zst", zstandard.compress(CSV)),
    ("a.parquet", parquet()),
    ("a.parquet", parquet(compression="none", use_dictionary=False)),
    ("a.parquet", parquet(compression="zstd", data_page_version="2.0")),
    ("a.arrow", arrow(pa.ipc.new_stream)),
    ("a.feather", arrow(pa.ipc.new_file)),
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with one to three faults, as disks, transfers and editors make them."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice((1, 4, 30, 400)))
        span = data[start:end]
        to = draw.randrange(len(data) + 1)
        match draw.randrange(7):
            case 0 if span:
                data[start] ^= 1 << draw.randrange(8)
            case 1:
                del data[start:]
            case 2:
                del data[start:end]
            case 3:
                data[start:start] = draw.randbytes(draw.choice((1, 4, 30)))
            case 4:
                data[to:to] = span
            case 5:
                data[start:end] = draw.choice((b"\0", b"\xff", b'"', b"[", b"\n")) * len(span)
            case _:
                del data[start:end]
                data[to:to] = span
    return bytes(data)


def read_and_write(path: Path) -> None:
    """All that is done with a file: it is inspected, read, and its rows are written as JSON Lines and as a table."""
    with Dataset([path]) as data:
        data.inspect()
        rows = list(data.rows())
        assert [raw.record_id for raw in rows] == list(range(data.height))
        assert [raw.status for raw in data.rows(exact=False)] == [raw.status for raw in rows]
        assert len(list(data.records())) == len(rows)
        ids = range(0, len(rows), 2)
        subset = Subset(data, ids, broken=[i for i in ids if rows[i].status is RowStatus.BAD_JSON])
        assert len(list(subset.raw())) == len(ids)
        for name in ("b.jsonl", "b.parquet"):
            # A record that the kind of file can't hold is refused by itself.
            with suppress(ScorerError), RecordWriter(path.with_name(name)) as writer:
                if writer.is_table:
                    writer.write_table(subset.table(name, wrapped=True))
                else:
                    for raw in subset.records():
                        writer.write(raw.value, text=raw.text)


def refusal(path: Path) -> str:
    """What a user is told of a file; "" where it can be read."""
    try:
        read_and_write(path)
    except ScorerError as error:
        return str(error)
    return ""


def outcomes(folder: Path, seeds: range) -> dict[str, int]:
    """How many mutations were read, and how many refused; each refusal is one line."""
    found = {"read": 0, "refused": 0}
    for seed in seeds:
        draw = random.Random(seed)
        name, content = SEEDS[seed % len(SEEDS)]
        path = folder / name
        path.write_bytes(mutated(content, draw))
        told = refusal(path)
        found["refused" if told else "read"] += 1
        assert told.isprintable(), seed
        assert str(path) in told or not told, seed
    return found


def test_mutations_give_rows_or_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = outcomes(tmp_path, range(MUTATIONS))
    assert min(found.values()) > MUTATIONS // 10, found
    assert capfd.readouterr() == ("", "")
