"""Raw rows -> records, by the formats that instruction data comes in.

A row that fits none becomes a record with a status; it is never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from scorer.data.reader import RawRecord
from scorer.types import Message, Record, RowStatus, ScorerError, Turn


@dataclass(frozen=True, slots=True)
class Format:
    """The keys of a row that hold a sample: `messages` alone, or `prompt` and `response` with an optional `input`.

    `system`, always optional, goes before either.
    """

    prompt: str = ""
    response: str = ""
    input: str = ""
    messages: str = ""
    system: str = ""
    named: bool = False  # by the user: `input` is then required too, so that a typo is noticed

    @property
    def required(self) -> tuple[str, ...]:
        """The keys without which a row is not whole."""
        keys = (self.messages,) if self.messages else (self.prompt, self.response)
        return (*keys, self.input) if self.named and self.input else keys

    def whole(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has all the required keys, and `system` where the user named it."""
        return all(key in row for key in self.required) and (not self.named or not self.system or self.system in row)

    def fit(self, keys: Collection[str], filled: Collection[str]) -> tuple[float, float, bool]:
        """How well a row fits: the shares of the required keys that are filled and that are there; and of the input."""
        required = self.required
        full = sum(key in filled for key in required) / len(required)
        return full, sum(key in keys for key in required) / len(required), not self.input or self.input in keys


FORMATS = (  # the first wins where several fit a row equally
    Format(messages="messages", system="system"),  # OpenAI
    Format(messages="conversations", system="system"),  # ShareGPT
    Format("instruction", "output", "input", system="system"),  # Alpaca
    Format("instruction", "response", "context", system="system"),  # Dolly
    Format("instruction", "response", "input", system="system"),
    Format("prompt", "response", system="system"),
    Format("prompt", "completion", system="system"),
)
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


def fits_format(columns: Mapping[str, str] | None) -> Callable[[RawRecord], bool]:
    """The test whether a row has all the required keys of a format. `columns` is as for `to_record`."""
    formats = FORMATS if columns is None else (Format(**columns, named=True),)
    return lambda raw: isinstance(raw.value, dict) and any(format.whole(raw.value) for format in formats)


def unknown_format(path: Path, first: RawRecord, columns: Mapping[str, str] | None) -> ScorerError:
    """The error for a file in which no row fits a format; `first` is its first row."""
    held = (
        f"its first row holds {', '.join(first.value)}"
        if isinstance(first.value, dict) and first.value
        else _describe(first)
    )
    missed = f"has {' and '.join(columns.values())}" if columns else "has a known format"
    return ScorerError(f"{path}: no row {missed} ({held}); name them: --columns prompt=...,response=...")


def _describe(raw: RawRecord) -> str:
    return "its first row is not JSON" if raw.status is RowStatus.BAD_JSON else "its first row holds no columns"


def _format(raw: RawRecord, columns: Mapping[str, str] | None) -> Format | None:
    """The format that fits a row best; None where none of its required keys is there."""
    row = raw.value
    if raw.status is not RowStatus.OK or not isinstance(row, dict):
        return None
    if columns is None:
        return _detect(tuple(row), tuple(key for key, value in row.items() if value is not None))
    named = Format(**columns, named=True)
    return named if any(key in row for key in named.required) else None


@lru_cache(1024)  # a file has few sets of keys; trying seven formats takes as long as the rest of a row
def _detect(keys: tuple[str, ...], filled: tuple[str, ...]) -> Format | None:
    best = max(FORMATS, key=lambda format: format.fit(keys, filled))
    return best if any(key in keys for key in best.required) else None


def to_record(raw: RawRecord, columns: Mapping[str, str] | None) -> Record:
    """The record of a row. `columns` (COLUMNS of scorer.config -> the data's names) overrides detection.

    A record that failed as a whole has no turns, and the status that says why. A conversation has one turn for each
    assistant message; a message without text fails its own turn and all later ones, whose history is then unknown.
    """
    if raw.status is not RowStatus.OK:
        return Record(raw.record_id, raw.source, status=raw.status)
    format = _format(raw, columns)
    if format is None:
        missing = columns is not None and isinstance(raw.value, dict)
        status = RowStatus.MISSING_FIELD if missing else RowStatus.UNKNOWN_FORMAT
        return Record(raw.record_id, raw.source, status=status)
    read = _conversation if format.messages else _single
    system = _system(raw.value, format)
    turns = system if isinstance(system, RowStatus) else read(raw.value, format, system)
    if isinstance(turns, RowStatus):
        return Record(raw.record_id, raw.source, status=turns)
    return Record(raw.record_id, raw.source, turns)


def _fault(value: Any) -> RowStatus | None:
    """Why a value is not a text, or None if it is one (it may be blank)."""
    if value is None:
        return RowStatus.MISSING_FIELD
    if not isinstance(value, str):
        return RowStatus.NOT_TEXT
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return RowStatus.NOT_TEXT
    return None


def _system(row: Mapping[str, Any], format: Format) -> tuple[Message, ...] | RowStatus:
    """The message of the row's `system` column; none where it is absent, null or blank."""
    text = row.get(format.system) if format.system else None  # a column may have an empty name
    if text is None:
        return ()
    return _fault(text) or ((Message("system", text),) if text.strip() else ())


def _single(row: Mapping[str, Any], format: Format, system: tuple[Message, ...]) -> tuple[Turn, ...] | RowStatus:
    if any(key not in row for key in format.required):
        return RowStatus.MISSING_FIELD
    prompt, response = row[format.prompt], row[format.response]
    extra = row.get(format.input) if format.input else None
    extra = "" if extra is None else extra
    faults = [fault for fault in map(_fault, (prompt, extra, response)) if fault]
    if faults:
        return RowStatus.MISSING_FIELD if RowStatus.MISSING_FIELD in faults else RowStatus.NOT_TEXT
    if not response.strip():
        return RowStatus.EMPTY_RESPONSE
    if not system and not prompt.strip() and not extra.strip():
        return RowStatus.EMPTY_PROMPT
    return (Turn((*system, Message("user", prompt)), response, extra),)


def _either(message: Mapping[str, Any], *keys: str) -> Any:
    """The first value that is not None: Parquet gives every message the keys of all of them."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _conversation(row: Mapping[str, Any], format: Format, system: tuple[Message, ...]) -> tuple[Turn, ...] | RowStatus:
    messages = row.get(format.messages)
    if messages is None:
        return RowStatus.MISSING_FIELD
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return RowStatus.NOT_TEXT
    turns: list[Turn] = []
    before = list(system)  # since the last assistant message
    fault: RowStatus | None = None
    for message in messages:
        name = _either(message, "role", "from")
        if name is None:
            return RowStatus.MISSING_FIELD
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            return RowStatus.UNKNOWN_FORMAT
        content = _either(message, "content", "value")
        fault = fault or _fault(content)
        if role != "assistant":
            if fault is None and (turns or Message(role, content) not in system):  # some data say it in both places
                before.append(Message(role, content))
        elif fault is not None:
            turns.append(Turn((), "", status=fault))
        else:
            turns.append(_turn(tuple(before), content))
            before = []
    return tuple(turns) or RowStatus.NO_ASSISTANT_TURN


def _turn(prompt: tuple[Message, ...], response: str) -> Turn:
    """One turn; a blank one keeps its text, which is history to the turns after it."""
    status = RowStatus.OK
    if not response.strip():
        status = RowStatus.EMPTY_RESPONSE
    elif not any(message.content.strip() for message in prompt):
        status = RowStatus.EMPTY_PROMPT
    return Turn(prompt, response, status=status)
