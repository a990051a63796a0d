"""The columns of a row that hold a sample: the table of known formats, and which of them a row has.

Knows names of columns; what their values mean is for scorer.data.records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from scorer.config import Reading
from scorer.data.messages import MEDIA_KEYS, REASONING_KEYS, holds_messages, read_marked_text, read_messages
from scorer.files.raw import RawRecord
from scorer.types import RowStatus, ScorerError

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
HISTORY, TOOLS = ("history",), ("tools", "functions")
# Columns that say something to the model: where one is filled and not read, the record says that it is left out.
CONTENT = (
    *(*SYSTEM, *HISTORY, *TOOLS, *MEDIA_KEYS, *REASONING_KEYS),
    *("instruction", "prompt", "question", "query", "input", "context", "documents", "article", "passage"),
    *("choices", "options", "conversation_history", "chat_history", "available_tools", "cot", "rationale"),
    *("chosen", "rejected", "response", "output", "completion", "answer"),
)
PROMPT_HINTS = ("instruct", "prompt", "question", "query", "input", "problem", "human", "user", "ask")
SHOWN = 50  # columns, in an error
RESPONSE_HINTS = ("response", "answer", "output", "completion", "solution", "reply", "target", "assistant")


Columns = tuple[tuple[str, str], ...]  # items of Reading.columns


@dataclass(frozen=True, slots=True)
class Format:
    """The keys of a row that hold a sample.

    Either `messages`; or `prompt` and `response` with an optional `input`; or `chosen` and `rejected` with an optional
    `prompt` and `input`; or a `text` that marks who speaks; or `segments` of text. `system`, `history` (earlier
    exchanges) and `tools` are optional, each the first of its names that is filled.
    """

    name: str
    prompt: str = ""
    response: str = ""
    input: str = ""
    messages: str = ""
    chosen: str = ""
    rejected: str = ""
    text: str = ""
    segments: str = ""
    system: tuple[str, ...] = SYSTEM
    history: tuple[str, ...] = HISTORY
    tools: tuple[str, ...] = TOOLS
    weak: bool = False  # common words: only where no other format has all its keys
    named: bool = False  # by the user: `input` is then required too, so that a typo is noticed

    @property
    def required(self) -> tuple[str, ...]:
        """The keys without which a row is not whole."""
        keys = (self.messages, self.text, self.segments, self.prompt, self.response, self.chosen, self.rejected)
        return tuple([key for key in (*keys, self.input if self.named else "") if key])

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that are read."""
        return (*self.required, self.input, *self.system, *self.history, *self.tools)

    def whole(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has all the required keys (all keys, where the user named them).

        A text has to mark who speaks, and a column of a common name to hold a conversation.
        """
        keys = [key for key in self.keys if key] if self.named else self.required
        if not all(key in row for key in keys):
            return False
        if self.text:
            return isinstance(row[self.text], str) and bool(read_marked_text(row[self.text]))
        return not (self.weak and self.messages) or isinstance(read_messages(row[self.messages] or None), list)

    def fit(self, keys: Collection[str], filled: Collection[str]) -> tuple[float, float, bool]:
        """How well a row fits: the shares of the required keys that are filled and that are there; and of the input."""
        required = self.required
        full = sum(key in filled for key in required) / len(required)
        return full, sum(key in keys for key in required) / len(required), not self.input or self.input in keys


def _preference(prompt: str = "", input: str = "") -> Format:
    return Format("preference", prompt, input=input, chosen="chosen", rejected="rejected")


MESSAGES = Format("messages", messages="messages")  # OpenAI, TRL
FORMATS = (  # the first wins where several fit a row equally
    _preference("instruction", "input"),
    *map(_preference, ("prompt", "question", "query", "input", "conversations", "messages", "")),
    MESSAGES,
    Format("sharegpt", messages="conversations"),
    Format("alpaca", "instruction", "output", "input"),
    Format("dolly", "instruction", "response", "context"),
    Format("instruction-response", "instruction", "response", "input"),
    Format("prompt-response", "prompt", "response"),
    Format("prompt-completion", "prompt", "completion"),  # TRL
    Format("question-answer", "question", "answer", "context"),
    Format("question-response", "question", "response"),  # OpenOrca
    Format("query-response", "query", "response"),  # MetaMathQA
    Format("query-answer", "query", "answer"),
    Format("instruction-answer", "instruction", "answer", "input"),
    Format("instruction-completion", "instruction", "completion", "input"),
    Format("problem-solution", "problem", "solution"),
    Format("problem-answer", "problem", "answer"),
    Format("prompt-output", "prompt", "output", "input"),
    Format("inputs-targets", "inputs", "targets"),  # FLAN
    Format("human-assistant", "human", "assistant"),
    Format("user-assistant", "user", "assistant"),
    Format("input-output", "input", "output", weak=True),
    Format("input-target", "input", "target", weak=True),  # Firefly
    *(Format(name, messages=name, weak=True) for name in ("conversation", "dialog", "dialogue", "data", "chat")),
    Format("segments", segments="segments", weak=True),  # Axolotl's input_output
    Format("marked-text", text="text", weak=True),
)


def as_row(value: Any, *, spelling: bool = True) -> Mapping[str, Any]:
    """The columns of a row; a list of messages is one column. Any other value has none.

    Unless `spelling` matters, names are in small letters.
    """
    if isinstance(value, dict):
        return value if spelling else {key.lower(): item for key, item in value.items()}
    return {MESSAGES.messages: value} if isinstance(value, list) and value and isinstance(value[0], dict) else {}


@dataclass(frozen=True, slots=True)
class Fit:
    """A format that fits a row, whether the row has all its required keys, and the filled CONTENT it does not read."""

    format: Format
    whole: bool
    left_out: tuple[str, ...]


def fit_of(row: Mapping[str, Any], reading: Reading) -> Fit | None:
    """The format that fits a row best; None where it has no required key of any."""
    columns = None if reading.columns is None else tuple(reading.columns.items())
    return _fit(columns, tuple(row), tuple([key for key, value in row.items() if value]))


@lru_cache(1024)  # a file has few sets of keys; trying all formats takes longer than the rest of a row
def _fit(columns: Columns | None, keys: tuple[str, ...], filled: tuple[str, ...]) -> Fit | None:
    if columns is None:
        strong = tuple(format for format in FORMATS if not format.weak)
        formats = strong if any(set(format.required) <= set(keys) for format in strong) else FORMATS
    else:
        formats = (_named(columns),)
    best = max(formats, key=lambda format: format.fit(keys, filled))
    if not any(key in keys for key in best.required):
        return None
    left_out = tuple(key for key in CONTENT if key in filled and key not in best.keys)
    return Fit(best, all(key in keys for key in best.required), left_out)


def _named(columns: Columns) -> Format:
    keys: dict[str, Any] = {"system": (), "history": (), "tools": ()}
    for name, key in columns:
        keys[name] = (key,) if name in keys else key
    return Format("columns", **keys, named=True)


def fits_format(reading: Reading) -> Callable[[RawRecord], bool]:
    """The test whether a row has all the required keys of a format."""
    formats = FORMATS if reading.columns is None else (_named(tuple(reading.columns.items())),)

    def fits(raw: RawRecord) -> bool:
        if raw.status is not RowStatus.OK:
            return False
        rows = [as_row(raw.value), {} if reading.columns else as_row(raw.value, spelling=False)]
        return any(format.whole(row) for row in rows for format in formats)

    return fits


def unknown_format(path: Path, first: RawRecord, reading: Reading) -> ScorerError:
    """The error for a file in which no row fits a format; `first` is its first row."""
    row, columns = as_row(first.value), reading.columns
    said = read_messages([row]) if columns is None and holds_messages([row]) else ()
    if isinstance(said, list) and said[0].role:
        advice = 'write each conversation as one row, {"messages": [...]}'
        return ScorerError(f"{path}: its rows are single messages; {advice}")
    missed = f"has {' and '.join(columns.values())}" if columns else "has a known format"
    held = (
        f"holds {', '.join(list(row)[:SHOWN])}{', ...' if len(row) > SHOWN else ''}"
        if row
        else "is not JSON"
        if first.status is RowStatus.BAD_JSON
        else "holds no columns"
    )
    return ScorerError(f"{path}: no row {missed} (its first row {held}); name them: --columns {_suggested(row)}")


def _suggested(row: Mapping[str, Any]) -> str:
    """The value of --columns that a row suggests."""
    for key, value in row.items():
        if holds_messages(value):
            return f"messages={key}"
    texts = [key for key, value in row.items() if isinstance(value, str)]

    def hinted(hints: Sequence[str]) -> list[str]:
        return [key for hint in hints for key in texts if hint in key.lower()]

    response = next(iter(hinted(RESPONSE_HINTS)), "")
    prompt = next((key for key in hinted(PROMPT_HINTS) if key != response), "")
    if len(texts) == 2:  # the other one
        prompt = prompt or next(key for key in texts if key != response)
        response = response or next(key for key in texts if key != prompt)
    extra = next((key for key in texts if key.lower() in ("input", "context") and key not in (prompt, response)), "")
    return f"prompt={prompt or '...'},{f'input={extra},' if extra else ''}response={response or '...'}"
