"""Rows to records: every format, and every way in which a row can be wrong, read from real files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scorer.config import Reading, ScoreConfig
from scorer.data.dataset import Dataset
from scorer.data.records import to_record
from scorer.files.raw import RawRecord
from scorer.types import Message, Record, RowStatus, ScorerError, Turn

GOOD = {"instruction": "Name a colour.", "input": "", "output": "Red."}


def read_records(paths: Sequence[Path], *, columns: Mapping[str, str] | None = None) -> Iterator[Record]:
    """The records of files that have a known format."""
    with Dataset(paths, reading=Reading(columns)) as data:
        data.inspect()
        yield from data.records()


def record(value: Any, columns: dict[str, str] | None = None, **reading: Any) -> Record:
    return to_record(RawRecord(0, "data.jsonl:1", value, RowStatus.OK), Reading(columns, **reading))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def single(prompt: str, response: str, extra: str = "") -> tuple[Turn, ...]:
    return (Turn((Message("user", prompt),), response, extra),)


def say(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "q", "input": "i", "output": "a"}, single("q", "a", "i")),
        ({"instruction": "q", "output": "a"}, single("q", "a")),
        ({"instruction": "q", "input": None, "output": "a"}, single("q", "a")),
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, single("q", "a", "c")),
        ({"instruction": "q", "input": "i", "response": "a"}, single("q", "a", "i")),
        ({"prompt": "q", "response": "a"}, single("q", "a")),
        ({"prompt": "q", "completion": "a"}, single("q", "a")),
        ({"instruction": "", "input": "only this", "output": "a"}, single("", "a", "only this")),
        # a table of mixed formats has all columns in all rows
        ({"messages": None, "instruction": None, "prompt": "q", "completion": "a", "output": None}, single("q", "a")),
        ({"instruction": "\x00 🙂 ‏שלום", "output": "مرحبا\x00"}, single("\x00 🙂 ‏שלום", "مرحبا\x00")),
    ],
)
def test_formats_of_one_turn(row: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    found = record(row)
    assert (found.record_id, found.source, found.turns, found.status) == (0, "data.jsonl:1", turns, RowStatus.OK)


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"instruction": "q"}, RowStatus.MISSING_FIELD),
        ({"output": "a"}, RowStatus.MISSING_FIELD),
        ({"instruction": None, "output": "a"}, RowStatus.MISSING_FIELD),
        ({"instruction": "q", "output": None}, RowStatus.MISSING_FIELD),
        ({"instruction": "q", "output": 7}, RowStatus.NOT_TEXT),
        ({"instruction": "q", "output": True}, RowStatus.NOT_TEXT),
        ({"instruction": ["q"], "output": "a"}, RowStatus.NOT_TEXT),
        ({"instruction": "q", "input": {"x": 1}, "output": "a"}, RowStatus.NOT_TEXT),
        ({"instruction": "q", "output": "a\ud800"}, RowStatus.NOT_TEXT),
        ({"instruction": "q", "output": " \n\t"}, RowStatus.EMPTY_RESPONSE),
        ({"instruction": " ", "input": None, "output": "a"}, RowStatus.EMPTY_PROMPT),
        ({"subject": "q", "body": "a"}, RowStatus.UNKNOWN_FORMAT),
        ({}, RowStatus.UNKNOWN_FORMAT),
        ([1, 2], RowStatus.UNKNOWN_FORMAT),
        ("text", RowStatus.UNKNOWN_FORMAT),
        (None, RowStatus.UNKNOWN_FORMAT),
        ({"messages": None}, RowStatus.MISSING_FIELD),
        ({"messages": "user: hello"}, RowStatus.NOT_TEXT),
        ({"messages": ["hello"]}, RowStatus.NOT_TEXT),
        ({"messages": []}, RowStatus.NO_ASSISTANT_TURN),
        ({"messages": say(("user", "q"))}, RowStatus.NO_ASSISTANT_TURN),
    ],
)
def test_faults_of_a_whole_record(row: Any, status: RowStatus) -> None:
    assert (record(row).turns, record(row).status) == ((), status)


def test_conversation_gives_a_turn_per_assistant_message_with_what_came_since() -> None:
    spoken = say(
        ("system", "s"), ("User", "q1"), ("assistant", "a1"), ("user", "q2"), ("tool", "t"), ("assistant", "a2")
    )
    expected = (
        Turn((Message("system", "s"), Message("user", "q1")), "a1"),
        Turn((Message("user", "q2"), Message("tool", "t")), "a2"),
    )
    sharegpt = [{"from": m["role"].replace("assistant", "gpt"), "value": m["content"]} for m in spoken]
    table = [{"role": m["role"], "content": m["content"], "from": None, "value": None} for m in spoken]
    for row in ({"messages": spoken}, {"conversations": sharegpt}, {"messages": sharegpt}, {"conversations": table}):
        assert record(row).turns == expected
    # messages after the last assistant message are nobody's prompt
    for content, after in (("q3", (Message("user", "q3"),)), (None, None)):
        turns = record({"messages": [*spoken, *say(("user", content))]}).turns
        assert turns == (expected[0], replace(expected[1], after=after))


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("DEVELOPER", "system"), ("function", "tool"), ("observation", "tool"), ("system", "system")],
)
def test_role_spellings(name: str, role: str) -> None:
    for assistant in ("assistant", "GPT", "chatgpt", "bing", "bard", "model"):
        turns = record({"conversations": [{"from": name, "value": "q"}, {"from": assistant, "value": "a"}]}).turns
        assert turns == (Turn((Message(role, "q"),), "a"),)


@pytest.mark.parametrize(
    ("content", "status"),
    [(None, RowStatus.MISSING_FIELD), (["x"], RowStatus.NOT_TEXT), ("\udc00", RowStatus.NOT_TEXT)],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_message_without_text_fails_its_turn_and_all_later_ones(content: Any, status: RowStatus, role: str) -> None:
    spoken = say(
        ("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b"), ("user", "3"), ("assistant", "c")
    )
    spoken[2 if role == "user" else 3]["content"] = content
    spoken[4]["content"] = {"another": "fault"}  # the first fault stays
    turns = record({"messages": spoken}).turns
    assert [turn.status for turn in turns] == [RowStatus.OK, status, status]
    assert turns[0] == Turn((Message("user", "1"),), "a")


@pytest.mark.parametrize(
    "value", ["\ud800", {"\ud800": 1}, {"a": "\ud800"}, {"a": [b""]}, {"a": {1, 2}}, Decimal(1), b"{}"]
)
@pytest.mark.parametrize("place", ["arguments", "name", "reasoning", "id", "answer"])
def test_a_message_with_a_value_that_is_no_json_is_not_text(value: Any, place: str) -> None:
    function: dict[str, Any] = {"name": "f", "arguments": {}}
    call: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    answer: dict[str, Any] = {"role": "tool", "content": "4"}
    holder, key = {"arguments": (function, place), "answer": (answer, "content")}.get(place, (call, place))
    holder[key] = value
    turns = record({"messages": [*say(("user", "q")), call, answer, *say(("assistant", "a"))]}).turns
    assert turns[0].status == (RowStatus.OK if place == "answer" else RowStatus.NOT_TEXT)
    assert turns[1].status == RowStatus.NOT_TEXT


def test_lone_surrogates_inside_json_of_calls_and_tools() -> None:
    call = json.dumps({"name": "f", "arguments": json.dumps({"a": "\ud800"})})
    for said in (
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function_call", "content": call},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"a": "\ud800"}}]},
    ):
        assert [turn.status for turn in record({"messages": [*say(("user", "q")), said]}).turns] == [RowStatus.NOT_TEXT]
    for tools in ([{"name": "\ud800"}], [{"name": b"f"}], json.dumps([{"name": "\ud800"}])):
        found = record({"messages": say(("user", "q"), ("assistant", "a")), "tools": tools})
        assert (found.status, found.tools, found.left_out) == (RowStatus.OK, (), ("tools",))


@pytest.mark.parametrize(
    ("role", "status"),
    [("narrator", RowStatus.UNKNOWN_FORMAT), (3, RowStatus.UNKNOWN_FORMAT), (None, RowStatus.MISSING_FIELD)],
)
def test_message_of_an_unknown_role_fails_itself_and_all_later_turns(role: Any, status: RowStatus) -> None:
    spoken = say(("user", "q"), ("assistant", "a"), (role, "b"), ("user", "q"), ("assistant", "c"))
    assert [turn.status for turn in record({"messages": spoken}).turns] == [RowStatus.OK, status, status]
    assert record({"messages": spoken}).turns[:1] == single("q", "a")


def test_blank_messages_fail_only_their_own_turn() -> None:
    spoken = say(
        ("user", "1"), ("assistant", " "), ("user", "2"), ("assistant", "b"), ("assistant", "c"), ("user", "\n")
    )
    turns = record({"messages": [*spoken, *say(("assistant", "d"), ("user", "5"), ("assistant", "e"))]}).turns
    assert [(turn.response, turn.status) for turn in turns] == [
        (" ", RowStatus.EMPTY_RESPONSE),
        ("b", RowStatus.OK),
        ("c", RowStatus.OK),  # what was said before is its prompt
        ("d", RowStatus.OK),
        ("e", RowStatus.OK),
    ]
    assert turns[1].prompt == (Message("user", "2"),)


TALK = say(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
SYSTEM_ROWS: list[dict[str, Any]] = [
    {"messages": TALK},
    {"conversations": [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in TALK]},
    {"instruction": "q1", "output": "a1"},
    {"instruction": "q1", "context": "c", "response": "a1"},
    {"prompt": "q1", "completion": "a1"},
]


@pytest.mark.parametrize("row", SYSTEM_ROWS)
def test_a_system_column_goes_before_the_first_prompt(row: dict[str, Any]) -> None:
    bare = record(row).turns
    said = Message("system", "Be brief.")
    first, *later = record({**row, "system": "Be brief."}).turns
    assert first == Turn((said, Message("user", "q1")), "a1", bare[0].input)
    assert later == list(bare[1:])
    for nothing in (None, "", " \n"):
        assert record({**row, "system": nothing}).turns == bare
    for wrong in (3, ["Be brief."], "\ud800"):
        found = record({**row, "system": wrong})
        assert (found.turns, found.status) == ((), RowStatus.NOT_TEXT)


def test_a_system_column_beside_messages_that_have_the_same() -> None:
    spoken = [*say(("system", "s")), *TALK[:2]]
    once = (Turn((Message("system", "s"), Message("user", "q1")), "a1"),)
    assert record({"messages": spoken, "system": "s"}).turns == record({"messages": spoken}).turns == once
    other = record({"messages": spoken, "system": "t"}).turns[0].prompt
    assert other == (Message("system", "t"), Message("system", "s"), Message("user", "q1"))


def test_a_system_column_by_another_name(tmp_path: Path) -> None:
    columns = {"messages": "chat", "system": "role"}
    assert ScoreConfig(columns=columns).columns == columns
    with pytest.raises(ScorerError, match=r"columns: .*system=\.\.\.,.* are optional"):
        ScoreConfig(columns={"system": "role"})
    rows = [{"chat": TALK, "system": "unnamed"}, {"chat": TALK, "role": "s"}]
    found = list(read_records([lines(tmp_path / "d.jsonl", *rows)], columns=columns))
    assert [r.turns[0].prompt for r in found] == [
        (Message("user", "q1"),),
        (Message("system", "s"), Message("user", "q1")),
    ]
    with pytest.raises(ScorerError, match="no row has chat and role"):  # a slip of the pen
        list(read_records([lines(tmp_path / "e.jsonl", rows[0])], columns=columns))


def test_a_column_without_a_name_is_nobody_s() -> None:
    assert record({"": 7, "prompt": "q", "response": "a"}).turns == single("q", "a")
    assert record({"": 7, "q": "x", "a": "y"}, {"prompt": "q", "response": "a"}).turns == single("x", "y")


def test_columns_override_detection() -> None:
    columns = {"prompt": "q", "response": "a"}
    assert record({**GOOD, "q": "x", "a": "y"}, columns).turns == single("x", "y")
    assert record(GOOD, columns).status is RowStatus.MISSING_FIELD
    assert record({"q": "x"}, columns).status is RowStatus.MISSING_FIELD
    with_input = {**columns, "input": "more"}
    assert record({"q": "x", "a": "y", "more": "z"}, with_input).turns == single("x", "y", "z")
    assert record({"q": "x", "a": "y", "more": None}, with_input).turns == single("x", "y")
    assert record({"q": "x", "a": "y"}, with_input).status is RowStatus.MISSING_FIELD
    assert record({"chat": say(("user", "x"), ("assistant", "y"))}, {"messages": "chat"}).turns == single("x", "y")


def test_one_bad_line_and_mixed_formats_do_not_stop_a_file(tmp_path: Path) -> None:
    rows = [GOOD, '{"instruction": "q", "outp', {"a": 1}, {"prompt": "q", "completion": "a"}, GOOD, {"prompt": "q"}]
    records = list(read_records([lines(tmp_path / "d.jsonl", *rows)]))
    assert [r.record_id for r in records] == [0, 1, 2, 3, 4, 5]
    assert [r.source for r in records] == [f"{tmp_path}/d.jsonl:{line}" for line in range(1, 7)]
    wrong = [RowStatus.BAD_JSON, RowStatus.UNKNOWN_FORMAT]
    assert [r.status for r in records] == [RowStatus.OK, *wrong, RowStatus.OK, RowStatus.OK, RowStatus.MISSING_FIELD]
    assert records[0].turns == records[4].turns  # duplicate rows are rows


def test_long_response_is_kept_whole(tmp_path: Path) -> None:
    [only] = read_records([lines(tmp_path / "d.jsonl", {**GOOD, "output": "long " * 200_000})])
    assert len(only.turns[0].response) == 1_000_000


def test_file_without_a_known_format_is_refused_by_its_columns(tmp_path: Path) -> None:
    good = lines(tmp_path / "good.jsonl", GOOD)
    table = tmp_path / "other.parquet"
    pl.DataFrame({"subject": ["q"], "body": ["a"]}).write_parquet(table)
    array = tmp_path / "other.json"
    array.write_text('[{"subject": "q", "body": "a"}, {}]')
    for path in (table, array):
        with pytest.raises(ScorerError) as caught:
            list(read_records([good, path]))
        text = str(caught.value)
        assert str(path) in text
        assert "subject, body" in text
        assert "--columns prompt=subject,response=body" in text
        assert "\n" not in text
        assert next(read_records([path], columns={"prompt": "subject", "response": "body"})).turns == single("q", "a")
    with pytest.raises(ScorerError, match=r"no row has q and a \(its first row holds instruction, input, output\)"):
        list(read_records([good], columns={"prompt": "q", "response": "a"}))
    with pytest.raises(ScorerError, match="its first row is not JSON"):
        list(read_records([lines(tmp_path / "log.jsonl", "no", "json")]))


def test_a_file_of_one_conversation_is_told_how_to_write_it(tmp_path: Path) -> None:
    messages = say(("user", "q"), ("assistant", "a"))
    for rows in ([messages], messages):  # an array of records, for all that its line tells
        with pytest.raises(ScorerError, match=r'rows are single messages; write .* \{"messages": \[...\]\}'):
            list(read_records([lines(tmp_path / "d.jsonl", *rows)]))
    two = [record.turns for record in read_records([lines(tmp_path / "d.jsonl", messages, messages)])]
    assert two == [single("q", "a")] * 2
    with pytest.raises(ScorerError, match="holds from, subject"):  # a mail
        list(read_records([lines(tmp_path / "d.jsonl", {"from": "me@here", "subject": "s", "text": "t"})]))


def test_one_row_with_all_keys_of_a_format_makes_a_file_known(tmp_path: Path) -> None:
    halves = [{"prompt": "q", "solution": "a"}, {"instruction": "q", "targets": "a"}]
    with pytest.raises(ScorerError, match=r"no row has a known format \(its first row holds prompt, solution\)"):
        list(read_records([lines(tmp_path / "halves.jsonl", *halves, "no JSON")]))
    found = read_records([lines(tmp_path / "d.jsonl", *halves, GOOD)])
    assert [r.status for r in found] == [RowStatus.MISSING_FIELD, RowStatus.MISSING_FIELD, RowStatus.OK]
    # the keys count, not what they hold
    [null] = read_records([lines(tmp_path / "null.jsonl", {"prompt": None, "completion": "a"})])
    assert null.status is RowStatus.MISSING_FIELD
    columns = {"prompt": "q", "response": "a", "input": "more"}
    rows = [{"q": "x", "a": "y"}, {"q": "x", "a": "y", "more": "z"}]
    with pytest.raises(ScorerError, match=r"no row has q and a and more \(its first row holds q, a\)"):
        list(read_records([lines(tmp_path / "c.jsonl", rows[0])], columns=columns))
    found = read_records([lines(tmp_path / "c.jsonl", *rows)], columns=columns)
    assert [r.status for r in found] == [RowStatus.MISSING_FIELD, RowStatus.OK]


def test_resume_after_the_only_known_row(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", GOOD, {"a": 1}, {"b": 2})
    assert [r.status for r in Dataset([path]).records(1)] == [RowStatus.UNKNOWN_FORMAT] * 2


def test_parquet_conversations(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    rows = [{"messages": say(("user", "q"), ("assistant", "a"))}, {"messages": [{"from": "human", "value": "q"}]}]
    pl.from_dicts(rows, infer_schema_length=None).write_parquet(path)
    first, second = read_records([path])
    assert (first.turns, first.source) == (single("q", "a"), f"{path}[0]")
    assert second.status is RowStatus.NO_ASSISTANT_TURN
