"""Records in the form that a trainer reads, from whatever form they came in; and LLaMA-Factory's description of them.

Only prompts and responses are taken over; other columns of the data are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from scorer.config import Reading
from scorer.data.records import to_record
from scorer.data.subset import Subset
from scorer.files.arrow import framed
from scorer.files.json_texts import overflows
from scorer.files.raw import RawRecord
from scorer.files.upload import on_hub
from scorer.files.writer import output_kind
from scorer.storage.atomic import is_stream, replacing
from scorer.storage.paths import exists, to_path
from scorer.types import Message, Record, RowStatus, ScorerError, Turn

Converted = dict[str, Any]
UNREADABLE = (RowStatus.UNKNOWN_FORMAT, RowStatus.MISSING_FIELD, RowStatus.NOT_TEXT, RowStatus.MULTIMODAL)  # of a turn
DATASET_INFO = "dataset_info.json"
DATASET_INFO_KINDS = (".json", ".jsonl", ".parquet", ".arrow", ".csv")  # that LLaMA-Factory reads


@dataclass(frozen=True, slots=True)
class Form:
    """What a record becomes: None where the form can't hold it, or it has a turn that can't be read.

    columns and tags: of LLaMA-Factory's dataset_info.json, empty where it does not read the form.
    """

    convert: Callable[[Record], Converted | None]
    formatting: str = "sharegpt"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def _prompt(turn: Turn) -> list[Message]:
    """The messages of a prompt; Alpaca's input stands below the instruction, as where scorer scores a chat."""
    if not turn.input:
        return list(turn.prompt)
    return [Message(m.role, f"{m.content}\n{turn.input}") if m.role == "user" else m for m in turn.prompt]


def _turns(record: Record) -> list[Turn]:
    """The turns that become messages: of a preference pair, the chosen ones, if there are any."""
    turns = [turn for turn in record.turns if turn.branch in ("", "chosen")]
    return [*turns[0].history, *turns] if turns else []


def _conversation(record: Record) -> list[Message]:
    turns = _turns(record)
    said = [m for t in turns for m in (*_prompt(t), Message("assistant", t.response, t.fields))]
    return [*said, *(turns[-1].after or ())]


def _trained(record: Record) -> list[bool]:
    """Whether each response of `_turns` is to train on."""
    first = len(record.turns[0].history)
    return [i >= first and turn.status != RowStatus.HISTORY_ONLY for i, turn in enumerate(_turns(record))]


def _openai(messages: Collection[Message]) -> list[dict[str, Any]]:
    return [dict(m.fields) if m.fields else {"role": m.role, "content": m.content} for m in messages]


def _messages(record: Record) -> Converted:
    messages = _openai(_conversation(record))
    responses = [message for message in messages if message["role"] == "assistant"]
    for message, trained in zip(responses, _trained(record), strict=True):
        if not trained:
            message["weight"] = 0  # OpenAI's mark of a response that is history only
    return {"messages": messages} | _tools(record)


def _tools(record: Record) -> Converted:
    return {"tools": list(record.tools)} if record.tools else {}


def _prompt_completion(record: Record) -> Converted | None:
    """The last response is the completion, and all that is trained on."""
    if _turns(record)[-1].after or not _trained(record)[-1]:
        return None
    *prompt, completion = _conversation(record)
    return {"prompt": _openai(prompt), "completion": _openai([completion])} | _tools(record)


SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def _sharegpt(record: Record) -> Converted | None:
    """Trainers learn every response of a conversation."""
    if not all(_trained(record)):
        return None
    messages = [{"from": SHAREGPT_ROLES[m.role], "value": m.content} for m in _conversation(record)]
    tools = {"tools": json.dumps([tool.get("function", tool) for tool in record.tools])} if record.tools else {}
    return {"conversations": messages} | tools


def _alpaca(record: Record) -> Converted | None:
    """One user message before each response, and a system message before the first; earlier turns are `history`.

    LLaMA-Factory learns the responses of the history, too.
    """
    first, *later = turns = _turns(record)
    if turns[-1].after or not all(_trained(record)):
        return None
    system = [m.content for m in first.prompt[:1] if m.role == "system"]
    prompts = [first.prompt[len(system) :], *(turn.prompt for turn in later)]
    if any([m.role for m in prompt] != ["user"] for prompt in prompts):
        return None
    texts = [prompt[0].content for prompt in prompts]
    last = turns[-1]
    row: Converted = {"instruction": texts[-1], "input": last.input, "output": last.response}
    if system:
        row["system"] = system[0]
    if later:
        pairs = zip(texts, turns, strict=True)
        row["history"] = [[f"{q}\n{t.input}" if t.input else q, t.response] for q, t in pairs][:-1]
    return row


ROLE_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
FORMS: Mapping[str, Form] = {
    "messages": Form(
        _messages,
        columns={"messages": "messages"},
        tags={"role_tag": "role", "content_tag": "content", **ROLE_TAGS},
    ),
    "alpaca": Form(
        _alpaca,
        formatting="alpaca",
        columns={
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "system": "system",
            "history": "history",
        },
    ),
    "prompt-completion": Form(_prompt_completion),
    "sharegpt": Form(
        _sharegpt,
        columns={"messages": "conversations", "tools": "tools"},
        tags={"role_tag": "from", "content_tag": "value"} | {t: SHAREGPT_ROLES[role] for t, role in ROLE_TAGS.items()},
    ),
}


class ConvertedRows:
    """The rows of a subset in one of FORMS. `keys` are those that the records so far have had."""

    def __init__(self, rows: Subset, form: str):
        self._rows, self.form = rows, form
        self.keys: dict[str, None] = {}

    def unconvertible(self) -> list[int]:
        """The ids of the rows that the form can't hold."""
        return [raw.record_id for raw in self._rows.raw() if converted(raw, self._rows.reading, self.form) is None]

    def records(self) -> Iterator[RawRecord]:
        """The rows, each with what it became as its value. None may be `unconvertible`."""
        for raw in self._rows.raw():
            value = converted(raw, self._rows.reading, self.form)
            if value is None:
                raise ScorerError(f"{raw.source}: can't be converted")
            self.keys |= dict.fromkeys(value)
            yield raw._replace(value=value, line=None)

    def table(self, where: str, *, wrapped: bool = False) -> pa.Table:
        """The same as a table. See Subset.table."""
        return framed(where, [raw.value for raw in self.records()])


def converted(raw: RawRecord, reading: Reading, form: str) -> Converted | None:
    """What a row becomes in one of FORMS; None where the form can't hold it."""
    if raw.text is not None and overflows(raw.text):
        return None  # Python has an infinity in place of the number
    record = to_record(raw, replace(reading, reasoning="with", tool_calls="score"))
    unread = any(turn.status in UNREADABLE or turn.after is None for turn in record.turns)
    return FORMS[form].convert(record) if _turns(record) and not unread else None


def check_dataset_info(output: str | Path, form: str) -> None:
    """Raise ScorerError where LLaMA-Factory reads no such form or file, or has a file that can't be updated."""
    if not FORMS[form].columns:
        raise ScorerError(f"dataset_info: LLaMA-Factory does not read {form}; write messages, alpaca or sharegpt")
    if output_kind(output) not in DATASET_INFO_KINDS:
        kinds = ", ".join(DATASET_INFO_KINDS)
        raise ScorerError(f"dataset_info: LLaMA-Factory does not read {output}; write to one of {kinds}")
    if on_hub(output):
        raise ScorerError(f"dataset_info: it is a file beside the output; {output} is on the hub: write to a file here")
    if is_stream(to_path(output)):
        raise ScorerError(f"dataset_info: it is a file beside the output, and {output} is none: write to a file")
    _entries(to_path(output).parent / DATASET_INFO)


def update_dataset_info(output: str | Path, form: str, keys: Collection[str]) -> None:
    """Describe the file `output`, whose records have `keys`, in the dataset_info.json beside it, under its stem.

    Other entries of that file stay. Raises ScorerError where it can't be read or written.
    """
    path, described = to_path(output), FORMS[form]
    entry: dict[str, Any] = {"file_name": path.name, "formatting": described.formatting}
    entry["columns"] = {name: key for name, key in described.columns.items() if key in keys}
    if described.tags:
        entry["tags"] = dict(described.tags)
    where = path.parent / DATASET_INFO
    entries = _entries(where) | {path.name.removesuffix(output_kind(output)): entry}
    with replacing(where) as temporary:
        temporary.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _entries(path: Path) -> dict[str, Any]:
    if not exists(path):
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(entries, dict):
            return entries
        raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ScorerError(f"{path}: can't be updated ({error}); mend it") from error
