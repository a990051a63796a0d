"""A run's manifest: what was computed, from what, with which versions, and how far it is."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from scorer.data.dataset import InputFile

VERSION = 1  # raised where an older scorer would misread the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of RUN/manifest.json. `identity` decides the scores: two runs that share it have the same scores.

    identity: format, config (the fields of ScoreConfig), model_revision, served (by a server), inputs (size and hash),
    and for LP learning or tables.
    """

    version: int = VERSION
    state: str = "running"  # or complete
    began: str = ""  # ISO 8601, local time
    fingerprint: str = ""  # SHA-256 of the identity, but for RESUMABLE_FIELDS other than limit
    identity: Mapping[str, Any]
    inputs: tuple[InputFile, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)  # name, revision, origin, path
    versions: Mapping[str, str] = field(default_factory=dict)  # packages that scores depend on
    tokenizer: str = ""  # the library that tokenised, and its version: all give the same ids
    device: str = ""
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

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the scores, by field of ScoreConfig."""
        config: Mapping[str, Any] = self.identity["config"]
        return config

    @property
    def shard_count(self) -> int:
        """How many shards a finished run has."""
        return int(-(-self.records // self.config["shard_rows"]))

    @property
    def paths(self) -> list[str]:
        """The inputs, in order."""
        return [entry.path for entry in self.inputs]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"inputs": [i.to_dict() for i in self.inputs], "input_records": list(self.input_records)}

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The manifest in `text`. Raises ValueError where it is not one, or one of a later version."""
        content = json.loads(text)
        if not isinstance(content, dict) or not {"state", "records", "inputs", "ranking", "identity"} <= content.keys():
            raise ValueError("it is not the manifest of a run")
        if content.get("version", VERSION) > VERSION:
            raise ValueError("a newer scorer wrote it")
        if "shard_rows" not in (content["identity"].get("config") or {}):
            raise ValueError("it is not the manifest of a run")
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        known["inputs"] = tuple(InputFile(**entry) for entry in content["inputs"])
        known["input_records"] = tuple(content.get("input_records", ()))
        return cls(**known)


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
