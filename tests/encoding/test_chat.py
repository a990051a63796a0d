"""What chat templates of several kinds write before a response, and what they make of it. A token is a byte."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from bench.lib.families import byte_tokenizer
from scorer.config import Reading
from scorer.data.records import to_record
from scorer.encoding.chat import Conversation, stand_in_for
from scorer.encoding.encoder import Encoder
from scorer.encoding.tokenizer import BulkTokenizer
from scorer.files.raw import RawRecord
from scorer.protocols import PROTOCOLS
from scorer.tokens import CONDITIONED, STATUSES, TokenBatch, TurnTable

START = "{% for m in messages %}<{{ m.role }}>"
END = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
# Writes an empty block of thoughts before an answer that has none, and drops the thoughts of earlier turns.
THINKS = (
    START
    + "{% if m.role == 'assistant' %}"
    + "{% set text = m.content.split('</think>')[-1].lstrip() %}"
    + "{% set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip() "
    + "if '</think>' in m.content else '') %}"
    + "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}</>"
    + "{% else %}{{ m.content }}{% endif %}"
    + "{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
DROPS = START + "{{ m.content.split('</think>')[-1] }}</>" + END  # the thoughts of every turn
CALLS = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    + START
    + "{% if m.tool_calls %}CALL {{ m.tool_calls[0].function.arguments.values() | first }}<call>"
    + "{% else %}{{ m.content }}</>{% endif %}"
    + END
)
DATED = "{{ strftime_now('%d %B %Y') }}" + START + "{{ m.content }}</>" + END


def encode(template: str, row: dict[str, Any], *, began: str = "", **reading: Any) -> tuple[TurnTable, TokenBatch]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    encoder = Encoder(BulkTokenizer(tokenizer), PROTOCOLS["chat"], 1024)
    if began:
        encoder.set_date(began)
    return encoder.encode([to_record(RawRecord(0, "data.jsonl:1", row), Reading(**reading))])


def scored(template: str, row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    """Of each scored response: all the text before it in its sequence, and the response."""
    _, batch = encode(template, row, **options)
    tokenizer = byte_tokenizer()
    found = []
    for span in range(len(batch.rows)):
        if batch.views[span] == CONDITIONED:
            ids, start, end = batch.ids(batch.sequences[span]), batch.starts[span], batch.ends[span]
            found.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end])))
    return found


def statuses(table: TurnTable) -> list[str]:
    return [str(STATUSES[code]) for code in table.statuses]


def talk(*texts: str, **last: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    messages[-1] |= last
    return {"messages": messages}


def test_a_block_of_thoughts_that_the_template_writes_is_prompt() -> None:
    opened = "<user>q<assistant><think>\n\n</think>\n\n"  # and not the generation prompt, <assistant><think>
    assert scored(THINKS, talk("q", "a")) == [(opened, "a")]
    assert scored(THINKS, talk("q", "<think>\n\n</think>\n\na")) == [(opened, "a")]


def test_thoughts_of_the_data_are_response_once_and_not_history() -> None:
    asked = "<user>q<assistant><think>\n"
    for row in (talk("q", "<think>hm</think>a"), talk("q", "a", reasoning_content="hm")):
        assert scored(THINKS, row) == [(asked, "hm\n</think>\n\na")]
        assert scored(THINKS, row, reasoning="without") == [(asked + "\n</think>\n\n", "a")]
        assert scored(THINKS, row, reasoning="apart") == [
            (asked, "hm\n</think>\n\n"),
            (asked + "hm\n</think>\n\n", "a"),
        ]
    later = scored(THINKS, talk("q", "<think>hm</think>a", "r", "b"))
    assert later[1] == ("<user>q<assistant>a</><user>r<assistant><think>\n\n</think>\n\n", "b")


def test_thoughts_that_the_template_drops_are_said_to_be_left_out() -> None:
    row = talk("q", "<think>hm</think>a")
    assert scored(DROPS, row) == [("<user>q</><assistant>", "a")]
    assert encode(DROPS, row)[0].left_out.tolist() == ["reasoning"]
    table, batch = encode(DROPS, row, reasoning="apart")
    assert statuses(table) == ["chat_template_error", "ok"]
    assert len(batch) == 2
    # a template that does not know the field gets the thoughts as text, and here drops them, too
    assert encode(DROPS, talk("q", "a", reasoning_content="hm"))[0].left_out.tolist() == ["reasoning"]
    plain = START + "{{ m.content }}</>" + END
    assert scored(plain, talk("q", "a", reasoning_content="hm")) == [
        ("<user>q</><assistant>", "<think>\nhm\n</think>\n\na")
    ]
    assert encode(plain, talk("q", "a", reasoning_content="hm"))[0].left_out.tolist() == [None]


def test_tool_calls_are_what_the_template_makes_of_them() -> None:
    call = {"function": {"name": "sky", "arguments": '{"city": "Bonn"}'}}
    row = talk("q", "", tool_calls=[call]) | {"tools": [{"name": "sky"}]}
    row["messages"][-1]["content"] = None
    row["messages"] += [{"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "a"}]
    called = "[sky]<user>q</><assistant>"
    assert scored(CALLS, row) == [
        (called, "CALL Bonn<call>"),
        (called + "CALL Bonn<call><tool>sunny</><assistant>", "a"),
    ]
    assert encode(CALLS, row)[0].left_out.tolist() == [None, None]
    as_json = CALLS.replace("arguments.values() | first", "arguments + '!'")  # it takes JSON
    assert [response for _, response in scored(as_json, row)] == ['CALL {"city": "Bonn"}!<call>', "a"]
    null = CALLS.replace("if m.tool_calls", "if m.content is none")  # it takes a content of null for a call
    assert [response for _, response in scored(null, row)] == ["CALL Bonn<call>", "a"]
    # a template that knows neither calls nor tools gets the calls as JSON
    plain = START + "{{ m.content }}</>" + END
    assert [response for _, response in scored(plain, row)] == ['{"name": "sky", "arguments": {"city": "Bonn"}}', "a"]
    assert encode(plain, row)[0].left_out.tolist() == ["tools", "tools"]


def test_a_template_that_asks_for_the_date_gets_that_of_the_run() -> None:
    [(prompt, _)] = scored(DATED, talk("q", "a"), began="2024-02-29T12:00:00")
    assert prompt == "29 February 2024<user>q</><assistant>"
    [(today, _)] = scored(DATED, talk("q", "a"))
    assert str(datetime.now().year) in today


def test_a_response_is_what_the_template_makes_of_it() -> None:
    adds = START + "{{ m.content | trim }}{% if m.content == ' a' %}!{% endif %}</>" + END
    assert scored(adds, talk("q", " a")) == [("<user>q</><assistant>", "a!")]


@pytest.mark.parametrize(
    "template",
    [
        START + "{{ m.content }}</>" + "{% if m.content == 'a' %}!{% endif %}" + END,  # more after it
        "{{ messages[-1].content[:1] }}" + START + "{{ m.content }}</>" + END,  # something of it in the history
        START + "{{ m.content }}{{ m.content }}</>" + END,
        START + "{{ m.content | length }}</>" + END,
        START + "{{ m.content | upper }}</>" + END,
    ],
)
def test_a_template_that_does_not_show_where_the_response_begins(template: str) -> None:
    table, batch = encode(template, talk("q", "a"))
    assert (statuses(table), len(batch)) == (["chat_template_error"], 0)


def test_no_text_of_the_user_is_taken_for_the_response() -> None:
    silent = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}|{% endfor %}"
    known = stand_in_for(Conversation(talk("q", "a")["messages"]))
    for said in ("stand-in-for-the-response", f"say {known} twice: {known}"):
        table, batch = encode(silent, talk(said, "a"))
        assert (statuses(table), len(batch)) == (["chat_template_error"], 0)
        plain = START + "{{ m.content }}</>" + END
        assert scored(plain, talk(said, said)) == [(f"<user>{said}</><assistant>", said)]
