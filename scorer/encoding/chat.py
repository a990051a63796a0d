"""A model's chat template: the text that it writes before a response, and what it makes of the response."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from typing import Any

from scorer.encoding.templates import RENDERER, ChatTemplateError, EndlessTemplateError
from scorer.types import ScorerError

SPECIAL_FIELDS = ("tool_calls", "reasoning_content")  # a template that does not read them leaves them out

ENDLESS = 3  # so many renderings without an end are not the fault of one record
HIDDEN = ChatTemplateError("the text of the template does not show where the response begins")
ChatMessage = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and the tools that they may call."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Any] = ()


class ChatTemplate:
    """The chat template of a transformers tokenizer. Raises ScorerError where it has none.

    now: what a template that asks for the date is told, so that the prompts of a run don't change overnight.
    """

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise ScorerError("protocol chat: the model has no chat template; use one that is tuned to chat")
        self._tokenizer, self.now = tokenizer, datetime.now()
        self._source, self._patience = str(tokenizer.chat_template), ENDLESS

    def reads(self, name: str) -> bool:
        """Whether the template reads a field of messages, or `tools`."""
        return name in self._source

    def message(self, role: str, text: str, fields: ChatMessage | None) -> ChatMessage:
        """A message for the template; its reasoning and tool calls as `text`, if the template does not write them."""
        if fields is None:
            return {"role": role, "content": text}
        unread = "reasoning_content" in fields and not self.reads("reasoning_content")
        form = None if unread else self._calls if "tool_calls" in fields else dict
        if form is not None:
            return form(fields)
        return {k: v for k, v in fields.items() if k not in SPECIAL_FIELDS} | {"content": text}

    @cached_property
    def _calls(self) -> Callable[[ChatMessage], ChatMessage] | None:
        """The form in which the template writes a tool call: arguments are an object or JSON, no content "" or null."""
        call = {"type": "function", "id": "call", "function": {"name": "find", "arguments": {"key": "argument"}}}
        asks, calls = {"role": "user", "content": "text"}, {"role": "assistant", "content": "", "tool_calls": [call]}
        forms = [partial(_call_form, content=content, as_json=j) for content in ("", None) for j in (False, True)]
        texts = self.render([Conversation([asks, form(calls)]) for form in forms])
        return next((f for f, t in zip(forms, texts, strict=True) if isinstance(t, str) and "argument" in t), None)

    def split(self, conversations: Sequence[Conversation]) -> list[tuple[str, str] | ChatTemplateError]:
        """Of each conversation, which ends in a response: the text before that, and what the template makes of it.

        A stand-in for the content shows where it goes, so that a block of reasoning that the template opens and closes
        by itself is before the response. What it writes for the message only (its reasoning, its tool calls) belongs to
        the response; what it writes after any content, such as a token that ends the turn, does not. Raises ScorerError
        where the template computes without an end again and again.
        """
        stand_ins = list(map(stand_in_for, conversations))
        asked: list[Conversation] = []
        for one, text in zip(conversations, stand_ins, strict=True):
            asked += (one, replace(one, messages=[*one.messages[:-1], {"role": "assistant", "content": text}]))
        texts = self.render(asked)
        return [self._split(*four) for four in zip(conversations, stand_ins, texts[::2], texts[1::2], strict=True)]

    def _split(
        self,
        conversation: Conversation,
        stand_in: str,
        whole: str | ChatTemplateError,
        stood_in: str | ChatTemplateError,
    ) -> tuple[str, str] | ChatTemplateError:
        if isinstance(whole, ChatTemplateError):
            return whole
        if isinstance(stood_in, ChatTemplateError):
            return stood_in
        before, found, after = stood_in.partition(stand_in)
        start = len(before) if whole.startswith(before) else _shared(whole, before)
        *history, message = conversation.messages
        if not found or stand_in in after:
            return HIDDEN
        if start < len(before):
            (earlier,) = self.render([replace(conversation, messages=history)])
            if isinstance(earlier, ChatTemplateError):
                return earlier
            if not whole[:start].startswith(earlier):
                return HIDDEN  # the template writes another history for this message
        if whole.endswith(after) and len(whole) - len(after) >= start:
            return whole[:start], whole[start : len(whole) - len(after)]
        if message.get("tool_calls"):  # some end a turn otherwise when a tool is to answer
            return whole[:start], whole[start:]
        return HIDDEN

    def render(
        self, conversations: Sequence[Conversation], *, to_answer: bool = False
    ) -> list[str | ChatTemplateError]:
        """The text of each conversation, or with `to_answer` up to where the model answers. ScorerError as `split`."""
        common = {
            **self._tokenizer.special_tokens_map,
            "documents": None,
            "add_generation_prompt": to_answer,
            "strftime_now": self.now.strftime,
        }
        requests = [
            (self._source_for(bool(c.tools)), {"messages": c.messages, "tools": list(c.tools) or None})
            for c in conversations
        ]
        try:
            texts = RENDERER.render(requests, common, patience=self._patience)
        except EndlessTemplateError as error:
            raise ScorerError(f"protocol chat: the model's chat template has no end: {error}; use another") from error
        self._patience -= sum(isinstance(text, EndlessTemplateError) for text in texts)
        return texts

    @lru_cache(2)  # noqa: B019 (there is one of a run)
    def _source_for(self, tools: bool) -> str:
        """The template for conversations with tools or without: a model may have several."""
        try:
            return str(self._tokenizer.get_chat_template(None, [{}] if tools else None))
        except ValueError:  # none is for these
            return "{{ raise_exception('the model has no template for this') }}"


def stand_in_for(conversation: Conversation) -> str:
    """A text that a conversation does not hold, whoever wrote it: its own digest."""
    return f"stand-in-{blake2b(repr(conversation).encode(), digest_size=8).hexdigest()}"


def _call_form(message: ChatMessage, *, content: str | None, as_json: bool) -> ChatMessage:
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        written = json.dumps(arguments, ensure_ascii=False) if as_json else arguments
        calls.append({**call, "function": {**call["function"], "arguments": written}})
    return {**message, "content": message["content"] or content, "tool_calls": calls}


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
