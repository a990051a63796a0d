"""The shapes that instruction data comes in: of each, the prompt and response of every turn, and what is left out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import scorer
from scorer.config import Reading
from scorer.data.records import to_record
from scorer.files.raw import RawRecord
from scorer.models.find import ModelFiles
from scorer.types import Record, Turn
from tests.lib.command import read_jsonl

CALL = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"city": "Bonn"}'}}
CALL_TEXT = '{"name": "sky", "arguments": {"city": "Bonn"}}'
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {}}}
TALK: list[tuple[str, Any]] = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
TALKED: list[tuple[str, ...]] = [("user: q1", "a1"), ("user: q2", "a2")]


def said(*pairs: tuple[str, Any], role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    return [{role: name, content: text} for name, text in pairs]


def read(row: Any, **reading: Any) -> Record:
    return to_record(RawRecord(0, "data.jsonl:1", row), Reading(**reading))


def shown(turn: Turn) -> tuple[str, ...]:
    """Prompt, response and, unless they are usual, status and name of a turn."""
    prompt = "|".join([*(f"{m.role}: {m.content}" for m in turn.prompt), *filter(None, [turn.input])])
    unusual = (str(turn.status), turn.name) if turn.status != "ok" or turn.name else ()
    return (prompt, turn.response, *filter(None, unusual))


# Rows, and what is read of each: format, turns, what is left out.
SHAPES: dict[str, tuple[Any, str, list[tuple[str, ...]], tuple[str, ...]]] = {
    "history of Alpaca": (
        {"instruction": "q2", "input": "i", "output": "a2", "history": [["q1", "a1"]]},
        "alpaca",
        [("user: q1", "a1"), ("user: q2|i", "a2")],
        (),
    ),
    "system and history": (
        {"system": "s", "instruction": "q2", "output": "a2", "history": [["q1", "a1"]]},
        "alpaca",
        [("user: q2", "a2")],
        (),
    ),
    "empty history": ({"instruction": "q1", "output": "a1", "history": []}, "alpaca", TALKED[:1], ()),
    "history that is text": ({"prompt": "q1", "response": "a1", "history": "once"}, "prompt-response", [], ()),
    "tool calls": (
        {
            "messages": [
                *said(("user", "q1")),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                *said(("tool", "sunny"), ("assistant", "a1")),
            ],
            "tools": [TOOL],
        },
        "messages",
        [("user: q1", CALL_TEXT), ("tool: sunny", "a1")],
        (),
    ),
    "tool calls of ShareGPT": (
        {
            "conversations": said(
                ("human", "q1"),
                ("function_call", CALL_TEXT),
                ("observation", "sunny"),
                ("gpt", "a1"),
                role="from",
                content="value",
            ),
            "tools": json.dumps([TOOL["function"]]),
        },
        "sharegpt",
        [("user: q1", CALL_TEXT), ("tool: sunny", "a1")],
        (),
    ),
    "parts": (
        {
            "messages": said(
                ("user", [{"type": "text", "text": "q"}, {"type": "text", "text": "1"}]), ("assistant", "a1")
            )
        },
        "messages",
        TALKED[:1],
        (),
    ),
    "a picture": (
        {
            "messages": said(
                *TALK[:2], ("user", [{"type": "image_url", "image_url": {"url": "x"}}]), ("assistant", "a cat")
            )
        },
        "messages",
        [("user: q1", "a1"), ("", "", "multimodal")],
        (),
    ),
    "pictures beside the text": (
        {"instruction": "q1", "output": "a1", "images": ["x.png"]},
        "alpaca",
        TALKED[:1],
        ("images",),
    ),
    "an unknown role": (
        {"messages": said(*TALK[:2], ("oracle", "?"), ("assistant", "a3"))},
        "messages",
        [("user: q1", "a1"), ("", "", "unknown_format"), ("", "", "unknown_format")],
        (),
    ),
    "a struct of lists": (
        {"conversations": {"from": [r for r, _ in TALK], "value": [t for _, t in TALK]}},
        "sharegpt",
        TALKED,
        (),
    ),
    "a JSON string": ({"messages": json.dumps(said(*TALK))}, "messages", TALKED, ()),
    "a bare list of messages": (said(*TALK), "messages", TALKED, ()),
    "TRL's conversational pairs": (
        {"prompt": said(*TALK[:3]), "completion": said(TALK[3])},
        "prompt-completion",
        TALKED[1:],
        (),
    ),
    "preference, texts": (
        {"prompt": "q1", "chosen": "good", "rejected": "bad"},
        "preference",
        [("user: q1", "good", "ok", "chosen"), ("user: q1", "bad", "ok", "rejected")],
        (),
    ),
    "preference, conversations": (
        {"chosen": said(*TALK[:3], ("assistant", "good")), "rejected": said(*TALK[:3], ("assistant", "bad"))},
        "preference",
        [("user: q2", "good", "ok", "chosen"), ("user: q2", "bad", "ok", "rejected")],
        (),
    ),
    "preference, the prompt twice": (
        {
            "prompt": "q1",
            "chosen": said(TALK[0], ("assistant", "good")),
            "rejected": said(TALK[0], ("assistant", "bad")),
            "messages": said(TALK[0], ("assistant", "good")),
        },
        "preference",
        [("user: q1", "good", "ok", "chosen"), ("user: q1", "bad", "ok", "rejected")],
        (),
    ),
    "preference beside the chosen conversation": (
        {
            "messages": said(TALK[0], ("assistant", "good")),
            "chosen": said(TALK[0], ("assistant", "good")),
            "rejected": said(TALK[0], ("assistant", "bad")),
        },
        "preference",
        [("user: q1", "good", "ok", "chosen"), ("user: q1", "bad", "ok", "rejected")],
        (),
    ),
    "a prompt that messages repeat": (
        {"prompt": "q1", "messages": said(*TALK[:2]), "prompt_id": "x"},
        "messages",
        TALKED[:1],
        (),
    ),
    "an instruction beside question and answer": (
        {"instruction": "Be brief.", "question": "q1", "answer": "a1"},
        "question-answer",
        TALKED[:1],
        ("instruction",),
    ),
    "preference, one message each": (
        {
            "conversations": said(("human", "q1"), role="from", content="value"),
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "preference",
        [("user: q1", "good", "ok", "chosen"), ("user: q1", "bad", "ok", "rejected")],
        (),
    ),
    "preference, marked texts": (
        {"chosen": "\n\nHuman: q1\n\nAssistant: good", "rejected": "\n\nHuman: q1\n\nAssistant: bad"},
        "preference",
        [("user: q1", "good", "ok", "chosen"), ("user: q1", "bad", "ok", "rejected")],
        (),
    ),
    "two responses in a row": (
        {"messages": said(*TALK[:2], ("assistant", "more"))},
        "messages",
        [("user: q1", "a1"), ("", "more")],
        (),
    ),
    "the assistant opens": (
        {"messages": said(("assistant", "Hello!"), *TALK[:2])},
        "messages",
        [("", "Hello!", "empty_prompt"), ("user: q1", "a1")],
        (),
    ),
    "weight 0": (
        {"messages": [*said(*TALK[:1]), {"role": "assistant", "content": "a1", "weight": 0}, *said(*TALK[2:])]},
        "messages",
        [("user: q1", "a1", "history_only"), ("user: q2", "a2")],
        (),
    ),
    "train false": (
        {
            "conversations": [
                {"from": "human", "value": "q1", "train": None},
                {"from": "gpt", "value": "a1", "train": False},
                {"from": "human", "value": "q2", "train": None},
                {"from": "gpt", "value": "a2", "train": True},
            ]
        },
        "sharegpt",
        [("user: q1", "a1", "history_only"), ("user: q2", "a2")],
        (),
    ),
    "segments": (
        {"segments": [{"label": False, "text": "<s>Hi\n"}, {"label": True, "text": "Hello"}]},
        "segments",
        [("user: <s>Hi\n", "Hello")],
        (),
    ),
    "reasoning beside the content": (
        {"messages": [*said(TALK[0]), {"role": "assistant", "content": "a1", "reasoning_content": "hm"}]},
        "messages",
        [("user: q1", "<think>\nhm\n</think>\n\na1")],
        (),
    ),
    "reasoning as a part": (
        {
            "messages": said(
                TALK[0], ("assistant", [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a1"}])
            )
        },
        "messages",
        [("user: q1", "<think>\nhm\n</think>\n\na1")],
        (),
    ),
    "question and answer": ({"question": "q1", "answer": "a1", "id": 7}, "question-answer", TALKED[:1], ()),
    "OpenOrca": (
        {"system_prompt": "s", "question": "q1", "response": "a1"},
        "question-response",
        [("system: s|user: q1", "a1")],
        (),
    ),
    "query and response": ({"query": "q1", "response": "a1"}, "query-response", TALKED[:1], ()),
    "input and output": ({"input": "q1", "output": "a1"}, "input-output", TALKED[:1], ()),
    "UltraChat": ({"id": "0", "data": [t for _, t in TALK]}, "data", TALKED, ()),
    "pairs": (
        {"conversation": [{"human": "q1", "assistant": "a1"}, {"human": "q2", "assistant": "a2"}]},
        "conversation",
        TALKED,
        (),
    ),
    "dialog": ({"dialog": [["q1", "a1"], ["q2", "a2"]]}, "dialog", TALKED, ()),
    "Guanaco": ({"text": "### Human: q1### Assistant: a1### Human: q2### Assistant: a2"}, "marked-text", TALKED, ()),
    "Alpaca's template": (
        {
            "text": "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nq1\n\n### Response:\na1"
        },
        "marked-text",
        TALKED[:1],
        (),
    ),
    "ChatML": (
        {
            "text": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1"
            "<|im_end|>\n"
        },
        "marked-text",
        [("system: s|user: q1", "a1")],
        (),
    ),
}
PAIR: list[tuple[str, ...]] = [("user: q1", "good", "ok", "chosen"), ("user: q1", "bad", "ok", "rejected")]
SUM = "Sure, here it is.\n\n### Instruction:\n1 2\n\n### Response:\n3"  # an answer, which marks no one
SHAPES |= {
    "roles and texts in pairs": ({"messages": [[role, text] for role, text in TALK]}, "messages", TALKED, ()),
    "objects of one key": ({"messages": [{role: text} for role, text in TALK]}, "messages", TALKED, ()),
    "JSON strings in a list": ({"messages": [json.dumps(m) for m in said(*TALK)]}, "messages", TALKED, ()),
    "JSON of TRL's pairs": (
        {"prompt": json.dumps(said(*TALK[:3])), "completion": json.dumps(said(TALK[3]))},
        "prompt-completion",
        TALKED[1:],
        (),
    ),
    "marks inside an answer": ({"prompt": "q1", "response": SUM}, "prompt-response", [("user: q1", SUM)], ()),
    "marks inside a chosen answer": (
        {"prompt": "q1", "chosen": SUM, "rejected": "bad"},
        "preference",
        [("user: q1", SUM, "ok", "chosen"), PAIR[1]],
        (),
    ),
    "a prompt that the sides repeat in part": (
        {
            "prompt": said(("system", "s"), *TALK[:1]),
            "chosen": said(TALK[0], ("assistant", "good")),
            "rejected": said(TALK[0], ("assistant", "bad")),
        },
        "preference",
        [("system: s|user: q1", *row[1:]) for row in PAIR],
        (),
    ),
    "a prompt of which the sides repeat the end": (
        {
            "prompt": said(*TALK[:3]),
            "chosen": said(TALK[2], ("assistant", "good")),
            "rejected": said(TALK[2], ("assistant", "bad")),
        },
        "preference",
        [("user: q2", *row[1:]) for row in PAIR],
        (),
    ),
    "preference, marked, with its prompt": (
        {
            "prompt": "\n\nHuman: q1\n\nAssistant:",
            "chosen": "\n\nHuman: q1\n\nAssistant: good",
            "rejected": "\n\nHuman: q1\n\nAssistant: bad",
        },
        "preference",
        PAIR,
        (),
    ),
    "preference, a marked prompt": (
        {"prompt": "\n\nHuman: q1\n\nAssistant:", "chosen": "good", "rejected": "bad"},
        "preference",
        PAIR,
        (),
    ),
    "User and Assistant": ({"text": "User: q1\n\nAssistant: a1"}, "marked-text", TALKED[:1], ()),
    "OpenAssistant": (
        {"text": "<|prompter|>q1<|endoftext|><|assistant|>a1<|endoftext|><|prompter|>q2<|endoftext|><|assistant|>a2"},
        "marked-text",
        TALKED,
        (),
    ),
    "LLaMA 3": (
        {
            "text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
        },
        "marked-text",
        TALKED[:1],
        (),
    ),
    "Gemma": (
        {"text": "<bos><start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n"},
        "marked-text",
        TALKED[:1],
        (),
    ),
    "an end token": ({"text": "<s>### Human: q1\n### Assistant: a1</s>"}, "marked-text", TALKED[:1], ()),
    "Alpaca's template with an input": (
        {"text": "### Instruction:\nq2\n\n### Input:\ni\n\n### Response:\na2"},
        "marked-text",
        [("user: q2|i", "a2")],
        (),
    ),
    "ChatML with an unknown role": (
        {
            "text": "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
            "<|im_start|>oracle\n?<|im_end|>"
        },
        "marked-text",
        [("user: q1", "a1"), ("", "", "unknown_format")],
        (),
    ),
    "train 0": (
        {"messages": [*said(TALK[0]), {"role": "assistant", "content": "a1", "train": 0}, *said(*TALK[2:])]},
        "messages",
        [("user: q1", "a1", "history_only"), ("user: q2", "a2")],
        (),
    ),
    "a thought": (
        {"messages": [*said(TALK[0]), {"role": "assistant", "content": "a1", "thought": "hm"}]},
        "messages",
        [("user: q1", "<think>\nhm\n</think>\n\na1")],
        (),
    ),
    "an article": ({"article": "x", "question": "q1", "answer": "a1"}, "question-answer", TALKED[:1], ("article",)),
    "capital letters": (
        {"Instruction": "q2", "Input": "i", "Output": "a2"},
        "alpaca",
        [("user: q2|i", "a2")],
        (),
    ),
    "FLAN": ({"inputs": "q1", "targets": "a1", "task": "t"}, "inputs-targets", TALKED[:1], ()),
    "an empty list beside a pair": (
        {"messages": [], "prompt": "q1", "response": "a1"},
        "prompt-response",
        TALKED[:1],
        (),
    ),
    "an input beside an instruction of messages": (
        {"instruction": said(TALK[0]), "input": "i", "output": "a1"},
        "alpaca",
        TALKED[:1],
        ("input",),
    ),
    "a response beside messages that lack it": (
        {"messages": said(*TALK[:3]), "response": "a2"},
        "messages",
        TALKED[:1],
        ("response",),
    ),
    "null arguments of a table": (
        {
            "messages": [
                *said(TALK[0]),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "sky", "arguments": {"city": "Bonn", "day": None}}}],
                },
            ]
        },
        "messages",
        [("user: q1", CALL_TEXT)],
        (),
    ),
    "Anthropic's tools": (
        {
            "messages": said(
                TALK[0],
                ("assistant", [{"type": "tool_use", "id": "c", "name": "sky", "input": {"city": "Bonn"}}]),
                ("user", [{"type": "tool_result", "tool_use_id": "c", "content": "sunny"}]),
                ("assistant", "a1"),
            )
        },
        "messages",
        [("user: q1", CALL_TEXT), ("user: sunny", "a1")],
        (),
    ),
}
UNREAD = [  # rows whose meaning is not sure
    {"question": "q1", "answer": ["Paris", "paris"]},
    {"prompt": "q1", "response": ["s1", "s2", "s3", "s4"]},
    {"prompt": "q1", "chosen": ["red", "blue"], "rejected": ["green"]},
    {"messages": ["s", "q1", "a1"]},
    {"text": "An article.\n\nAssistant: means helper."},
    {"text": "### Response: a1"},
    {"text": "### Human: q1 ### Human: q2 ### Assistant: a1"},
]
SHAPES["system and history"][2].insert(0, ("system: s|user: q1", "a1"))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_read_of_a_shape(shape: str) -> None:
    row, format, turns, left_out = SHAPES[shape]
    found = read(row)
    if shape == "history that is text":  # it can't be scored without it, so it isn't
        assert (found.status, found.turns) == ("not_text", ())
    assert (found.format, [shown(turn) for turn in found.turns], found.left_out) == (format, turns, left_out)


@pytest.mark.parametrize("row", UNREAD)
def test_what_is_not_sure_is_not_scored(row: dict[str, Any]) -> None:
    found = read(row)
    assert (found.turns, found.status in ("not_text", "unknown_format")) == ((), True)


def test_white_space_takes_no_time() -> None:
    blank = " " * 40_000
    began = time.monotonic()
    read({"text": f"<|user|>\nhi</s>\n<|assistant|>\n{blank}x"})
    read({"text": f"{blank}### Human: q### Assistant: a{blank}"})
    read({"prompt": "q", "response": f"{blank}</think>{blank}x"}, reasoning="apart")
    assert time.monotonic() - began < 1


THINKING = {"messages": said(TALK[0], ("assistant", "<think>hm</think>\n\na1"))}
FIELD = SHAPES["reasoning beside the content"][0]


def test_reasoning_with_the_answer_without_it_or_apart() -> None:
    assert [shown(t) for t in read(THINKING).turns] == [("user: q1", "<think>hm</think>\n\na1")]
    for row, thought in ((THINKING, "<think>hm</think>\n\n"), (FIELD, "<think>\nhm\n</think>\n\n")):
        without = read(row, reasoning="without")
        assert ([shown(t) for t in without.turns], without.left_out) == (TALKED[:1], ("reasoning",))
        apart = read(row, reasoning="apart")
        assert [shown(t) for t in apart.turns] == [("user: q1", thought, "ok", "reasoning"), ("", "a1", "ok", "answer")]
        assert apart.left_out == ()
    plain = {"prompt": "q", "response": "Less</think> is more"}  # what opened before the response
    assert [t.response for t in read(plain, reasoning="apart").turns] == ["Less</think> ", "is more"]
    pair = {"prompt": "q", "chosen": "<think>x</think>a", "rejected": "b"}
    names = [turn.name for turn in read(pair, reasoning="apart").turns]
    assert names == ["chosen_reasoning", "chosen_answer", "rejected"]


def test_tool_calls_may_be_history_only() -> None:
    for shape in ("tool calls", "tool calls of ShareGPT"):
        turns = read(SHAPES[shape][0], tool_calls="skip").turns
        assert [shown(t)[2:] for t in turns] == [("history_only",), ()]
        assert turns[0].response == CALL_TEXT
        assert turns[0].fields is not None
        assert turns[0].fields["tool_calls"][0]["function"] == {"name": "sky", "arguments": {"city": "Bonn"}}
    assert read(SHAPES["tool calls"][0]).tools == read(SHAPES["tool calls of ShareGPT"][0]).tools == (TOOL,)


@pytest.mark.parametrize(
    ("row", "suggestion"),
    [
        ({"id": 1, "my_question": "q", "gold_answer": "a"}, "prompt=my_question,response=gold_answer"),
        ({"src": "q", "tgt": "a"}, "prompt=src,response=tgt"),
        ({"turns": [{"role": "user", "content": "q"}], "id": "x"}, "messages=turns"),
        ({"body": "text"}, "prompt=...,response=..."),
    ],
)
def test_a_shape_that_is_not_known_is_refused_with_the_option_to_type(
    tmp_path: Path, row: dict[str, Any], suggestion: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(scorer.ScorerError, match=rf"--columns {suggestion.replace('.', '[.]')}$"):
        scorer.score(path, tmp_path / "run")


def test_shapes_are_scored_as_their_plain_form_and_come_back_as_they_were(
    tiny: Callable[[str], ModelFiles], tmp_path: Path
) -> None:
    rows = [row for row, *_ in SHAPES.values()]
    plain = [{"messages": said(*TALK)}, {"messages": said(*TALK[:2])}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*plain, *rows]))
    options: dict[str, Any] = {"model": str(tiny("gpt2").path), "device": "cpu", "dtype": "float32"}
    run = scorer.score(path, tmp_path / "run", protocol="aligned", **options)
    scores = run.scores()
    expected = dict(zip(TALKED, scores.filter(record_id=0)["ifd"], strict=True))
    compared = 0
    for record_id, (_, _, turns, _) in enumerate(SHAPES.values(), len(plain)):
        found = scores.filter(record_id=record_id)
        assert found.height == max(len(turns), 1)
        for row, turn in zip(found.iter_rows(named=True), turns, strict=False):
            whole = turns in (TALKED, TALKED[:1])  # the second turn's history is the first
            if whole and turn in expected:
                assert row["ifd"] == pytest.approx(expected[turn], rel=1e-5)
                compared += 1
    assert compared > 20
    manifest = run.manifest
    left_out = {"images": 1, "instruction": 1, "tools": 2, "article": 1, "input": 1, "response": 1}
    assert manifest.left_out == left_out
    assert manifest.formats["preference"] == 11
    assert sum(manifest.formats.values()) == len(rows) + len(plain)
    scorer.select(run, tmp_path / "all.jsonl", keep=len(rows) + 2, max_ifd=None, rejected=tmp_path / "rest.jsonl")
    kept = read_jsonl(tmp_path / "all.jsonl")
    assert len(kept) > len(rows) - 5  # two have nothing to score
    assert all(row in [*plain, *rows] for row in kept)
