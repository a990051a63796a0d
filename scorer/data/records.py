"""Raw rows -> records: the turns of a row, read as the format that fits it.

A row that fits none becomes a record with a status; it is never dropped. The formats are in scorer.data.columns, the
forms of a conversation in scorer.data.messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from scorer.config import Reading
from scorer.data.columns import Fit, Format, as_row, fit_of
from scorer.data.messages import (
    Spoken,
    holds_messages,
    json_of,
    parsed_json,
    read_marked_text,
    read_messages,
    split_reasoning,
    text_fault,
    without_nulls,
)
from scorer.files.raw import RawRecord
from scorer.types import Message, Record, RowStatus, Turn

REASONING = "reasoning"  # in Record.left_out
# The messages before the first row, and those of each branch. A branch has a name where there are several.
Conversation = tuple[list[Spoken], list[tuple[str, list[Spoken]]]]


def to_record(raw: RawRecord, reading: Reading) -> Record:
    """The record of a row.

    A record that failed as a whole has no turns, and the status that says why. A conversation has one turn for each
    assistant message. A message without text, or of an unknown role, fails its own turn and all later ones, whose
    history is then unknown.
    """
    if raw.status is not RowStatus.OK:
        return Record(raw.record_id, raw.source, status=raw.status)
    row = as_row(raw.value)
    fit = fit_of(row, reading)
    if fit is None and reading.columns is None:
        row = as_row(raw.value, spelling=False)
        fit = fit_of(row, reading)
    if fit is None:
        named = reading.columns is not None and isinstance(raw.value, dict)
        status = RowStatus.MISSING_FIELD if named else RowStatus.UNKNOWN_FORMAT
        return Record(raw.record_id, raw.source, status=status)
    left_out: list[str] = []
    turns = _one_turn(row, fit, reading) or _turns(row, fit.format, reading, left_out)
    if fit.left_out:
        left_out = [*(name for name in fit.left_out if not _is_read(row[name], turns)), *left_out]
    tools = _tools(given, left_out) if (given := _value(row, fit.format.tools)) else ()
    if isinstance(turns, RowStatus):
        return Record(raw.record_id, raw.source, (), turns, fit.format.name, tuple(left_out))
    return Record(raw.record_id, raw.source, turns, RowStatus.OK, fit.format.name, tuple(left_out), tools)


def _value(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The first value that is neither null, empty nor blank text; else None."""
    for key in keys:
        value = row.get(key)
        if value and not (isinstance(value, str) and value.isspace()):
            return value
    return None


def _is_read(value: Any, turns: Sequence[Turn] | RowStatus) -> bool:
    """Whether a column that a format does not read repeats what a turn has, as some data do."""
    if isinstance(turns, RowStatus) or not isinstance(value, str):
        return False
    return any(value.strip() in text for text in texts_of(turns))


def texts_of(turns: Sequence[Turn]) -> list[str]:
    """The texts of turns, and of the history before them."""
    texts: list[str] = []
    for turn in turns:
        for each in (*turn.history, turn):
            texts += (each.response, each.input, *(message.content for message in each.prompt))
    return texts


def _one_turn(row: Mapping[str, Any], fit: Fit, reading: Reading) -> tuple[Turn, ...] | RowStatus | None:
    """The turn of a row that is one prompt and one response, as most are; None for any other."""
    format = fit.format
    prompt, response = row.get(format.prompt), row.get(format.response)
    if not format.response or isinstance(prompt, list | dict) or isinstance(response, list | dict):
        return None
    if (isinstance(prompt, str) and prompt[:2] == "[{") or (isinstance(response, str) and response[:2] == "[{"):
        return None  # JSON of messages, it may be
    if _value(row, format.history) is not None:
        return None
    if not fit.whole:
        return RowStatus.MISSING_FIELD
    system, extra = _value(row, format.system), row.get(format.input) if format.input else None
    extra = "" if extra is None else extra
    faults = [fault for fault in map(text_fault, (prompt, extra, response)) if fault]
    if faults or prompt is None or response is None:
        return RowStatus.MISSING_FIELD if RowStatus.MISSING_FIELD in faults else RowStatus.NOT_TEXT
    if system is not None and (fault := text_fault(system)):
        return fault
    if reading.reasoning != "with" and "</think>" in response:
        return None
    if not response.strip():
        return RowStatus.EMPTY_RESPONSE
    if system is None and not prompt.strip() and not extra.strip():
        return RowStatus.EMPTY_PROMPT
    user = Message("user", prompt)
    return (Turn((user,) if system is None else (Message("system", system), user), response, extra),)


def _turns(
    row: Mapping[str, Any], format: Format, reading: Reading, left_out: list[str]
) -> tuple[Turn, ...] | RowStatus:
    if any(row.get(key) is None for key in format.required if key != format.input):
        return RowStatus.MISSING_FIELD
    system = _value(row, format.system)
    if system is not None and (fault := text_fault(system)):
        return fault
    history = _value(row, format.history)
    earlier = [] if history is None else read_messages(history)
    if isinstance(earlier, RowStatus):
        return earlier
    read = next(read for key, read in READERS.items() if getattr(format, key))
    conversation = read(row, format, earlier)
    if isinstance(conversation, RowStatus):
        return conversation
    before, branches = conversation
    if system is not None:  # some data say it in both places
        branches = [(name, [m for m in said if (m.role, m.content) != ("system", system)]) for name, said in branches]
        before = [Spoken("system", system), *(m for m in before if (m.role, m.content) != ("system", system))]
    turns = [turn for name, said in branches for turn in _branch_turns(before, said, name, reading, left_out)]
    extra = _value(row, [format.input])
    if extra is not None and not _is_read(extra, turns):  # beside a prompt of messages
        left_out.append(format.input)
    return tuple(turns) or RowStatus.NO_ASSISTANT_TURN


def _read_conversation(row: Mapping[str, Any], format: Format, earlier: list[Spoken]) -> Conversation | RowStatus:
    messages = read_messages(row[format.messages])
    return messages if isinstance(messages, RowStatus) else ([], [("", earlier + messages)])


def _read_marked(row: Mapping[str, Any], format: Format, earlier: list[Spoken]) -> Conversation | RowStatus:
    text = row[format.text]
    if fault := text_fault(text):
        return fault
    return ([], [("", earlier + messages)]) if (messages := read_marked_text(text)) else RowStatus.UNKNOWN_FORMAT


def _read_segments(row: Mapping[str, Any], format: Format, earlier: list[Spoken]) -> Conversation | RowStatus:
    """Segments of one text, of which those with a true label are trained on."""
    segments = parsed_json(row[format.segments])
    if not isinstance(segments, list) or not all(isinstance(s, dict) and "text" in s for s in segments):
        return RowStatus.NOT_TEXT
    roles = ("user", "assistant")
    said = [Spoken(roles[bool(s.get("label"))], s["text"], fault=text_fault(s["text"])) for s in segments]
    return [], [("", earlier + said)]


def _read_pair(row: Mapping[str, Any], format: Format, earlier: list[Spoken]) -> Conversation | RowStatus:
    prompt, response = _said(row[format.prompt], "user"), _said(row[format.response], "assistant")
    if isinstance(prompt, RowStatus) or isinstance(response, RowStatus):
        return prompt if isinstance(prompt, RowStatus) else RowStatus.NOT_TEXT
    if prompt == [Spoken("user", row[format.prompt])]:
        return [], [("", [*earlier, _with_input(prompt[0], row, format), *response])]
    return earlier + prompt, [("", response)]  # earlier responses of a prompt are not to be trained on


def _read_preference(row: Mapping[str, Any], format: Format, earlier: list[Spoken]) -> Conversation | RowStatus:
    """What both sides begin with is the prompt, after what the prompt's own column has before it."""
    text = row[format.prompt] if format.prompt else None
    prompt = _said(text, "user", marked=True) if format.prompt else []
    if isinstance(prompt, RowStatus):
        return prompt
    plain = isinstance(text, str) and prompt == [Spoken("user", text)]
    marked = not format.prompt or (isinstance(text, str) and not plain)  # beside a plain prompt a text may be anything
    chosen, rejected = (_said(row[key], "assistant", marked=marked) for key in (format.chosen, format.rejected))
    if isinstance(chosen, RowStatus) or isinstance(rejected, RowStatus):
        return chosen if isinstance(chosen, RowStatus) else RowStatus.NOT_TEXT
    if plain:
        prompt = [_with_input(prompt[0], row, format)]
    both = takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
    shared = [message for message, _ in both]
    branches = [("chosen", chosen[len(shared) :]), ("rejected", rejected[len(shared) :])]
    return [*earlier, *_joined(prompt, shared, chosen)], branches


def _joined(prompt: list[Spoken], shared: list[Spoken], chosen: list[Spoken]) -> list[Spoken]:
    """A prompt and what both sides share, without what stands in both of them."""

    def said(messages: list[Spoken]) -> list[tuple[str, str]]:
        return [(message.role, message.content.strip()) for message in messages]

    if shared and set(said(prompt)) <= set(said(chosen)):
        return shared
    overlaps = range(min(len(prompt), len(shared)), 0, -1)
    overlap = next((n for n in overlaps if said(prompt)[-n:] == said(shared)[:n]), 0)
    return [*prompt[: len(prompt) - overlap], *shared]


READERS = {  # the first key that a format has
    "chosen": _read_preference,
    "messages": _read_conversation,
    "text": _read_marked,
    "segments": _read_segments,
    "response": _read_pair,
}


def _said(value: Any, role: str, *, marked: bool = False) -> list[Spoken] | RowStatus:
    """One message of a role from a text; messages from a list of them, JSON of one, or with `marked` a marked text."""
    if isinstance(value, list | dict | str) and holds_messages(value):
        return read_messages(value)
    if fault := text_fault(value):
        return fault
    if marked and (spoken := _open_prompt(value) or read_marked_text(value)):
        return spoken
    return [Spoken(role, value)]


def _open_prompt(text: str) -> list[Spoken]:
    """The messages of a text that ends with a mark of the assistant's, whose response is elsewhere."""
    spoken = read_marked_text(f"{text}-")
    return spoken[:-1] if spoken and spoken[-1].role == "assistant" and spoken[-1].content == "-" else []


def _with_input(prompt: Spoken, row: Mapping[str, Any], format: Format) -> Spoken:
    extra = row.get(format.input) if format.input else None
    return prompt if extra is None else replace(prompt, input=extra, fault=prompt.fault or text_fault(extra))


def _branch_turns(
    before: list[Spoken], messages: list[Spoken], branch: str, reading: Reading, left_out: list[str]
) -> list[Turn]:
    """The turns of `messages`; the first has those of `before` as its history."""
    history: list[Turn] = []
    turns: list[Turn] = []
    prompt: list[Message] = []
    extra, fault = "", None
    for number, spoken in enumerate((*before, *messages)):
        into = turns if number >= len(before) else history
        fault = fault or spoken.fault
        if fault is not None:
            if spoken.role in ("assistant", ""):
                into.append(Turn((), "", status=fault, branch=branch))
        elif spoken.role != "assistant":
            prompt.append(Message(spoken.role, spoken.content, spoken.fields))
            extra = spoken.input or extra
        else:
            opening = not turns and not history
            turn = Turn(tuple(prompt), spoken.content, extra, branch=branch, fields=spoken.fields)
            into += _parts(turn, spoken, reading, left_out, opening=opening)
            prompt, extra = [], ""
    if history and turns:
        turns[0] = replace(turns[0], history=tuple(history))
    if turns and messages[-1].role != "assistant":
        turns[-1] = replace(turns[-1], after=None if fault or extra else tuple(prompt))
    return turns


def _parts(turn: Turn, spoken: Spoken, reading: Reading, left_out: list[str], *, opening: bool) -> list[Turn]:
    """The turn of a response, with its status; or two, reasoning and answer."""
    reasoning, answer = f"<think>\n{spoken.reasoning}\n</think>\n\n" if spoken.reasoning else "", turn.response
    if not reasoning and reading.reasoning != "with":
        reasoning, answer = split_reasoning(answer)
    blank = opening and not turn.input.strip() and not any(message.content.strip() for message in turn.prompt)

    def status(response: str, *, blank: bool) -> RowStatus:
        if not spoken.trained or (spoken.calls_tools and reading.tool_calls == "skip"):
            return RowStatus.HISTORY_ONLY
        if not response.strip():
            return RowStatus.EMPTY_RESPONSE
        return RowStatus.EMPTY_PROMPT if blank else RowStatus.OK

    if reasoning and reading.reasoning == "apart":
        thought = replace(turn, response=reasoning, part="reasoning", status=status(reasoning, blank=blank))
        rest = replace(turn, prompt=(), response=answer, input="", part="answer", fields=None)
        return [thought, replace(rest, status=status(answer, blank=False))]
    if reasoning and reading.reasoning == "without":
        reasoning = ""
        if REASONING not in left_out:
            left_out.append(REASONING)
        if turn.fields is not None:
            fields = {key: value for key, value in turn.fields.items() if key != "reasoning_content"}
            turn = replace(turn, fields=fields | {"content": split_reasoning(fields["content"])[1]})
    return [replace(turn, response=reasoning + answer, status=status(reasoning + answer, blank=blank))]


def _tools(value: Any, left_out: list[str]) -> tuple[Any, ...]:
    """The tools of a row for a chat template: a list of function definitions, or JSON of one."""
    tools = parsed_json(value) if isinstance(value, str) else without_nulls(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools) or json_of(tools) is None:
        left_out.append("tools")
        return ()
    return tuple([t if "function" in t or "name" not in t else {"type": "function", "function": t} for t in tools])
