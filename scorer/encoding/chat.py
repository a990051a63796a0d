"""A model's chat template: the text that it writes before a response, and what it makes of the response."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property, partial
from typing import Any

from scorer.encoding.templates import RENDERER, ChatTemplateError, EndlessTemplateError
from scorer.types import ScorerError

STAND_IN = "stand-in-for-the-response"
SPECIAL_FIELDS = ("tool_calls", "reasoning_content")  # a template that does not read them leaves them out

ENDLESS = 3  # so many renderings without an end are not the fault of one record
ChatMessage = Mapping[str, Any]


class HiddenResponseError(ChatTemplateError):
    """The text of a template does not show where the response begins."""


class ChatTemplate:
    """The chat template of a transformers tokenizer. Raises ScorerError where it has none.

    now: what a template that asks for the date is told, so that the prompts of a run don't change overnight.
    """

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise ScorerError("protocol chat: the model has no chat template; use one that is tuned to chat")
        self._tokenizer, self.now = tokenizer, datetime.now()
        self._source, self._endless = str(tokenizer.chat_template), 0

    def reads(self, name: str) -> bool:
        """Whether the template reads a field of messages, or `tools`."""
        return name in self._source

    def message(self, role: str, text: str, fields: ChatMessage | None) -> ChatMessage:
        """A message for the template; its reasoning and tool calls as `text`, if the template does not write them."""
        if fields is None:
            return {"role": role, "content": text}
        if "reasoning_content" in fields and not self.reads("reasoning_content"):
            form = None
        else:
            form = self._calls if "tool_calls" in fields else dict
        return (
            form(fields) if form else {k: v for k, v in fields.items() if k not in SPECIAL_FIELDS} | {"content": text}
        )

    @cached_property
    def _calls(self) -> Callable[[ChatMessage], ChatMessage] | None:
        """The form in which the template writes a tool call: arguments are an object or JSON, no content "" or null."""
        call = {"type": "function", "id": "call", "function": {"name": "find", "arguments": {"key": "argument"}}}
        asks, calls = {"role": "user", "content": "text"}, {"role": "assistant", "content": "", "tool_calls": [call]}
        for form in (partial(_call_form, content=c, as_json=j) for c in ("", None) for j in (False, True)):
            with suppress(ChatTemplateError):
                if "argument" in self._render([asks, form(calls)], []):
                    return form
        return None

    def split(self, history: Sequence[ChatMessage], message: ChatMessage, tools: Sequence[Any]) -> tuple[str, str]:
        """The text before a response, and the text that the template makes of the response.

        A stand-in for the content shows where it goes, so that a block of reasoning that the template opens and closes
        by itself is before the response. What it writes for the message only (its reasoning, its tool calls) belongs to
        the response; what it writes after any content, such as a token that ends the turn, does not. Raises
        ChatTemplateError, ScorerError where the template computes without an end again and again.
        """
        whole = self._render([*history, message], tools)
        before, found, after = self._render([*history, {"role": "assistant", "content": STAND_IN}], tools).rpartition(
            STAND_IN
        )
        start = len(before) if whole.startswith(before) else _shared(whole, before)
        if not found or (STAND_IN in before and STAND_IN not in str(history)):
            raise HiddenResponseError
        if start < len(before) and not whole[:start].startswith(self._render(history, tools)):
            raise HiddenResponseError  # the template writes another history for this message
        if whole.endswith(after) and len(whole) - len(after) >= start:
            return whole[:start], whole[start : len(whole) - len(after)]
        if message.get("tool_calls"):  # some end a turn otherwise when a tool is to answer
            return whole[:start], whole[start:]
        raise HiddenResponseError

    def _render(self, messages: Sequence[ChatMessage], tools: Sequence[Any]) -> str:
        try:
            source = self._tokenizer.get_chat_template(None, list(tools) or None)
        except ValueError as error:  # of several templates, none is for this
            raise ChatTemplateError(str(error)) from error
        variables = {
            **self._tokenizer.special_tokens_map,
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": False,
            "strftime_now": self.now.strftime,
        }
        try:
            return RENDERER.render(source, variables)
        except EndlessTemplateError as error:
            self._endless += 1
            if self._endless < ENDLESS:
                raise
            raise ScorerError(f"protocol chat: the model's chat template has no end: {error}; use another") from error


def _call_form(message: ChatMessage, *, content: str | None, as_json: bool) -> ChatMessage:
    calls = [
        {
            **call,
            "function": {
                **f,
                "arguments": json.dumps(f["arguments"], ensure_ascii=False) if as_json else f["arguments"],
            },
        }
        for call in message["tool_calls"]
        for f in [call["function"]]
    ]
    return {**message, "content": message["content"] or content, "tool_calls": calls}


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
