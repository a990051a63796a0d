"""The values that conversations are written in -> messages: lists, structs of lists, JSON strings, pairs, marked text.

Knows roles, contents, tool calls and reasoning; neither the columns of a row nor turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from scorer.files.json_texts import too_deep
from scorer.types import RowStatus

ROLES = {
    **dict.fromkeys(("system", "developer", "system_prompt"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "bot", "chatbot", "agent", "llm"), "assistant"
    ),
    **dict.fromkeys(("assistant_model", "model_response", "function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "tool_results", "tool_output", "function_response"), "tool"),
}
CALLS = ("function_call", "tool_call", "tool_calls")  # roles and keys of an assistant that calls tools
EXCHANGE = {  # the keys of {"question": ..., "answer": ...}, one exchange as an item of a list
    **ROLES,
    **dict.fromkeys(("question", "query", "prompt", "instruction", "input"), "user"),
    **dict.fromkeys(("answer", "response", "output", "completion"), "assistant"),
}
EXCHANGED = ("user", "assistant")
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")
TRAINED_KEYS = ("weight", "train", "training", "trainable", "loss")  # 0 or False: history only
READ_KEYS = (*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, *CALLS, *MEDIA_KEYS, *TRAINED_KEYS)
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a part of a content
THINKING_PARTS = ("thinking", "reasoning")
MEDIA_PART = re.compile("image|audio|video|file|document")
# How a text marks who speaks: the only group of a mark is the role. The first style that the text begins with counts.
MARKS = (
    re.compile(r"### ?(Human|Assistant|System|User):"),
    re.compile(r"(?:^|\n)### ?(Instruction|Input|Response):"),
    re.compile(r"<\|im_start\|>(\w+)\n"),
    re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>"),
    re.compile(r"<start_of_turn>(\w+)\n"),
    re.compile(r"<\|(system|user|assistant|prompter|observation|tool)\|>"),
    re.compile(r"(?:^|\n\n)(Human|User|Assistant): ?"),
)
BEGINNINGS = ("<s>", "<bos>", "<|begin_of_text|>")  # tokens that a text or a message may begin or end with
ENDINGS = ("</s>", "<|endoftext|>", "<|end|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_text|>")
ALPACA_HEAD = "Below is an instruction that describes a task"  # how its template begins, which is no message
REASONING = re.compile(r"\s*(?:<think>)?.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Spoken:
    """One message as it was read. `role` is "" where it is unknown; `fault` says why there is no text.

    content: its text, the JSON of tool calls included. reasoning: what comes before `content` as a field of its own.
    input: Alpaca's second prompt column. fields: see scorer.types.Message.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    input: str = ""
    calls_tools: bool = False
    trained: bool = True
    fields: Mapping[str, Any] | None = None
    fault: RowStatus | None = None


def text_fault(value: Any) -> RowStatus | None:
    """Why a value is not a text, or None if it is one (it may be blank)."""
    if value is None:
        return RowStatus.MISSING_FIELD
    return None if isinstance(value, str) and is_unicode(value) else RowStatus.NOT_TEXT


def is_unicode(text: str) -> bool:
    """Whether a text holds no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_of(value: Any) -> str | None:
    """The JSON of a value; None where it has none, such as binary data, or is not valid Unicode."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return text if is_unicode(text) else None


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning that a response begins with, up to its </think> and the white space after it, and the rest."""
    found = REASONING.match(text) if "</think>" in text else None
    return (found[0], text[found.end() :]) if found else ("", text)


def read_messages(value: Any) -> list[Spoken] | RowStatus:
    """The messages of a conversation; the status where it is none. A message that can't be read has its own fault.

    A list of messages; of texts, user first; of pairs, user first or each a role and a text; of objects such as
    {"human": ..., "assistant": ...}; a struct of lists, as the Sequence of Hugging Face datasets makes of a list of
    structs; a JSON string of any of these, or a list of JSON strings.
    """
    value = parsed_json(value)
    if isinstance(value, dict):
        value = _listed(value)
    if not isinstance(value, list):
        return RowStatus.NOT_TEXT
    if value and all(isinstance(item, str) for item in value):
        parsed = [parsed_json(item) for item in value]
        if all(isinstance(item, dict) for item in parsed):
            value = parsed
        elif len(value) % 2 == 0:  # else it is not sure whose the first is
            value = [{"role": EXCHANGED[i % 2], "content": text} for i, text in enumerate(value)]
    pairs = [item for item in value if isinstance(item, list | tuple) and len(item) == 2]
    names = ("role", "content") if pairs and all(_is_role(first) for first, _ in pairs) else EXCHANGED
    spoken: list[Spoken] = []
    for item in value:
        if isinstance(item, list | tuple) and len(item) == 2:
            item = dict(zip(names, item, strict=True))
        if not isinstance(item, dict):
            return RowStatus.NOT_TEXT
        spoken += map(_read_message, _exchange(item) or (item,))
    return spoken


def holds_messages(value: Any) -> bool:
    """Whether a value, or what it holds as a JSON string, is messages that name their roles."""
    value = parsed_json(value)
    items = _listed(value) if isinstance(value, dict) else value
    return (
        isinstance(items, list)
        and bool(items)
        and all(isinstance(item, dict) and _first(item, ROLE_KEYS) is not None for item in items)
    )


def read_marked_text(text: str) -> list[Spoken]:
    """The messages of a text that marks who speaks, such as "### Human: ... ### Assistant: ..."; none if it doesn't.

    The text has to begin with a mark of the user's or the system's, and the two sides to take turns.
    """
    text = _stripped(text, BEGINNINGS)
    for mark in MARKS:
        marks = list(mark.finditer(text))
        before = text[: marks[0].start()].strip() if marks else text
        if (before and not before.startswith(ALPACA_HEAD)) or not marks:
            continue
        bounds = [*(match.start() for match in marks[1:]), len(text)]
        texts = [_stripped(text[m.end() : end], ENDINGS) for m, end in zip(marks, bounds, strict=True)]
        names = [match[1].lower() for match in marks]
        spoken: list[Spoken] = []
        for name, said in zip(names, texts, strict=True):
            if name == "input" and spoken:
                spoken[-1] = replace(spoken[-1], input=said, fault=spoken[-1].fault or text_fault(said))
            else:
                role = EXCHANGE.get(name, "")
                spoken.append(Spoken(role, said, fault=text_fault(said) if role else RowStatus.UNKNOWN_FORMAT))
        roles = [message.role for message in spoken if message.role in EXCHANGED]
        if roles[:2] == [*EXCHANGED] and all(a != b for a, b in pairwise(roles)):
            return spoken
    return []


def parsed_json(value: Any) -> Any:
    """The list or object that a JSON string holds; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    if too_deep(value.encode("utf-8", "surrogatepass")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def without_nulls(value: Any) -> Any:
    """A value without the keys whose values are null: a table gives each struct the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _stripped(text: str, tokens: tuple[str, ...]) -> str:
    """A text without white space, and some tokens, at either end."""
    text = text.strip()
    for token in tokens:
        if text.startswith(token) or text.endswith(token):
            text = text.removeprefix(token).removesuffix(token).strip()
    return text


def _is_role(name: Any) -> bool:
    return isinstance(name, str) and name.strip().lower() in ROLES


def _listed(value: Mapping[str, Any]) -> Any:
    """A struct of lists of one length as a list of structs; a single message as a list of it."""
    columns = {name: part for name, part in value.items() if part is not None}
    lengths = {len(part) if isinstance(part, list) else -1 for part in columns.values()}
    if len(lengths) == 1 and -1 not in lengths:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [value] if _first(value, ROLE_KEYS) is not None else value


def _exchange(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of {"human": ..., "assistant": ...}; none where a key is not the name of a role."""
    roles = {key: EXCHANGE.get(key.lower(), "") for key, value in item.items() if value is not None}
    if "" in roles.values() or not ("assistant" in roles.values() or all(map(_is_role, roles))):
        return []
    if {"instruction", "input"} <= roles.keys():  # Alpaca's
        merged = {key: value for key, value in item.items() if key != "input"}
        return [m | {"input": item["input"]} if m["role"] == "user" else m for m in _exchange(merged)]
    ordered = sorted(roles, key=lambda key: ("system", "user", "assistant", "tool").index(roles[key]))
    return [{"role": roles[key], "content": item[key]} for key in ordered]


def _read_message(message: Mapping[str, Any]) -> Spoken:
    name, content = _first(message, ROLE_KEYS), _first(message, CONTENT_KEYS)
    spelling = name.strip().lower() if isinstance(name, str) else ""
    role = ROLES.get(spelling, "")
    if not role:
        return Spoken("", fault=RowStatus.MISSING_FIELD if name is None else RowStatus.UNKNOWN_FORMAT)
    if len(message) == 2 and isinstance(content, str) and spelling not in CALLS:  # most messages
        return Spoken(role, content, fault=text_fault(content))
    if isinstance(message.get("input"), str) and len(message) == 3 and isinstance(content, str):
        return Spoken(role, content, input=message["input"], fault=text_fault(content) or text_fault(message["input"]))
    if any(message.get(key) for key in MEDIA_KEYS):
        return Spoken(role, fault=RowStatus.MULTIMODAL)
    if role == "tool" and isinstance(content, dict) and "type" not in content:
        content = json_of(content) or content
    text, thoughts, calls, fault = _read_content(content)
    asked = content if spelling in CALLS else next((message[key] for key in CALLS if message.get(key)), calls)
    calls = _tool_calls(asked) if asked else []
    if calls and asked is content:
        text = ""  # the calls are all of it
    if asked and not calls and asked is not content:
        fault = fault or RowStatus.NOT_TEXT
    if content is None and not calls:
        fault = RowStatus.MISSING_FIELD
    reasoning = _first(message, REASONING_KEYS) or thoughts
    fields = {key: value for key, value in message.items() if key not in READ_KEYS and value is not None}
    fields |= {"reasoning_content": reasoning} if reasoning else {}
    fields |= {"tool_calls": calls} if calls else {}
    fault = fault or (text_fault(reasoning) if not fields or json_of(fields) else RowStatus.NOT_TEXT)
    if fault:
        return Spoken(role, fault=fault)
    return Spoken(
        role,
        "\n".join(filter(None, (text, *(json.dumps(call["function"], ensure_ascii=False) for call in calls)))),
        reasoning,
        calls_tools=bool(calls) or spelling in CALLS,
        trained=not any(message.get(key) in (0, False) for key in TRAINED_KEYS if key in message),
        fields={"role": role, "content": text, **fields} if fields else None,
    )


def _read_content(content: Any) -> tuple[str, str, list[Any], RowStatus | None]:
    """The text of a content, its reasoning, its tool calls, and its fault."""
    if content is None:
        return "", "", [], None
    if isinstance(content, dict) and "type" in content:
        content = [content]
    if not isinstance(content, list):
        return content, "", [], text_fault(content)
    texts, thoughts, calls = [], [], []
    for part in content:
        kind = part.get("type") or "text" if isinstance(part, dict) else None
        if kind in TEXT_PARTS:
            texts.append(part.get("text"))
        elif kind in THINKING_PARTS:
            thoughts.append(_first(part, (*REASONING_KEYS, "text")))
        elif kind == "tool_result":
            result = _read_content(part.get("content"))
            texts.append(result[0] if result[3] is None else None)
        elif kind == "tool_use":
            calls.append({"name": part.get("name"), "arguments": part.get("input")})
        else:
            media = isinstance(kind, str) and MEDIA_PART.search(kind)
            return "", "", [], RowStatus.MULTIMODAL if media else RowStatus.NOT_TEXT
    faults = [fault for fault in map(text_fault, (*texts, *thoughts)) if fault]
    return ("", "", [], faults[0]) if faults else ("".join(texts), "\n".join(thoughts), calls, None)


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as the chat templates of transformers take them, arguments as an object; none where one is unreadable.

    value: a list of calls, or one; each with its name and arguments, or with a `function` of these; or any as JSON.
    """
    value = parsed_json(value)
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = parsed_json(call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return []
        arguments = parsed_json(without_nulls(_first(function, ("arguments", "parameters")) or {}))
        identity = {"id": call["id"]} if call.get("id") else {}
        found.append({"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _first(message: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """The first value that is not None: Parquet gives every message the keys of all of them."""
    return next((message[key] for key in keys if message.get(key) is not None), None)
