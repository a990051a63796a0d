"""The chat templates that models come with, as TRL has them: where each says that a response begins and ends."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.lib.families import byte_tokenizer
from scorer.encoding.chat import ChatTemplate, Conversation
from scorer.encoding.templates import ChatTemplateError

CALL = {"type": "function", "id": "c1", "function": {"name": "sky", "arguments": {"city": "Bonn"}}}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a1"}
THOUGHT = {"role": "assistant", "content": "a1", "reasoning_content": "hm"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
# The template, the end of what is before an answer; the end of what is before the next two, and these: an answer with
# reasoning, and a tool call. A template that does not know reasoning gets it as text.
EMPTY = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
AS_TEXT = "<think>\nhm\n</think>\n\na1"
JSON_CALL = '<tool_call>\n{"name": "sky", "arguments": {"city": "Bonn"}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=sky>\n<parameter=city>\nBonn\n</parameter>\n</function>\n</tool_call>"
TEMPLATES = {
    "qwen2_5": ("assistant\n", ("assistant\n", AS_TEXT), ("assistant\n", JSON_CALL)),
    "qwen3": (EMPTY, ("assistant\n<think>\n", "hm\n</think>\n\na1"), (EMPTY, JSON_CALL)),
    "qwen3_5_think": (EMPTY, ("assistant\n<think>\n", "hm\n</think>\n\na1"), (EMPTY, XML_CALL)),
    "qwen3_6": (EMPTY, ("assistant\n<think>\n", "hm\n</think>\n\na1"), (EMPTY, XML_CALL)),
    "deepseek_r1_distill": (
        "<｜Assistant｜>",
        ("<｜Assistant｜>", "\n\na1"),  # it drops all reasoning
        (
            "<｜Assistant｜>",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>sky\n"
            '```json\n{"city": "Bonn"}\n```<｜tool▁call▁end｜>',
        ),
    ),
    "llama3_1": (
        "assistant<|end_header_id|>\n\n",
        ("<|end_header_id|>\n\n", AS_TEXT),
        ("<|end_header_id|>\n\n", '{"name": "sky", "parameters": {"city": "Bonn"}}'),
    ),
    "gptoss": (
        "assistant<|channel|>final<|message|>",
        ("final<|message|>", AS_TEXT),
        ("assistant", ' to=functions.sky<|channel|>commentary json<|message|>{"city": "Bonn"}<|call|>'),
    ),
    "glm4moe": (
        "<|assistant|>\n<think></think>\n",
        ("<|assistant|>\n<think>", "hm</think>\na1"),
        (
            "<think></think>\n",
            "<tool_call>sky\n<arg_key>city</arg_key>\n<arg_value>Bonn</arg_value>\n</tool_call>",
        ),
    ),
    "gemma3": ("<start_of_turn>model\n", ("model\n", AS_TEXT), ("model\n", '{"name": "sky"}')),
    "phi3": ("<|assistant|>\n", ("<|assistant|>\n", AS_TEXT), ("<|assistant|>\n", '{"name": "sky"}')),
}


@cache
def template(name: str) -> ChatTemplate:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    tokenizer = byte_tokenizer()
    folder = Path(spec.submodule_search_locations[0], "chat_templates")
    tokenizer.chat_template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(tokenizer)


def split(name: str, message: dict[str, Any], text: str, *history: dict[str, Any]) -> tuple[str, str]:
    chat = template(name)
    before = [*history, USER]
    said = chat.message("assistant", text, message if len(message) > 2 else None)
    (found,) = chat.split([Conversation([*before, said])])
    assert not isinstance(found, ChatTemplateError)
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_where_a_response_begins_and_ends(name: str) -> None:
    opening, thought, call = TEMPLATES[name]
    before, response = split(name, ANSWER, "a1")
    assert (before.endswith(opening), response) == (True, "a1")
    later, response = split(name, ANSWER, "a1", USER, ANSWER)
    assert (later.endswith(opening), response) == (True, "a1")
    assert len(later) > len(before)
    for message, text, (ending, expected) in ((THOUGHT, AS_TEXT, thought), (CALLS, '{"name": "sky"}', call)):
        before, response = split(name, message, text)
        assert (before.endswith(ending), response) == (True, expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    chat = template(name)
    tools = [{"type": "function", "function": {"name": "sky", "description": "<ö>", "parameters": {"type": "object"}}}]
    talks: list[list[dict[str, Any]]] = [[USER, ANSWER], [USER, THOUGHT, USER, CALLS]]
    for messages in talks:
        for some in ([], tools):
            own = chat._tokenizer.apply_chat_template(
                messages, tools=some or None, tokenize=False, strftime_now=chat.now.strftime
            )
            assert chat.render([Conversation(messages, some)]) == [own]


def test_a_marked_generation_is_its_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% set a = 1 %}{% for m in messages %}{% generation %}{% set a = 2 %}{{ m.content }}\n{% endgeneration %}"
        "{{ a }}{{ m | tojson }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
    )
    messages = [USER, ANSWER, USER]
    own = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ChatTemplate(tokenizer).render([Conversation(messages)]) == [own]
