"""Kept records in the forms of trainers, from every form they come in; TRL prepares what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import scorer
from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.selection.config import FORM_NAMES
from scorer.selection.convert import DATASET_INFO, FORMS
from scorer.types import ScorerError
from tests.lib.command import Commands, read_jsonl
from tests.lib.runs import make_run, run_of


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7, "system": "Be brief."}
PLAIN = {"prompt": "Hi", "completion": "Hello", "weight": 0.5}
CHAT = {"messages": [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]}
SHAREGPT = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
TOOLS = {
    "messages": [message("user", "t?"), message("tool", "5"), message("assistant", "It is 5.")],
}
BROKEN = {"messages": [message("user", "a"), message("assistant", "b"), {"role": "user"}, message("assistant", "d")]}
ROWS: list[dict[str, Any]] = [ALPACA, PLAIN, CHAT, SHAREGPT, TOOLS, BROKEN]
CHATS = [
    [message("system", "Be brief."), message("user", "Add.\n1 2"), message("assistant", "3")],
    [message("user", "Hi"), message("assistant", "Hello")],
    CHAT["messages"],
    [message("user", "x"), message("assistant", "y")],
    TOOLS["messages"],
]
SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
WRITTEN: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": chat} for chat in CHATS],
    "prompt-completion": [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS],
    "sharegpt": [
        {"conversations": [{"from": SHAREGPT_ROLES[m["role"]], "value": m["content"]} for m in chat]} for chat in CHATS
    ],
    "alpaca": [
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
        {"instruction": "x", "input": "", "output": "y"},
    ],
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", ROWS, ifd=[0.5] * len(ROWS))


def test_the_options_name_the_forms() -> None:
    assert tuple(FORMS) == FORM_NAMES


@pytest.mark.parametrize("form", FORM_NAMES)
def test_every_form_from_every_form(run: Run, tmp_path: Path, form: str) -> None:
    said = Commands(tmp_path)(
        *("select", "run", "-o", "out.jsonl", "--keep", "100%", "--as", form, "--rejected", "rest.jsonl")
    ).done()
    rows = WRITTEN[form]
    assert read_jsonl(tmp_path / "out.jsonl") == rows
    assert f"kept {len(rows)} of 6 records" in said
    assert f"dropped: {6 - len(rows)} not_convertible" in said
    assert "were asked for" not in said
    rest = read_jsonl(tmp_path / "rest.jsonl")
    reason = {"record_id": 5, "reason": "not_convertible"}
    assert rest[-1] == {**BROKEN, "scorer": reason}  # as it came
    assert len(rest) == 6 - len(rows)


UNTRAINED = {**message("assistant", "b"), "weight": 0}
FIRST = [message("user", "a"), UNTRAINED, message("user", "c"), message("assistant", "d")]
LAST = [
    message("user", "a"),
    message("assistant", "b"),
    message("user", "c"),
    {**message("assistant", "d"), "weight": 0},
]
OPEN = [*CHAT["messages"], message("user", "e")]
UNREAD = [*CHAT["messages"], {"role": "user", "content": None}]
FORMS_OF = [  # the messages of a record, and the forms that hold it
    (FIRST, {"messages", "prompt-completion"}),
    (LAST, {"messages"}),
    (OPEN, {"messages", "sharegpt"}),
    (UNREAD, set[str]()),
]


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize(("messages", "forms"), FORMS_OF)
def test_a_form_holds_all_of_a_record_and_trains_on_no_more(
    tmp_path: Path, form: str, messages: list[dict[str, Any]], forms: set[str]
) -> None:
    run = make_run(tmp_path / "run", [PLAIN, {"messages": messages}], ifd=[0.5, 0.6])
    scorer.select(run, tmp_path / "out.jsonl", keep="100%", form=form)
    _, *rows = read_jsonl(tmp_path / "out.jsonl")
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    written = {
        "messages": {"messages": messages},
        "prompt-completion": {"prompt": plain[:-1], "completion": plain[-1:]},
        "sharegpt": {"conversations": [{"from": SHAREGPT_ROLES[m["role"]], "value": m["content"]} for m in messages]},
    }
    assert rows == ([written[form]] if form in forms else [])


@pytest.mark.parametrize("form", FORM_NAMES)
def test_a_pair_whose_chosen_side_has_no_response(tmp_path: Path, form: str) -> None:
    pair = {"chosen": [message("user", "a")], "rejected": [message("user", "a"), message("assistant", "b")]}
    run = make_run(tmp_path / "run", [PLAIN, pair], ifd=[0.5, 0.6])
    scorer.select(run, tmp_path / "out.jsonl", keep="100%", form=form)
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 1


def test_scores_and_order_go_with_the_form(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [ALPACA, PLAIN], ifd=[0.5, 0.6])
    scorer.select(run, tmp_path / "a.json", keep=2, form="messages", with_scores=True, order="rank")
    first, second = json.loads((tmp_path / "a.json").read_text())
    assert first["messages"] == CHATS[1]
    assert (first["scorer"]["ifd"], second["scorer"]["ifd"]) == (0.6, 0.5)
    scorer.select(run, tmp_path / "a.csv", keep=2, form="alpaca")
    assert (tmp_path / "a.csv").read_text().splitlines() == [
        "instruction,input,output,system",
        "Add.,1 2,3,Be brief.",
        'Hi,"",Hello,',
    ]


def test_dataset_info_is_not_written_over_the_data(tmp_path: Path) -> None:
    data = tmp_path / "dataset_info.json"
    data.write_text(json.dumps({"data": [{"instruction": "q", "output": "a"}] * 3}))
    before = data.read_bytes()
    run = run_of(tmp_path / "run", [data], [3], ifd=[0.1, 0.2, 0.3])
    with pytest.raises(ScorerError, match=r"dataset_info\.json would be overwritten"):
        scorer.select(run, tmp_path / "out.json", keep=1, form="alpaca", dataset_info=True)
    assert data.read_bytes() == before


def test_dataset_info_is_updated(run: Run, tmp_path: Path) -> None:
    where = tmp_path / DATASET_INFO
    where.write_text('{"other": {"file_name": "other.json"}}')
    scorer.select(run, tmp_path / "out.json", keep=6, form="alpaca", dataset_info=True)
    scorer.select(run, tmp_path / "chat.jsonl", keep=6, form="sharegpt", dataset_info=True)
    columns = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
    }
    entries = json.loads(where.read_text())
    assert entries["other"] == {"file_name": "other.json"}
    assert entries["out"] == {"file_name": "out.json", "formatting": "alpaca", "columns": columns}
    assert entries["chat"]["columns"] == {"messages": "conversations"}
    assert entries["chat"]["tags"]["user_tag"] == "human"
    scorer.select(run, tmp_path / "out.json", keep=1, form="alpaca", dataset_info=True)
    assert "history" not in json.loads(where.read_text())["out"]["columns"]  # no record has it


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.jsonl", {"form": "chatml"}, "form: 'chatml' is not one of messages, alpaca"),
        ("a.jsonl", {"dataset_info": True}, "give --as too"),
        ("a.jsonl", {"dataset_info": True, "form": "prompt-completion"}, "does not read prompt-completion"),
        ("a.jsonl.gz", {"dataset_info": True, "form": "alpaca"}, "does not read .*gz"),
        ("a.csv", {"form": "messages"}, "'messages' holds lists"),
        (None, {"form": "messages"}, "give an output"),
    ],
)
def test_what_can_not_be_is_said(run: Run, tmp_path: Path, name: str | None, options: Any, message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        scorer.select(run, None if name is None else tmp_path / name, keep=1, **options)
    (tmp_path / DATASET_INFO).write_text("[]")
    with pytest.raises(ScorerError, match="no JSON object"):
        scorer.select(run, tmp_path / "a.jsonl", keep=1, form="alpaca", dataset_info=True)
    assert not (tmp_path / "a.jsonl").exists()


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out/"])
@pytest.mark.parametrize("form", ["messages", "prompt-completion"])
def test_trl_prepares_it(tiny: Callable[[str], ModelFiles], run: Run, tmp_path: Path, form: str, name: str) -> None:
    """SFTTrainer tokenises the data when it is made."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    scorer.select(run, f"{tmp_path}/{name}", keep=6, form=form)
    if name == "out/":
        data = datasets.load_from_disk(str(tmp_path / "out"))
    else:
        kind = {"out.jsonl": "json", "out.parquet": "parquet"}[name]
        data = datasets.load_dataset(
            kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "c")
        )
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama").path)
    tokenizer.chat_template = TEMPLATE
    args = trl.SFTConfig(output_dir=str(tmp_path / "t"), report_to="none", use_cpu=True, max_length=None, bf16=False)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama").path)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    texts = ["".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in chat) for chat in CHATS]
    prepared = trainer.train_dataset
    assert [tokenizer.decode(ids) for ids in prepared["input_ids"]] == texts
    if form == "prompt-completion":
        trained = [token for token in prepared[1]["labels"] if token != -100]
        assert tokenizer.decode(trained) == "Hello</assistant>"
