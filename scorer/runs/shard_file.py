"""The file of a shard: its score table as Parquet, with what it holds and a digest of the whole file in its metadata.

The digest makes the file prove itself, wherever a run is copied and before a manifest counts the shard.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import polars as pl

from scorer.storage.atomic import replacing

KEY = "scorer"  # of the file's metadata
BEGIN = b'{"sha256": "'  # of the value: Parquet keeps it as it is, behind the tables
ZEROS = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What a shard says of itself. sha256: of the file's bytes, with zeros in the place of these 64 digits."""

    sha256: str = ZEROS
    run_id: str
    index: int
    records: int
    rows: int  # one a turn
    tokens: int = 0
    seconds: float = 0.0  # that the engine took
    by: str = ""  # who scored it: this process, or a worker's name
    environment: Mapping[str, str] = field(default_factory=dict)  # see scorer.runs.environment


def write_shard_file(path: Path, table: pl.DataFrame, info: ShardInfo) -> None:
    """Write the file, whole or not at all. Raises EngineError where the disk is full."""
    content = _shard_bytes(table, info)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _shard_bytes(table: pl.DataFrame, info: ShardInfo) -> bytearray:
    buffer = io.BytesIO()  # an error of Polars' own writer would not say that a disk is full
    table.write_parquet(buffer, metadata={KEY: json.dumps(asdict(info))})
    content = bytearray(buffer.getbuffer())
    begin = _digest_at(content)
    content[begin : begin + len(ZEROS)] = hashlib.sha256(content).hexdigest().encode()
    return content


def read_info(path: Path) -> ShardInfo:
    """What the file holds. Raises ValueError where it is not, byte for byte, what was written; OSError."""
    if not path.is_file():  # to open a pipe could take for ever
        raise ValueError("it is not a file")
    content = bytearray(path.read_bytes())
    begin = _digest_at(content)
    value = bytes(content[begin - len(BEGIN) :])
    content[begin : begin + len(ZEROS)] = ZEROS.encode()
    if hashlib.sha256(content).hexdigest().encode() != value[len(BEGIN) : len(BEGIN) + len(ZEROS)]:
        raise ValueError("its bytes are not those that were written")
    return ShardInfo(**json.JSONDecoder().raw_decode(value.decode("utf-8", "replace"))[0])


def _digest_at(content: bytearray) -> int:
    found = content.rfind(BEGIN)
    if found < 0:
        raise ValueError("it has no digest")
    return found + len(BEGIN)
