"""A run's manifest: what was computed, from what, with which versions, and the shards of a complete run."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from scorer.data.dataset import InputFile

VERSION = 2  # raised where another scorer would misread the file
CHECKSUM = "checksum"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of RUN/manifest.json. `identity` decides the scores: two runs that share it have the same scores.

    identity: format, config (the fields of ScoreConfig), model_revision, served (by a server), inputs (size and hash),
    and for LP learning or tables.

    What is known when all records are scored is empty until then: shards, status, formats, left_out, special_tokens,
    tokens, seconds, shards_by, and the shards of each environment.
    """

    version: int = VERSION
    state: str = "running"  # or complete
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)  # of this run and its shards; another one if --fresh
    began: str = ""  # ISO 8601, local time
    fingerprint: str = ""  # SHA-256 of the identity, but for RESUMABLE_FIELDS other than limit
    identity: Mapping[str, Any]
    inputs: tuple[InputFile, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)  # name, revision, origin, path
    environments: Sequence[Mapping[str, Any]] = ()  # device, versions of packages, and how many shards they made
    tokenizer: str = ""  # the library that tokenised, and its version: all give the same ids
    ranking: Mapping[str, Any]  # by: a column of the score table; lowest: whether its low values are worth keeping
    records: int
    input_records: tuple[int, ...] = ()  # rows of each input, up to the limit
    status: Mapping[str, int] = field(default_factory=dict)  # rows of the score table
    formats: Mapping[str, int] = field(default_factory=dict)  # records by their format
    left_out: Mapping[str, int] = field(default_factory=dict)  # records by what of them is not read
    special_tokens: int = 0  # records whose text holds some
    tokens: int = 0
    seconds: float = 0.0  # all engines together
    shards_by: Mapping[str, int] = field(default_factory=dict)
    server: Mapping[str, Any] | None = None  # what a server says of its model
    shards: Sequence[Sequence[Any]] = ()  # of each, its rows and its SHA-256: see scorer.runs.shard_file

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the scores, by field of ScoreConfig."""
        config: Mapping[str, Any] = self.identity["config"]
        return config

    @property
    def shard_count(self) -> int:
        """How many shards a finished run has."""
        return int(-(-self.records // self.config["shard_rows"]))

    def records_of(self, index: int) -> int:
        """How many records a shard has, from record `index * shard_rows` on; 0 or less for one that the run lacks."""
        rows = int(self.config["shard_rows"])
        return min(rows, self.records - index * rows)

    @property
    def paths(self) -> list[str]:
        """The inputs, in order."""
        return [entry.path for entry in self.inputs]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"inputs": [i.to_dict() for i in self.inputs], "input_records": list(self.input_records)}

    def to_json(self) -> str:
        """The file's content, with a checksum."""
        values = self.to_dict()
        return json.dumps(values | {CHECKSUM: digest(values)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The manifest in `text`. Raises ValueError where it is not what a scorer of this version wrote."""
        try:
            content = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deep") from None
        if not isinstance(content, dict) or not {"identity", "records", "ranking"} <= content.keys():
            raise ValueError("it is not the manifest of a run")
        if (found := content.get("version", 1)) != VERSION:
            raise ValueError(f"it is of version {found}, and this scorer reads {VERSION}")
        if content.pop(CHECKSUM, None) != digest(content):
            raise ValueError("it is not what scorer wrote: its checksum differs")
        inputs = tuple(InputFile(**entry) for entry in content.pop("inputs"))
        return cls(**content | {"inputs": inputs, "input_records": tuple(content["input_records"])})


def digest(value: Any) -> str:
    """The SHA-256 of a JSON value, as hexadecimal digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignoring: Collection[str] = ()) -> list[str]:
    """The fields of `now`, an identity or a part of one, that `before` has differently, as text for an error message.

    The mappings `config` and `learning` are compared field by field, except for the fields `ignoring`.
    """
    changes: list[str] = []
    for name, value in now.items():
        was = before.get(name)
        if isinstance(value, Mapping) and name in ("config", "learning"):
            was = was or {}
            changes += [
                f"{key} was {was.get(key)}, is {item}"
                for key, item in value.items()
                if was.get(key) != item and key not in ignoring
            ]
        elif was != value:
            changes.append(f"{name} changed")
    return changes
